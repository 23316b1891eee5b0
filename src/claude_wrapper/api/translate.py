"""From a Messages request to a turn: what each field means for the process, the broker and the conversation.

By default a request behaves like a model: the chat profile has no built-in tools, and what the caller did not ask for
(thinking, effort) is not asked for upstream either. `agent` asks for agent behaviour within the security level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from claude_wrapper.agent.launch import CHAT, CHAT_OAUTH, Auth, LaunchProfile, agent_profile
from claude_wrapper.api.state import Deps
from claude_wrapper.broker.calls import Credential, CredentialKind
from claude_wrapper.errors import InvalidRequest, PermissionDenied
from claude_wrapper.sandbox.security import SecurityPolicy
from claude_wrapper.sessions.bridge import CLIENT_SERVER
from claude_wrapper.sessions.conversation import Conversation
from claude_wrapper.sessions.requestedmcp import requested
from claude_wrapper.sessions.resources.tools import MCP_TOOLSET
from claude_wrapper.sessions.spec import ConversationSpec, OnDisconnect, Owner, TurnInput
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.wire.extensions import AgentOptions
from claude_wrapper.wire.messages import Message, MessagesRequest

SAMPLING_REMOVED_SINCE: Final = "2026-10-21"
"""From this `anthropic-version` on, the API refuses temperature, top_p and top_k (wire reference 0.9)."""

_UNSUPPORTED: Final[Mapping[str, str]] = {
    "container": "server-side containers are not offered here; the agent has a workspace of its own",
    "diagnostics": "diagnostics are not offered here",
}
_REFUSED_BETA: Final = frozenset({"fallbacks", "compaction", "context_management"})
_PLAIN: Final[Mapping[str, Any]] = {"thinking": None, "context_management": None}
"""What the CLI asks for by itself and a plain model request does not: removed unless the caller asks for it."""


@dataclass(frozen=True, slots=True)
class Translated:
    """Who asks, and the turn."""

    principal: Principal
    owner: Owner
    turn: TurnInput
    thread: Conversation | None = None
    """The thread that the request continues."""


def turn_for(
    request: MessagesRequest,
    principal: Principal,
    credential: Credential,
    deps: Deps,
    policy: SecurityPolicy,
    *,
    api_version: str = "",
) -> Translated:
    """Raises InvalidRequest or PermissionDenied naming the field that cannot be served."""
    _refuse_unsupported(request, api_version)
    if not principal.may_use(request.model):
        raise PermissionDenied(f"model: this key may not use {request.model}")
    agent = request.agent
    oauth = credential.kind is CredentialKind.OAUTH
    tools = _built_in_tools(agent, policy)
    chat = not tools
    if any(server.local for server in request.mcp_servers) and not policy.local_mcp:
        raise PermissionDenied(f"mcp_servers: local commands are not allowed: {_why(policy)}")
    servers = requested(request.mcp_servers, request.tools or ())
    client_tools = _client_tools(request.tools or ())
    new = request.new_messages()
    spec = ConversationSpec(
        profile=_profile(tools, policy, oauth=oauth),
        permission_mode=_permission_mode(agent, policy),
        allowed_tools=frozenset(tools),
        max_turns=agent.max_turns if agent else None,
        system=None if chat and not oauth else _frozen(request.system_blocks()),
        append_system_prompt=agent.append_system_prompt if agent else None,
        json_schema=request.json_schema() if oauth else None,
        asked_tools=frozenset(f"mcp__{name}" for name in servers.local_rules),
        mcp_servers=servers.local,
        remote_servers=servers.remote,
        local_rules=servers.local_rules,
        client_tools=client_tools,
    )
    if spec.append_system_prompt is not None and chat:
        raise InvalidRequest(
            "needs built-in tools (agent.tools); use `system` otherwise", field="agent.append_system_prompt"
        )
    turn = TurnInput(
        content=_content(new),
        model=deps.settings.model_aliases.get(request.model, request.model),
        credential=credential,
        spec=spec,
        allowed_models=principal.allowed_models,
        history=request.history(),
        system=request.system_blocks() or None if chat and not oauth else None,
        overrides=_overrides(request, client_tools, chat=chat, oauth=oauth),
        max_thinking_tokens=request.thinking_budget() if oauth else None,
        on_disconnect=OnDisconnect(agent.on_disconnect) if agent and agent.on_disconnect else OnDisconnect.INTERRUPT,
        turn_seconds=deps.settings.turn_seconds or policy.limits.turn_seconds,
    )
    return Translated(principal, owner_of(principal), turn)


def pooled_turn(translated: Translated) -> Translated:
    """The original system's endpoint: one process per caller where that is possible without mixing conversations."""
    return replace(translated, turn=replace(translated.turn, reuse_idle=True))


def owner_of(principal: Principal) -> Owner:
    """Whose conversations a principal's are."""
    return Owner(
        org=principal.org,
        principal=principal.key_id or principal.user_id or principal.org,
        workspace=principal.workspace,
        key_id=principal.key_id,
        user=principal.user_id,
    )


def _refuse_unsupported(request: MessagesRequest, api_version: str) -> None:
    for name, why in _UNSUPPORTED.items():
        if getattr(request, name) is not None:
            raise InvalidRequest(why, field=name)
    for name in sorted(_REFUSED_BETA & request.extra.keys()):
        raise InvalidRequest("this beta field cannot be expressed by the agent behind this endpoint", field=name)
    if api_version >= SAMPLING_REMOVED_SINCE:
        for name in ("temperature", "top_p", "top_k"):
            if getattr(request, name) is not None:
                raise InvalidRequest(f"is not part of API version {api_version}", field=name)


def _built_in_tools(agent: AgentOptions | None, policy: SecurityPolicy) -> tuple[str, ...]:
    if agent is None or agent.tools == "none":
        return ()
    if agent.tools == "default":
        if not policy.tools:
            raise PermissionDenied(f"agent.tools: {_why(policy)}")
        return tuple(sorted(policy.tools))
    for tool in agent.tools:
        if tool not in policy.tools:
            raise PermissionDenied(f"agent.tools: {tool} is not allowed: {_why(policy)}")
    return tuple(sorted(set(agent.tools)))


def _why(policy: SecurityPolicy) -> str:
    """The policy's own words; GET /v1/security has the rest."""
    return "; ".join(policy.lowered) or f"the security level {policy.level} excludes it"


def _permission_mode(agent: AgentOptions | None, policy: SecurityPolicy) -> str:
    mode = (agent.permission_mode if agent else None) or "default"
    if mode not in policy.permission_modes:
        raise PermissionDenied(
            f"agent.permission_mode: {mode} is not allowed at this security level; "
            f"allowed: {', '.join(sorted(policy.permission_modes))}"
        )
    return mode


def _profile(tools: tuple[str, ...], policy: SecurityPolicy, *, oauth: bool) -> LaunchProfile:
    if not tools:
        return CHAT_OAUTH if oauth else CHAT
    return agent_profile(tools, Auth.OAUTH if oauth else Auth.API_KEY, security=policy.level.value)


def _client_tools(tools: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    for index, tool in enumerate(tools):
        kind = tool.get("type") or "custom"
        if kind == MCP_TOOLSET:
            continue
        if kind != "custom":
            raise InvalidRequest(
                f"{kind!r} tools cannot be offered here: only tools that you run yourself (custom), "
                "and the agent's own through `agent.tools`",
                field=f"tools[{index}].type",
            )
        if not isinstance(tool.get("input_schema"), dict):
            raise InvalidRequest("is required and must be an object", field=f"tools[{index}].input_schema")
    return tuple(tool for tool in tools if tool.get("type") != MCP_TOOLSET)


def _content(new: Sequence[Message]) -> str | list[dict[str, Any]]:
    """The new messages as one user message; a `system` one among them becomes a reminder, as the CLI writes them."""
    if len(new) == 1 and new[0].role == "user":
        return new[0].content
    blocks: list[dict[str, Any]] = []
    for message in new:
        if message.role == "system":
            text = "\n".join(str(block.get("text", "")) for block in message.blocks())
            blocks.append({"type": "text", "text": f"<system-reminder>\n{text}\n</system-reminder>"})
        else:
            blocks.extend(message.blocks())
    return blocks


def _frozen(blocks: list[dict[str, Any]]) -> tuple[dict[str, Any], ...] | None:
    return tuple(blocks) or None


def _overrides(
    request: MessagesRequest, client_tools: Sequence[Mapping[str, Any]], *, chat: bool, oauth: bool
) -> dict[str, Any]:
    given = request.overrides()
    if oauth:
        given.pop("thinking", None)  # expressed by set_max_thinking_tokens
        if (given.get("output_config") or {}).keys() <= {"format"}:
            given.pop("output_config", None)  # expressed by initialize
        if given:
            raise InvalidRequest(
                f"{', '.join(sorted(given))}: not possible with an OAuth token, whose requests are never changed; "
                "use an API key, or leave the field out",
                field=min(given),
            )
        return {}
    choice = given.get("tool_choice")
    names = {str(tool["name"]) for tool in client_tools}
    if choice and choice.get("type") == "tool":
        if choice["name"] not in names:
            raise InvalidRequest(f"there is no tool {choice['name']!r} in tools", field="tool_choice.name")
        given["tool_choice"] = {**choice, "name": f"mcp__{CLIENT_SERVER}__{choice['name']}"}
    return {**_PLAIN, **given} if chat else given
