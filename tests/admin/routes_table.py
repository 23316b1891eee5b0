"""What every route of the server needs, and what it is asked in the isolation test. A route without a row fails it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Theirs = Mapping[str, str]
"""The other organisation's ids by kind."""


WORKER = "worker"
"""What the credentials of self-hosted environments' workers alone open: every API key is refused, the operator's too."""


@dataclass(frozen=True)
class Row:
    """`needs` is a scope, `open` or `worker`. `body` is made of the other organisation's ids where it can name any."""

    needs: str
    body: Callable[[Theirs], Any] | None = None
    answer: tuple[int, ...] | None = None
    """What somebody who may ask is answered; None: 404 if the path or the body names the other's, else a success."""
    query: str = ""


_MESSAGE = {"model": "claude-sonnet-5-5", "max_tokens": 8, "messages": [{"role": "user", "content": "hello"}]}
_TOOL_CREDENTIAL = {
    "display_name": "x",
    "auth": {"type": "static_bearer", "token": "x", "mcp_server_url": "https://mcp.example.com/mcp"},
}
_EVENTS = {"events": [{"type": "user.message", "content": [{"type": "text", "text": "hello"}]}]}
_REPORT = "?starting_at=2026-01-01T00:00:00Z&ending_at=2026-01-03T00:00:00Z"
NEEDS: dict[tuple[str, str], Row] = {
    ("GET", "/"): Row("open"),
    ("GET", "/livez"): Row("open"),
    ("GET", "/readyz"): Row("open"),
    ("GET", "/health"): Row("open"),
    ("POST", "/v1/messages"): Row("write:messages", lambda _: _MESSAGE, answer=(403,)),
    ("POST", "/v1/messages/pooled"): Row("write:messages", lambda _: _MESSAGE, answer=(403,)),
    ("POST", "/v1/messages/count_tokens"): Row("write:messages", lambda _: _MESSAGE, answer=(403,)),
    ("GET", "/v1/models"): Row("read:models", answer=(403,)),
    ("GET", "/v1/models/{model}"): Row("read:models", answer=(403,)),
    ("GET", "/v1/pool/stats"): Row("read:pool"),
    ("GET", "/metrics"): Row("operate:server"),
    ("GET", "/api/metrics"): Row("operate:server"),
    ("GET", "/v1/security"): Row("read:organization"),
    ("GET", "/v1/organizations/me"): Row("read:organization"),
    ("GET", "/v1/organizations/audit_log"): Row("read:audit"),
    ("GET", "/v1/cli"): Row("operate:server"),
    ("POST", "/v1/cli"): Row("operate:server", lambda _: {"state": "promoted"}, answer=(409,)),
    ("GET", "/v1/organizations/policies"): Row("read:organization"),
    ("POST", "/v1/organizations/policies"): Row("write:organization", lambda _: {"cache_seconds": 60}),
    ("GET", "/v1/organizations/prices"): Row("read:costs"),
    ("POST", "/v1/organizations/prices"): Row("operate:server", lambda _: {}, answer=(400,)),
    ("DELETE", "/v1/organizations/prices"): Row("operate:server", answer=(400,)),
    ("GET", "/v1/organizations"): Row("operate:server"),
    ("POST", "/v1/organizations"): Row("operate:server", lambda _: {"name": "x"}),
    ("GET", "/v1/organizations/api_keys"): Row("read:api_keys"),
    ("POST", "/v1/organizations/api_keys"): Row(
        "write:api_keys", lambda t: {"name": "x", "workspace_id": t["workspace_id"]}, answer=(404,)
    ),
    ("GET", "/v1/organizations/api_keys/{api_key_id}"): Row("read:api_keys"),
    ("POST", "/v1/organizations/api_keys/{api_key_id}"): Row("write:api_keys"),
    ("POST", "/v1/organizations/api_keys/{api_key_id}/rotate"): Row("write:api_keys"),
    ("GET", "/v1/organizations/environment_keys"): Row("read:api_keys"),
    ("POST", "/v1/organizations/environment_keys"): Row(
        "write:api_keys", lambda t: {"environment_id": t["environment_id"]}, answer=(404,)
    ),
    ("GET", "/v1/organizations/environment_keys/{environment_key_id}"): Row("read:api_keys"),
    ("DELETE", "/v1/organizations/environment_keys/{environment_key_id}"): Row("write:api_keys"),
    ("GET", "/v1/organizations/users"): Row("read:members"),
    ("POST", "/v1/organizations/users"): Row(
        "write:members", lambda _: {"email": "ann@example.com", "role": "viewer"}, answer=(200, 409)
    ),
    ("GET", "/v1/organizations/users/{user_id}"): Row("read:members"),
    ("POST", "/v1/organizations/users/{user_id}"): Row("write:members", lambda _: {"role": "viewer"}),
    ("DELETE", "/v1/organizations/users/{user_id}"): Row("write:members"),
    ("GET", "/v1/organizations/invites"): Row("read:members"),
    ("POST", "/v1/organizations/invites"): Row(
        "write:members", lambda _: {"email": "bob@example.com", "role": "viewer"}, answer=(200, 409)
    ),
    ("POST", "/v1/organizations/invites/accept"): Row("open", lambda _: {"token": "wrong"}, answer=(404,)),
    ("GET", "/v1/organizations/invites/{invite_id}"): Row("read:members"),
    ("DELETE", "/v1/organizations/invites/{invite_id}"): Row("write:members"),
    ("GET", "/v1/organizations/workspaces"): Row("read:workspaces"),
    ("POST", "/v1/organizations/workspaces"): Row("write:workspaces", lambda _: {"name": "x"}),
    ("GET", "/v1/organizations/workspaces/{workspace_id}"): Row("read:workspaces"),
    ("POST", "/v1/organizations/workspaces/{workspace_id}"): Row("write:workspaces", lambda _: {"name": "x"}),
    ("POST", "/v1/organizations/workspaces/{workspace_id}/archive"): Row("write:workspaces"),
    ("GET", "/v1/organizations/workspaces/{workspace_id}/members"): Row("read:workspaces"),
    ("POST", "/v1/organizations/workspaces/{workspace_id}/members"): Row(
        "write:workspaces", lambda t: {"user_id": t["user_id"], "workspace_role": "workspace_user"}
    ),
    ("GET", "/v1/organizations/workspaces/{workspace_id}/members/{user_id}"): Row("read:workspaces"),
    ("POST", "/v1/organizations/workspaces/{workspace_id}/members/{user_id}"): Row(
        "write:workspaces", lambda _: {"workspace_role": "workspace_user"}
    ),
    ("DELETE", "/v1/organizations/workspaces/{workspace_id}/members/{user_id}"): Row("write:workspaces"),
    ("GET", "/v1/organizations/credentials"): Row("read:credentials"),
    ("POST", "/v1/organizations/credentials"): Row(
        "write:credentials",
        lambda t: {
            "kind": "api_key",
            "name": "x",
            "secret": {"api_key": "sk-ant-x"},
            "workspace_id": t["workspace_id"],
        },
        answer=(404,),
    ),
    ("GET", "/v1/organizations/credentials/{credential_id}"): Row("read:credentials"),
    ("POST", "/v1/organizations/credentials/{credential_id}"): Row("write:credentials"),
    ("DELETE", "/v1/organizations/credentials/{credential_id}"): Row("write:credentials"),
    ("POST", "/v1/organizations/credentials/{credential_id}/test"): Row("write:credentials"),
    ("GET", "/v1/organizations/rate_limits"): Row("read:limits"),
    ("GET", "/v1/organizations/workspaces/{workspace_id}/rate_limits"): Row("read:limits"),
    ("POST", "/v1/organizations/workspaces/{workspace_id}/rate_limits/{rate_limit_id}"): Row(
        "write:limits", lambda _: {"limits": [{"type": "requests_per_minute", "value": 1}]}
    ),
    ("GET", "/v1/organizations/limits"): Row("read:limits"),
    ("GET", "/v1/organizations/limits/{scope}/{subject_id}"): Row("read:limits"),
    ("POST", "/v1/organizations/limits/{scope}/{subject_id}"): Row(
        "write:limits", lambda _: {"limits": {"requests": 1}}
    ),
    ("GET", "/v1/organizations/budgets"): Row("read:budgets"),
    ("POST", "/v1/organizations/budgets"): Row(
        "write:budgets",
        lambda t: {"scope": "workspace", "subject_id": t["workspace_id"], "cap_micros": 1},
        answer=(404,),
    ),
    ("GET", "/v1/organizations/budgets/{budget_id}"): Row("read:budgets"),
    ("POST", "/v1/organizations/budgets/{budget_id}"): Row("write:budgets"),
    ("DELETE", "/v1/organizations/budgets/{budget_id}"): Row("write:budgets"),
    ("GET", "/v1/organizations/spend_limits"): Row("read:budgets"),
    ("POST", "/v1/organizations/spend_limits"): Row(
        "write:budgets",
        lambda t: {"amount": "1", "scope": {"type": "workspace", "workspace_id": t["workspace_id"]}},
        answer=(404,),
    ),
    ("GET", "/v1/organizations/spend_limits/effective"): Row("read:budgets"),
    ("GET", "/v1/organizations/spend_limits/{spend_limit_id}"): Row("read:budgets"),
    ("DELETE", "/v1/organizations/spend_limits/{spend_limit_id}"): Row("write:budgets"),
    ("GET", "/v1/organizations/usage_report/messages"): Row("read:usage", query=_REPORT),
    ("GET", "/v1/organizations/analytics/usage_report"): Row("read:usage", query=_REPORT),
    ("GET", "/v1/organizations/cost_report"): Row("read:costs", query=_REPORT),
    ("GET", "/v1/organizations/analytics/cost_report"): Row("read:costs", query=_REPORT),
    ("GET", "/v1/organizations/analytics/usage"): Row("read:usage", query=_REPORT),
    ("GET", "/v1/organizations/analytics/cost"): Row("read:costs", query=_REPORT),
    ("GET", "/v1/organizations/usage/export"): Row("read:usage", query=_REPORT),
    ("GET", "/v1/organizations/{organization_id}"): Row("read:organization"),
    ("POST", "/v1/organizations/{organization_id}"): Row("write:organization", lambda _: {"name": "Theirs"}),
    ("DELETE", "/v1/organizations/{organization_id}"): Row("delete:organization"),
    ("POST", "/v1/organizations/{organization_id}/restore"): Row("operate:server"),
    ("POST", "/v1/organizations/{organization_id}/purge"): Row("operate:server"),
    ("POST", "/v1/agents"): Row("write:agents", lambda _: {"model": "claude-sonnet-5-5", "name": "x"}),
    ("GET", "/v1/agents"): Row("read:agents"),
    ("GET", "/v1/agents/{agent_id}"): Row("read:agents"),
    ("POST", "/v1/agents/{agent_id}"): Row("write:agents"),
    ("POST", "/v1/agents/{agent_id}/archive"): Row("write:agents"),
    ("GET", "/v1/agents/{agent_id}/versions"): Row("read:agents"),
    ("POST", "/v1/environments"): Row("write:agents", lambda _: {"name": "x"}, answer=(200, 409)),
    ("GET", "/v1/environments"): Row("read:agents"),
    ("GET", "/v1/environments/{environment_id}"): Row("read:agents"),
    ("POST", "/v1/environments/{environment_id}"): Row("write:agents"),
    ("DELETE", "/v1/environments/{environment_id}"): Row("write:agents"),
    ("POST", "/v1/environments/{environment_id}/archive"): Row("write:agents"),
    ("GET", "/v1/environments/{environment_id}/work"): Row(WORKER),
    ("GET", "/v1/environments/{environment_id}/work/poll"): Row(WORKER),
    ("GET", "/v1/environments/{environment_id}/work/stats"): Row("read:agents"),
    ("GET", "/v1/environments/{environment_id}/work/{work_id}"): Row("read:agents"),
    ("POST", "/v1/environments/{environment_id}/work/{work_id}"): Row("write:agents", lambda _: {"metadata": {}}),
    ("POST", "/v1/environments/{environment_id}/work/{work_id}/ack"): Row(WORKER),
    ("POST", "/v1/environments/{environment_id}/work/{work_id}/heartbeat"): Row(WORKER),
    ("POST", "/v1/environments/{environment_id}/work/{work_id}/stop"): Row("write:agents"),
    ("POST", "/v1/files"): Row("write:files", answer=(400,)),
    ("GET", "/v1/files"): Row("read:files"),
    ("GET", "/v1/files/{file_id}"): Row("read:files"),
    ("DELETE", "/v1/files/{file_id}"): Row("write:files"),
    ("GET", "/v1/files/{file_id}/content"): Row("read:files"),
    ("GET", "/v1/mcp/servers"): Row("read:agents"),
    ("POST", "/v1/mcp/probe"): Row("write:sessions", lambda _: {"url": "https://192.0.2.1/mcp"}),
    ("POST", "/v1/vaults"): Row("write:vaults", lambda _: {"display_name": "x"}),
    ("GET", "/v1/vaults"): Row("read:vaults"),
    ("GET", "/v1/vaults/{vault_id}"): Row("read:vaults"),
    ("POST", "/v1/vaults/{vault_id}"): Row("write:vaults"),
    ("DELETE", "/v1/vaults/{vault_id}"): Row("write:vaults"),
    ("POST", "/v1/vaults/{vault_id}/archive"): Row("write:vaults"),
    ("POST", "/v1/vaults/{vault_id}/credentials"): Row("write:vaults", lambda _: _TOOL_CREDENTIAL),
    ("GET", "/v1/vaults/{vault_id}/credentials"): Row("read:vaults"),
    ("GET", "/v1/vaults/{vault_id}/credentials/{credential_id}"): Row("read:vaults"),
    ("POST", "/v1/vaults/{vault_id}/credentials/{credential_id}"): Row("write:vaults"),
    ("DELETE", "/v1/vaults/{vault_id}/credentials/{credential_id}"): Row("write:vaults"),
    ("POST", "/v1/vaults/{vault_id}/credentials/{credential_id}/archive"): Row("write:vaults"),
    ("POST", "/v1/vaults/{vault_id}/credentials/{credential_id}/mcp_oauth_validate"): Row("write:vaults"),
    ("POST", "/v1/skills"): Row("write:agents", answer=(400,)),
    ("GET", "/v1/skills"): Row("read:agents"),
    ("GET", "/v1/skills/{skill_id}"): Row("read:agents"),
    ("DELETE", "/v1/skills/{skill_id}"): Row("write:agents"),
    ("POST", "/v1/skills/{skill_id}/versions"): Row("write:agents", answer=(400,)),
    ("GET", "/v1/skills/{skill_id}/versions"): Row("read:agents"),
    ("GET", "/v1/skills/{skill_id}/versions/{version}"): Row("read:agents"),
    ("DELETE", "/v1/skills/{skill_id}/versions/{version}"): Row("write:agents"),
    ("GET", "/v1/skills/{skill_id}/versions/{version}/content"): Row("read:agents"),
    ("POST", "/v1/memory_stores"): Row("write:agents", lambda _: {"name": "x"}),
    ("GET", "/v1/memory_stores"): Row("read:agents"),
    ("GET", "/v1/memory_stores/{store_id}"): Row("read:agents"),
    ("POST", "/v1/memory_stores/{store_id}"): Row("write:agents"),
    ("DELETE", "/v1/memory_stores/{store_id}"): Row("write:agents"),
    ("POST", "/v1/memory_stores/{store_id}/archive"): Row("write:agents"),
    ("POST", "/v1/memory_stores/{store_id}/memories"): Row("write:agents", lambda _: {"path": "/a.md", "content": "x"}),
    ("GET", "/v1/memory_stores/{store_id}/memories"): Row("read:agents"),
    ("GET", "/v1/memory_stores/{store_id}/memories/{memory_id}"): Row("read:agents"),
    ("POST", "/v1/memory_stores/{store_id}/memories/{memory_id}"): Row("write:agents"),
    ("DELETE", "/v1/memory_stores/{store_id}/memories/{memory_id}"): Row("write:agents"),
    ("GET", "/v1/memory_stores/{store_id}/memory_versions"): Row("read:agents"),
    ("GET", "/v1/memory_stores/{store_id}/memory_versions/{version_id}"): Row("read:agents"),
    ("POST", "/v1/memory_stores/{store_id}/memory_versions/{version_id}/redact"): Row("write:agents"),
    ("POST", "/v1/sessions"): Row(
        "write:sessions", lambda t: {"agent": t["agent_id"], "environment_id": t["environment_id"]}, answer=(404,)
    ),
    ("GET", "/v1/sessions"): Row("read:sessions"),
    ("GET", "/v1/sessions/{session_id}"): Row("read:sessions"),
    ("POST", "/v1/sessions/{session_id}"): Row("write:sessions"),
    ("DELETE", "/v1/sessions/{session_id}"): Row("write:sessions"),
    ("POST", "/v1/sessions/{session_id}/archive"): Row("write:sessions"),
    ("GET", "/v1/sessions/{session_id}/resources"): Row("read:sessions"),
    ("POST", "/v1/sessions/{session_id}/resources"): Row(
        "write:sessions", lambda t: {"type": "file", "file_id": t["file_id"]}
    ),
    ("GET", "/v1/sessions/{session_id}/resources/{resource_id}"): Row("read:sessions"),
    ("POST", "/v1/sessions/{session_id}/resources/{resource_id}"): Row(
        "write:sessions", lambda _: {"authorization_token": "x"}, answer=(404, 409)
    ),
    ("DELETE", "/v1/sessions/{session_id}/resources/{resource_id}"): Row("write:sessions"),
    ("POST", "/v1/sessions/{session_id}/events"): Row("write:sessions", lambda _: _EVENTS),
    ("GET", "/v1/sessions/{session_id}/events"): Row("read:sessions"),
    ("GET", "/v1/sessions/{session_id}/events/stream"): Row("read:sessions"),
    ("GET", "/v1/sessions/{session_id}/stream"): Row("read:sessions"),
    ("GET", "/v1/sessions/{session_id}/threads"): Row("read:sessions"),
    ("GET", "/v1/sessions/{session_id}/threads/{thread_id}"): Row("read:sessions"),
    ("POST", "/v1/sessions/{session_id}/threads/{thread_id}/archive"): Row("write:sessions"),
    ("GET", "/v1/sessions/{session_id}/threads/{thread_id}/events"): Row("read:sessions"),
    ("GET", "/v1/sessions/{session_id}/threads/{thread_id}/stream"): Row("read:sessions"),
}
