"""MCP servers as a conversation may use them: names, which of their tools are offered, and what becomes of lists that
lie. Pure.

A server says of its tools what it likes. What reaches the CLI is bounded in number and size, has names that the model
API takes, and one name once; the rest is left out and reported.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from claude_wrapper.broker.hosts import HostRules
from claude_wrapper.sessions.resources.tools import MCP_TOOLSET
from claude_wrapper.wire.extensions import RESERVED_MCP_NAMES

MAX_TOOLS: Final = 256
"""Tools of one server, as many as an agent may have in all."""
MAX_TOOL_BYTES: Final = 64 * 1024
MAX_LIST_BYTES: Final = 1024 * 1024
MAX_DESCRIPTION: Final = 8 * 1024
MAX_DEPTH: Final = 32
HTTPS: Final = 443
_PLAIN: Final = re.compile(r"[A-Za-z0-9](?:_?[A-Za-z0-9-])*\Z")
_TOOL: Final = re.compile(r"[A-Za-z0-9_./-]{1,72}\Z")
_NOT_CLI: Final = re.compile(r"[^A-Za-z0-9_-]")
_HINTS: Final = ("readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint")


@dataclass(frozen=True, slots=True)
class ToolRules:
    """Which tools of a server are offered, and whose results may be kept."""

    default: bool = True
    """For tools that are not named."""
    named: Mapping[str, bool] = field(default_factory=dict)
    kept_seconds: Mapping[str, float] = field(default_factory=dict)
    """Tools whose results may be used again, and for how long."""

    def allows(self, tool: str) -> bool:
        """Whether a tool is offered. Names are compared as the CLI writes them, too."""
        if tool in self.named:
            return self.named[tool]
        return next((on for name, on in self.named.items() if cli_tool(name) == cli_tool(tool)), self.default)


@dataclass(frozen=True, slots=True)
class RemoteSpec:
    """A remote server of a conversation."""

    name: str
    """As its owner calls it."""
    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    vault_ids: tuple[str, ...] = ()
    rules: ToolRules = field(default_factory=ToolRules)
    legacy: bool = False
    """Speaks the SSE transport of 2024-11-05."""
    known: bool = False
    """Belongs to an agent or session, and is shown among its owner's servers."""
    barred: bool = False
    """The session's environment does not let its agent use it."""


@dataclass(frozen=True, slots=True)
class Offered:
    """What is left of a server's list."""

    tools: tuple[dict[str, Any], ...]
    dropped: Mapping[str, int]
    """Reason → how many were left out."""


def cli_names(names: Iterable[str]) -> dict[str, str]:
    """Server name → the name that the CLI is told: such that `mcp__NAME__TOOL` can be taken apart, and no reserved one.

    A name that does not fit gets a readable part and a few digits of its hash.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = name
        if not _PLAIN.match(name) or len(name) > 48 or name in RESERVED_MCP_NAMES:
            words = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:32] or "server"
            plain = f"{words}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        found[name] = plain
    return found


def cli_tool(name: str) -> str:
    """A tool's name as the CLI writes it behind `mcp__SERVER__`."""
    return _NOT_CLI.sub("_", name)


def rules_of(entry: Mapping[str, Any] | None) -> ToolRules:
    """The rules of a resolved `mcp_toolset`; None: there is none, and nothing is offered."""
    if entry is None:
        return ToolRules(default=False)
    configs = entry["configs"]
    return ToolRules(
        default=bool(entry["default_config"]["enabled"]),
        named={config["name"]: bool(config["enabled"]) for config in configs},
        kept_seconds={one["name"]: float(one["cache_ttl_seconds"]) for one in configs if one.get("cache_ttl_seconds")},
    )


def servers_of(
    agent: Mapping[str, Any], vault_ids: Sequence[str], environment: Mapping[str, Any] | None = None
) -> dict[str, RemoteSpec]:
    """The servers of an agent in an environment (its `config`), by the names that the CLI is told."""
    toolsets = {one["mcp_server_name"]: one for one in agent.get("tools") or () if one.get("type") == MCP_TOOLSET}
    servers = {one["name"]: one["url"] for one in agent.get("mcp_servers") or ()}
    found: dict[str, RemoteSpec] = {}
    for name, cli in cli_names(servers).items():
        rules, barred = rules_of(toolsets.get(name)), not _reachable(servers[name], environment or {})
        found[cli] = RemoteSpec(name, servers[name], {}, tuple(vault_ids), rules, known=True, barred=barred)
    return found


def _reachable(url: str, environment: Mapping[str, Any]) -> bool:
    """Whether an environment lets its agents use this server: limited networking names hosts, or allows all servers."""
    networking = environment.get("networking") or {}
    if networking.get("type") != "limited" or networking.get("allow_mcp_servers"):
        return True
    host = (urlsplit(url).hostname or "").lower()
    return HostRules.parse(networking.get("allowed_hosts") or ()).allows(host, HTTPS)


def shown_names(agent: Mapping[str, Any]) -> dict[str, str]:
    """The CLI's name of each server of an agent → the agent's own name for it."""
    return {cli: name for name, cli in cli_names(one["name"] for one in agent.get("mcp_servers") or ()).items()}


def offered(tools: Any, rules: ToolRules, *, room: int = MAX_TOOLS) -> Offered:
    """The tools of a `tools/list` result that the CLI is shown."""
    kept: list[dict[str, Any]] = []
    dropped: dict[str, int] = {}
    names: set[str] = set()
    size = 0
    for tool in tools if isinstance(tools, list) else ():
        made, reason = _tool(tool)
        if made is not None and not rules.allows(made["name"]):
            continue  # as configured: no news
        if made is not None and cli_tool(made["name"]) in names:
            made, reason = None, "name_twice"
        if made is not None:
            size += len(msgspec.json.encode(made))
            if len(kept) >= room or size > MAX_LIST_BYTES:
                made, reason = None, "too_many"
        if made is None:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        names.add(cli_tool(made["name"]))
        kept.append(made)
    return Offered(tuple(kept), dropped)


def _tool(tool: Any) -> tuple[dict[str, Any] | None, str]:
    """The parts of a tool that the CLI needs; else why it is left out."""
    if not isinstance(tool, Mapping):
        return None, "not_an_object"
    name, schema = tool.get("name"), tool.get("inputSchema")
    if not isinstance(name, str) or not _TOOL.match(name):
        return None, "bad_name"
    if not isinstance(schema, Mapping) or schema.get("type") != "object" or _deeper(schema, MAX_DEPTH):
        return None, "bad_schema"
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not all(isinstance(one, Mapping | bool) for one in properties.values()):
        return None, "bad_schema"
    if not isinstance(required, list) or not all(isinstance(one, str) for one in required):
        return None, "bad_schema"
    made: dict[str, Any] = {"name": name, "inputSchema": dict(schema)}
    for words in ("title", "description"):
        if isinstance(text := tool.get(words), str):
            made[words] = text[:MAX_DESCRIPTION]
    hints = tool.get("annotations")
    if isinstance(hints, Mapping):
        made["annotations"] = {hint: hints[hint] for hint in _HINTS if isinstance(hints.get(hint), bool)}
    if len(msgspec.json.encode(made)) > MAX_TOOL_BYTES:
        return None, "too_large"
    return made, ""


def _deeper(value: Any, room: int) -> bool:
    """Whether a JSON value is nested more than `room` levels. Goes no deeper than that itself."""
    if not isinstance(value, Mapping | list):
        return False
    if room == 0:
        return True
    return any(_deeper(one, room - 1) for one in (value.values() if isinstance(value, Mapping) else value))
