"""The tools of an agent: three kinds of entries, checked and written out in full. Pure.

A resolved entry always says whether its tools are enabled and under which policy, so that nobody has to know defaults:
built-in tools are allowed, those of MCP servers ask (they are somebody else's).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions.resources.values import Fields, host_of, name_of, url_of
from claude_wrapper.wire.extensions import MAX_CACHE_SECONDS

AGENT_TOOLSET: Final = "agent_toolset_20260401"
MCP_TOOLSET: Final = "mcp_toolset"
CUSTOM: Final = "custom"
BUILT_IN: Final = ("bash", "read", "write", "edit", "glob", "grep", "web_fetch", "web_search")
POLICIES: Final = ("always_allow", "always_ask", "auto")
MAX_TOOLS: Final = 256
MAX_SERVERS: Final = 20
_MAX_DOMAINS: Final = 64
_CUSTOM_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")
_URL_SOURCES: Final = ("user_input", "client_tool_results", "server_tool_results")


@dataclass(frozen=True, slots=True)
class ToolPolicy:
    """What is decided for one tool."""

    enabled: bool
    policy: str
    """`always_allow`, `always_ask` or `auto`."""


def built_in_policies(tools: Sequence[Mapping[str, Any]]) -> dict[str, ToolPolicy]:
    """What resolved tools say of each built-in tool; empty without an agent toolset."""
    for entry in tools:
        if entry["type"] == AGENT_TOOLSET:
            own = {config["name"]: _policy_of(config) for config in entry["configs"]}
            return {name: own.get(name, _policy_of(entry["default_config"])) for name in BUILT_IN}
    return {}


def mcp_policy(
    tools: Sequence[Mapping[str, Any]],
    server: str,
    tool: str,
    *,
    same: Callable[[str, str], bool] = lambda named, called: named == called,
) -> ToolPolicy | None:
    """What resolved tools say of a tool of an MCP server; None if the server is not offered. `same` compares names."""
    for entry in tools:
        if entry["type"] == MCP_TOOLSET and entry["mcp_server_name"] == server:
            for config in entry["configs"]:
                if same(config["name"], tool):
                    return _policy_of(config)
            return _policy_of(entry["default_config"])
    return None


def _policy_of(config: Mapping[str, Any]) -> ToolPolicy:
    return ToolPolicy(config["enabled"], config["permission_policy"]["type"])


def resolve_servers(fields: Fields) -> list[dict[str, Any]]:
    """`mcp_servers`: at most 20, names unique."""
    servers: list[dict[str, Any]] = []
    for server in fields.objects("mcp_servers", most=MAX_SERVERS):
        server.only("type", "name", "url").one_of("type", "url")
        name = name_of(server.text("name", most=255), server.at("name"))
        if any(other["name"] == name for other in servers):
            raise InvalidRequest(f"there is another server {name!r}", field=server.at("name"))
        servers.append({"type": "url", "name": name, "url": url_of(server.data.get("url"), server.at("url"))})
    return servers


def resolve_tools(fields: Fields) -> list[dict[str, Any]]:
    """`tools`: at most 256 in all toolsets together, written out in full."""
    tools: list[dict[str, Any]] = []
    for entry in fields.objects("tools", most=MAX_TOOLS):
        kind = entry.one_of("type", AGENT_TOOLSET, MCP_TOOLSET, CUSTOM)
        resolved = _RESOLVERS[kind](entry)
        _refuse_twins(resolved, tools, entry)
        tools.append(resolved)
    if sum(_count(entry) for entry in tools) > MAX_TOOLS:
        raise InvalidRequest(
            f"at most {MAX_TOOLS} tools over all toolsets",
            field=fields.at("tools"),
            details={"error_code": "available_tools_limit_exceeded"},
        )
    return tools


def require_connected(tools: Sequence[Mapping[str, Any]], servers: Sequence[Mapping[str, Any]]) -> None:
    """Every server is offered by an `mcp_toolset`, and every `mcp_toolset` has its server."""
    names = [server["name"] for server in servers]
    used = {entry["mcp_server_name"] for entry in tools if entry["type"] == MCP_TOOLSET}
    for index, entry in enumerate(tools):
        if entry["type"] == MCP_TOOLSET and entry["mcp_server_name"] not in names:
            raise InvalidRequest(
                f"there is no server {entry['mcp_server_name']!r} in mcp_servers",
                field=f"tools[{index}].mcp_server_name",
            )
    for index, name in enumerate(names):
        if name not in used:
            raise InvalidRequest(f"no mcp_toolset in tools refers to {name!r}", field=f"mcp_servers[{index}].name")


def _refuse_twins(resolved: Mapping[str, Any], present: Sequence[Mapping[str, Any]], entry: Fields) -> None:
    for other in present:
        if resolved["type"] == other["type"] == AGENT_TOOLSET:
            raise InvalidRequest("there is another agent toolset", field=entry.path)
        if resolved["type"] == other["type"] == MCP_TOOLSET and resolved["mcp_server_name"] == other["mcp_server_name"]:
            raise InvalidRequest("there is another toolset of this server", field=entry.at("mcp_server_name"))
    twins = _names(resolved) & {name for other in present for name in _names(other)}
    for name in sorted(twins):
        raise InvalidRequest(
            f"there is another tool {name!r}", field=entry.at("name"), details={"error_code": "tool_name_conflict"}
        )


def _names(entry: Mapping[str, Any]) -> set[str]:
    """The names by which the model calls the tools of an entry; those of MCP servers have their server's prefix."""
    return {CUSTOM: {entry.get("name", "")}, AGENT_TOOLSET: set(BUILT_IN)}.get(entry["type"], set())


def _count(entry: Mapping[str, Any]) -> int:
    if entry["type"] == AGENT_TOOLSET:
        return len(BUILT_IN)
    # How many tools a server offers is not known here: those that are named count.
    return max(1, len(entry["configs"])) if entry["type"] == MCP_TOOLSET else 1


def _agent_toolset(entry: Fields) -> dict[str, Any]:
    entry.only("type", "default_config", "configs")
    default = _config(entry.maybe_object("default_config"), {"enabled": True, "permission_policy": "always_allow"})
    configs: list[dict[str, Any]] = []
    for config in entry.objects("configs", most=len(BUILT_IN)):
        name = config.one_of("name", *BUILT_IN)
        if any(other["name"] == name for other in configs):
            raise InvalidRequest(f"there is another configuration of {name!r}", field=config.at("name"))
        if config.given("type"):
            config.one_of("type", name)
        allowed = ("name", "type", "enabled", "permission_policy", *_EXTRAS.get(name, ()))
        resolved = {"type": name, "name": name, **_overridden(config.only(*allowed), default)}
        configs.append(resolved | _extras(config, name))
    return {"type": AGENT_TOOLSET, "default_config": default, "configs": configs}


_EXTRAS: Final[Mapping[str, tuple[str, ...]]] = {
    "web_fetch": ("allowed_domains", "blocked_domains", "max_content_tokens", "url_sources"),
    "web_search": ("allowed_domains", "blocked_domains", "user_location"),
}


def _extras(config: Fields, name: str) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if name not in _EXTRAS:
        return extras
    for field in ("allowed_domains", "blocked_domains"):
        if config.given(field):
            extras[field] = [_domain(member, path, name) for member, path in config.items(field, most=_MAX_DOMAINS)]
            if not extras[field]:
                raise InvalidRequest("must not be empty; omit it instead", field=config.at(field))
    if len(extras) == 2:
        raise InvalidRequest("cannot be combined with allowed_domains", field=config.at("blocked_domains"))
    if name == "web_fetch":
        tokens = config.integer("max_content_tokens", least=1, most=10_000_000)
        if tokens is not None:
            extras["max_content_tokens"] = tokens
        extras["url_sources"] = _url_sources(config)
    elif (location := config.maybe_object("user_location")) is not None:
        location.only("type", "city", "country", "region", "timezone").one_of("type", "approximate")
        parts = {part: location.maybe_text(part, most=255) for part in ("city", "country", "region", "timezone")}
        extras["user_location"] = {"type": "approximate", **parts}
    return extras


def _domain(value: Any, path: str, tool: str) -> str:
    if tool == "web_search" and isinstance(value, str):
        host, slash, rest = value.partition("/")
        return host_of(host, path, wildcard=False) + slash + rest[:1024]
    return host_of(value, path, wildcard=False)


def _url_sources(config: Fields) -> dict[str, Any] | None:
    """The object form: each source `{"type": "all" | "none"}`, or `only` and `except` with names."""
    given = config.maybe_object("url_sources")
    if given is None:
        return None
    given.only(*_URL_SOURCES)
    sources: dict[str, Any] = {}
    for name in _URL_SOURCES:
        value = given.data.get(name)
        if value is None or isinstance(value, str):
            kind = "all" if value is None else given.one_of(name, "all", "none")
            sources[name] = {"type": kind}
            continue
        source = given.object(name)
        kinds = ("all", "none") if name == "user_input" else ("all", "none", "only", "except")
        sources[name] = {**source.data, "type": source.one_of("type", *kinds)}
    return sources


def _mcp_toolset(entry: Fields) -> dict[str, Any]:
    entry.only("type", "mcp_server_name", "default_config", "configs")
    default = _config(entry.maybe_object("default_config"), {"enabled": True, "permission_policy": "always_ask"})
    configs: list[dict[str, Any]] = []
    for config in entry.objects("configs", most=MAX_TOOLS):
        name = config.only("name", "enabled", "permission_policy", "cache_ttl_seconds").text("name", most=256)
        if any(other["name"] == name for other in configs):
            raise InvalidRequest(f"there is another configuration of {name!r}", field=config.at("name"))
        kept = config.integer("cache_ttl_seconds", least=0, most=MAX_CACHE_SECONDS)
        configs.append({"name": name, **_overridden(config, default), **({"cache_ttl_seconds": kept} if kept else {})})
    server = entry.text("mcp_server_name", most=255)
    return {"type": MCP_TOOLSET, "mcp_server_name": server, "default_config": default, "configs": configs}


def _config(fields: Fields | None, default: Mapping[str, Any]) -> dict[str, Any]:
    present = {"enabled": default["enabled"], "permission_policy": {"type": default["permission_policy"]}}
    return present if fields is None else _overridden(fields.only("enabled", "permission_policy"), present)


def _overridden(fields: Fields, default: Mapping[str, Any]) -> dict[str, Any]:
    policy = fields.maybe_object("permission_policy")
    return {
        "enabled": fields.boolean("enabled", default=default["enabled"]),
        "permission_policy": {"type": policy.only("type").one_of("type", *POLICIES)}
        if policy is not None
        else dict(default["permission_policy"]),
    }


def _custom(entry: Fields) -> dict[str, Any]:
    entry.only("type", "name", "description", "input_schema")
    name = entry.text("name", most=128)
    if not _CUSTOM_NAME.match(name):
        raise InvalidRequest("must have 1 to 128 letters, digits, _ or -", field=entry.at("name"))
    schema = entry.object("input_schema")
    schema.one_of("type", "object")
    if schema.given("properties"):
        schema.object("properties")
    schema.texts("required", most=1000, longest=1000)
    description = entry.text("description", most=100_000)
    return {"type": CUSTOM, "name": name, "description": description, "input_schema": dict(schema.data)}


_RESOLVERS: Final = {AGENT_TOOLSET: _agent_toolset, MCP_TOOLSET: _mcp_toolset, CUSTOM: _custom}
