"""Every route × every role × the other organisation's ids, none forgotten."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from admin_world import Admin
from routes_table import NEEDS, WORKER, Row
from starlette.routing import BaseRoute, Mount, Route

from claude_wrapper.api.admin import TABLE
from claude_wrapper.tenancy.scopes import ALL_SCOPES, Role, scopes_of

pytestmark = pytest.mark.anyio

DOCUMENTS = {"/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"}
ROLES = [str(role) for role in Role]
WORKERS = ["environment key", "sessions token"]
ACTORS = [*ROLES, *WORKERS, "none", "stranger", "operator"]


def walk(routes: list[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every (method, path) that the application answers, whoever added it."""
    for route in routes:
        if isinstance(route, Mount):
            yield from walk(list(route.routes), prefix + route.path)
        elif isinstance(route, Route) and route.path not in DOCUMENTS:
            yield from ((method, prefix + route.path) for method in sorted((route.methods or set()) - {"HEAD"}))


async def test_every_route_has_a_row_and_every_row_a_route(admin: Admin) -> None:
    present = set(walk(admin.server.server.app.routes))
    assert sorted(present - NEEDS.keys()) == [], "say in routes_table.py what these need"
    assert sorted(NEEDS.keys() - present) == [], "these routes are gone: remove their rows"


def test_what_a_row_says_is_a_scope_and_what_the_admin_table_enforces() -> None:
    assert {row.needs for row in NEEDS.values()} - ALL_SCOPES == {"open", WORKER}
    for row in TABLE:
        assert (row.scope or "open") == NEEDS[row.method, row.path].needs, row.path


def allowed(actor: str, row: Row) -> bool:
    if row.needs == WORKER:
        return actor in WORKERS
    if row.needs == "open" or actor == "operator":
        return True
    return actor in ROLES and row.needs in scopes_of(Role(actor))


async def test_no_route_shows_or_changes_what_is_anothers(admin: Admin) -> None:
    theirs = await furnished(admin)
    keys = {role: await admin.key(role) for role in ROLES if role != "owner"} | {"owner": admin.owner}
    ours = await worked(admin, admin.owner)
    keys |= {"environment key": ours["environment_key"], "sessions token": ours["sessions_token"]}
    keys |= {"none": "", "stranger": "sk-cw-0123456789-" + "A" * 43, "operator": admin.as_operator()["key"]}
    before = await seen_by_their_owner(admin, theirs)
    wrong: list[str] = []
    asked = 0
    for (method, path), row in NEEDS.items():
        for actor in ACTORS:
            url = filled(path, theirs) + row.query
            if actor == "operator" and (
                path.startswith("/v1/messages") or path == "/v1/organizations/{organization_id}"
            ):
                continue  # the first would run a turn, the other is the operator's to change: tested elsewhere
            body = None if method in {"GET", "DELETE"} else (row.body(theirs) if row.body else {})
            status, answer = await ask(admin, method, url, body, keys[actor])
            asked += 1
            if (problem := judged(actor, path, row, status, answer, theirs)) is not None:
                wrong.append(f"{actor:9} {method:6} {path}: {status} {problem} {answer[:120]!r}")
    assert not wrong, "\n" + "\n".join(wrong)
    assert asked > 900
    assert await seen_by_their_owner(admin, theirs) == before, "something of theirs was changed"


def judged(  # noqa: PLR0917
    actor: str, path: str, row: Row, status: int, answer: bytes, theirs: dict[str, str]
) -> str | None:
    """What is wrong with an answer, or None."""
    code = code_of(answer)
    if status >= 500:
        return "the server failed"
    if actor in WORKERS and row.needs != "open":
        return None if status in {403, 404} else "expected a refusal"
    if row.needs != "open" and actor in {"none", "stranger"}:
        return None if status == 401 else "expected 401"
    if not allowed(actor, row):
        return None if status == 403 and code == "permission_denied" else "expected 403 permission_denied"
    if code == "permission_denied" and row.needs != "open":
        return "is refused although the role holds the scope"
    if 200 <= status < 300 and actor != "operator":
        leaked = [kind for kind, ident in theirs.items() if len(ident) > 12 and ident.encode() in answer]
        if leaked:
            return f"shows the other organisation's {leaked}"
    expected = row.answer or ((404,) if "{" in path else range(200, 300))
    if actor == "operator" and (row.answer == (403,) or path.startswith("/v1/organizations/{organization_id}")):
        return None  # has a credential of its own; may act on organisations
    return None if status in expected else f"expected {list(expected)[:3]}"


def code_of(answer: bytes) -> str | None:
    try:
        return str(json.loads(answer)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return None


async def ask(admin: Admin, method: str, url: str, body: Any, key: str) -> tuple[int, bytes]:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    async with (
        aiohttp.ClientSession(admin.server.url) as http,
        http.request(
            method, url, data=None if body is None else json.dumps(body).encode(), headers=headers
        ) as response,
    ):
        return response.status, await response.read() if response.content_type != "text/event-stream" else b""


def filled(path: str, theirs: dict[str, str]) -> str:
    """The path with the other organisation's ids in it."""
    special = {
        "scope": "workspace",
        "subject_id": theirs["workspace_id"],
        "version": "skillver_00000000000000000000000000",
        "model": "claude-sonnet-5-5",
    }
    return re.sub(r"{(\w+)(?::\w+)?}", lambda name: {**theirs, **special}.get(name[1], "x_unknown"), path)


async def furnished(admin: Admin) -> dict[str, str]:
    """The other organisation has one of everything; their ids by the name that paths give them."""
    key = admin.their_owner

    async def make(path: str, body: dict[str, Any]) -> str:
        made = await admin.post(path, body, key=key)
        assert made.status == 200, (path, made.body)
        return str(made.body["id"])

    ids = {"organization_id": admin.theirs}
    ids["workspace_id"] = await make("/workspaces", {"name": "Secret"})
    ids["api_key_id"] = await make("/api_keys", {"name": "secret", "workspace_id": ids["workspace_id"]})
    ids["user_id"] = await make("/users", {"email": "eve@example.com", "role": "developer"})
    ids["invite_id"] = await make("/invites", {"email": "mallory@example.com", "role": "viewer"})
    secret = {"kind": "api_key", "name": "theirs", "secret": {"api_key": "sk-ant-theirs"}}
    ids["credential_id"] = await make("/credentials", secret)
    ids["budget_id"] = await make("/budgets", {"scope": "organization", "cap_micros": 10**9})
    ids["spend_limit_id"] = ids["budget_id"]
    ids["rate_limit_id"] = f"rlim_{admin.theirs.partition('_')[2]}"
    member = {"user_id": ids["user_id"], "workspace_role": "workspace_user"}
    await admin.post(f"/workspaces/{ids['workspace_id']}/members", member, key=key)
    ids["agent_id"] = await make("/v1/agents", {"model": "claude-sonnet-5-5", "name": "theirs"})
    worked_on = await worked(admin, key)
    ids |= {name: worked_on[name] for name in ("environment_id", "environment_key_id", "work_id", "session_id")}
    ids["vault_id"] = await make("/v1/vaults", {"display_name": "theirs"})
    ids["store_id"] = await make("/v1/memory_stores", {"name": "theirs"})
    memory = {"path": "/secret.md", "content": "theirs"}
    ids["memory_id"] = await make(f"/v1/memory_stores/{ids['store_id']}/memories", memory)
    ids["file_id"] = await uploaded(admin)
    return ids


async def worked(admin: Admin, key: str, *, agent: Any = (), resources: Any = ()) -> dict[str, str]:
    """A self-hosted environment with a key, and a session that a worker holds; ids, and the worker's credentials."""
    environment = (await admin.post("/v1/environments", {"name": "x", "config": {"type": "self_hosted"}}, key=key)).body
    made = (await admin.post("/environment_keys", {"environment_id": environment["id"]}, key=key)).body
    described = {"model": "claude-sonnet-5-5", "name": "x", **dict(agent)}
    made_agent = (await admin.post("/v1/agents", described, key=key)).body
    new = {"agent": made_agent["id"], "environment_id": environment["id"], "resources": list(resources)}
    session = (await admin.post("/v1/sessions", new, key=key)).body
    work = (await admin.get(f"/v1/environments/{environment['id']}/work/poll", key=made["secret"])).body
    acked = await admin.post(f"/v1/environments/{environment['id']}/work/{work['id']}/ack", key=made["secret"])
    assert acked.body["state"] == "starting", acked.body
    assert work["data"] == {"type": "session", "id": session["id"]}
    token = json.loads(base64.urlsafe_b64decode(work["secret"]))["sessions_token"]
    return {
        "environment_id": environment["id"],
        "environment_key_id": made["id"],
        "environment_key": made["secret"],
        "work_id": work["id"],
        "session_id": session["id"],
        "sessions_token": token,
    }


async def uploaded(admin: Admin) -> str:
    """A file of theirs."""
    form = aiohttp.FormData()
    form.add_field("file", b"theirs", filename="secret.txt", content_type="text/plain")
    headers = {"authorization": f"Bearer {admin.their_owner}"}
    async with admin.server.http.post("/v1/files", data=form, headers=headers) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return str(answer["id"])


async def seen_by_their_owner(admin: Admin, theirs: dict[str, str]) -> list[Any]:
    """What the other organisation looks like to its owner."""
    paths = ("/me", "/workspaces", "/users", "/invites", "/credentials", "/budgets", "/limits")
    paths += (f"/workspaces/{theirs['workspace_id']}/members", "/v1/agents", "/v1/environments", "/v1/vaults")
    paths += ("/v1/files", f"/v1/memory_stores/{theirs['store_id']}/memories")
    found = [(await admin.get(path, key=admin.their_owner)).body for path in paths]
    keys = (await admin.get("/api_keys", key=admin.their_owner)).body["data"]
    sessions = (await admin.get("/v1/sessions", key=admin.their_owner)).body["data"]
    moving = {"last_used_at", "stats"}
    return [*found, *({name: value for name, value in one.items() if name not in moving} for one in (*keys, *sessions))]
