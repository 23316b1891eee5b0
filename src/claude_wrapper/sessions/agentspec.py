"""What a session's agent means for its process: tools, prompts, servers, and the policy that decides each call. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from claude_wrapper.agent.launch import CHAT, CHAT_OAUTH, Auth, agent_profile
from claude_wrapper.errors import PermissionDenied
from claude_wrapper.sandbox.security import SecurityPolicy
from claude_wrapper.sessions.mcpservers import cli_tool, servers_of, shown_names
from claude_wrapper.sessions.resources.tools import CUSTOM, built_in_policies, mcp_policy
from claude_wrapper.sessions.selfhosted.tools import WORKER_TOOLS, worker_tools
from claude_wrapper.sessions.spec import ConversationSpec
from claude_wrapper.wire.managed_tools import CLIENT_PREFIX, SANDBOX_PREFIX, TO_CLI

ALLOW: Final = "allow"
ASK: Final = "ask"
DENY: Final = "deny"
_PLAIN_EFFORT: Final = "high"
"""What the model API does when no effort is named: then nothing is sent, for models that know none."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A process's set-up and the policy of its calls."""

    spec: ConversationSpec
    model: str
    system: list[dict[str, Any]] | None
    overrides: Mapping[str, Any]
    turn_seconds: float
    """Longest turn at the organisation's security level."""
    decide: Callable[[str, Any], str] = field(repr=False)
    """(tool as the CLI names it, input) → allow, ask or deny."""


def policy_of(agent: Mapping[str, Any]) -> Callable[[str, Any], str]:
    """What the agent's permission policies say of a call."""
    tools = agent.get("tools") or ()
    built_in = {TO_CLI[name]: policy for name, policy in built_in_policies(tools).items()}
    servers = shown_names(agent)
    described = agent.get("id") is not None

    def decide(name: str, tool_input: Any) -> str:
        del tool_input
        if name.startswith(CLIENT_PREFIX):
            return ALLOW
        if name.startswith(SANDBOX_PREFIX):
            policy = built_in.get(TO_CLI.get(name.removeprefix(SANDBOX_PREFIX), ""))
        elif name.startswith("mcp__"):
            if not described:
                return ALLOW  # what a Messages caller sent with its request is what it wants to be used
            server, _, tool = name.removeprefix("mcp__").partition("__")
            policy = mcp_policy(tools, servers.get(server, server), tool, same=_same_tool)
        else:
            policy = built_in.get(name)
            if policy is None and not built_in:
                return ALLOW  # an agent that is not described by toolsets: the server's own policy decides
        if policy is None or not policy.enabled:
            return DENY
        return ASK if policy.policy == "always_ask" else ALLOW

    return decide


def _same_tool(named: str, called: str) -> bool:
    return cli_tool(named) == cli_tool(called)


def setup(
    agent: Mapping[str, Any],
    security: SecurityPolicy,
    *,
    oauth: bool,
    aliases: Mapping[str, str],
    vault_ids: tuple[str, ...] = (),
    environment: Mapping[str, Any] | None = None,
    self_hosted: bool = False,
) -> Setup:
    """Raises PermissionDenied when the agent has a tool that this server's security level excludes.

    `self_hosted`: the tools that touch files and run commands are the worker's, and no such tool is in the process.
    """
    entries = agent.get("tools") or ()
    decide = policy_of(agent)
    enabled = {TO_CLI[name] for name, policy in built_in_policies(entries).items() if policy.enabled}
    if self_hosted:
        enabled -= {TO_CLI[name] for name in WORKER_TOOLS}
    elsewhere = worker_tools(entries) if self_hosted else ()
    if enabled and not security.tools and not elsewhere:
        why = "; ".join(security.lowered) or f"the security level {security.level} excludes it"
        raise PermissionDenied(f"agent.tools: built-in tools are not allowed: {why}")
    # What the level excludes is not offered to the model: the other tools stay useful.
    tools = tuple(sorted(enabled & set(security.tools)))
    servers = servers_of(agent, vault_ids, environment)
    asked = {name for name in tools if decide(name, None) == ASK} | {f"mcp__{name}" for name in servers}
    prompt = agent.get("system")
    system = [{"type": "text", "text": prompt}] if prompt else None
    chat = not tools
    profile = agent_profile(tools, Auth.OAUTH if oauth else Auth.API_KEY, security=security.level.value)
    spec = ConversationSpec(
        profile=(CHAT_OAUTH if oauth else CHAT) if chat else profile,
        allowed_tools=frozenset(tools),
        asked_tools=frozenset(asked),
        system=tuple(system) if system and chat and oauth else None,
        append_system_prompt=prompt if prompt and not chat else None,
        remote_servers=servers,
        client_tools=tuple(
            {"name": one["name"], "description": one.get("description", ""), "input_schema": one["input_schema"]}
            for one in entries
            if one.get("type") == CUSTOM
        ),
        worker_tools=elsewhere,
    )
    model = agent["model"]
    effort = (model.get("effort") or {}).get("type", _PLAIN_EFFORT)
    overrides = {} if oauth or effort == _PLAIN_EFFORT else {"output_config": {"effort": effort}}
    name = str(model["id"])
    return Setup(
        spec,
        aliases.get(name, name),
        system if chat and not oauth else None,
        overrides,
        security.limits.turn_seconds,
        decide,
    )
