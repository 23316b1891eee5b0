"""MCP servers of a Messages request: `mcp_servers` with `tool_configuration`, and `mcp_toolset` entries of `tools`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions.mcpservers import RemoteSpec, ToolRules, cli_names
from claude_wrapper.sessions.resources.tools import MCP_TOOLSET
from claude_wrapper.wire.extensions import McpServer, check_cache_seconds


@dataclass(frozen=True, slots=True)
class Requested:
    """The servers of a request, by the names that the CLI is told."""

    local: Mapping[str, Mapping[str, Any]]
    """As `mcp_set_servers` takes them."""
    local_rules: Mapping[str, ToolRules]
    """Of the local servers some of whose tools must not be called."""
    remote: Mapping[str, RemoteSpec]


def requested(servers: Sequence[McpServer], tools: Sequence[Mapping[str, Any]]) -> Requested:
    """Raises InvalidRequest for a toolset of a server that is not there, a second toolset, or a bad configuration."""
    names = {server.name for server in servers}
    toolsets: dict[str, ToolRules] = {}
    for index, entry in enumerate(tools):
        if entry.get("type") != MCP_TOOLSET:
            continue
        path, name = f"tools[{index}]", entry.get("mcp_server_name")
        if name not in names:
            raise InvalidRequest(f"there is no server {name!r} in mcp_servers", field=f"{path}.mcp_server_name")
        if name in toolsets:
            raise InvalidRequest("there is another toolset of this server", field=f"{path}.mcp_server_name")
        toolsets[str(name)] = _rules_of(entry, path)
    local: dict[str, Mapping[str, Any]] = {}
    rules: dict[str, ToolRules] = {}
    remote: dict[str, RemoteSpec] = {}
    told = cli_names(server.name for server in servers)
    for server in servers:
        if not server.enabled:
            continue
        own = _both(server, toolsets.get(server.name))
        if server.local:
            local[told[server.name]] = server.to_cli()
            if own.named or not own.default:
                rules[told[server.name]] = own
        else:
            legacy = server.transport == "sse"
            remote[told[server.name]] = RemoteSpec(server.name, str(server.url), server.headers, (), own, legacy)
    return Requested(local, rules, remote)


def _rules_of(entry: Mapping[str, Any], path: str) -> ToolRules:
    """An `mcp_toolset` of the Messages API: its `configs` are a map, and `defer_loading` is the CLI's own matter."""
    default, configs = entry.get("default_config") or {}, entry.get("configs") or {}
    if not isinstance(default, Mapping):
        raise InvalidRequest("must be an object", field=f"{path}.default_config")
    if not isinstance(configs, Mapping) or not all(isinstance(one, Mapping) for one in configs.values()):
        raise InvalidRequest("must be an object of objects", field=f"{path}.configs")
    on = _enabled(default, f"{path}.default_config", present=True)
    return ToolRules(
        on,
        {name: _enabled(one, f"{path}.configs.{name}", present=on) for name, one in configs.items()},
        {
            name: check_cache_seconds(one["cache_ttl_seconds"], f"{path}.configs.{name}.cache_ttl_seconds")
            for name, one in configs.items()
            if one.get("cache_ttl_seconds")
        },
    )


def _enabled(config: Mapping[str, Any], path: str, *, present: bool) -> bool:
    value = config.get("enabled", present)
    if not isinstance(value, bool):
        raise InvalidRequest("must be true or false", field=f"{path}.enabled")
    return value


def _both(server: McpServer, toolset: ToolRules | None) -> ToolRules:
    """The server's own configuration and its toolset's: a tool must be allowed by both."""
    rules = toolset or ToolRules()
    kept = {name: float(seconds) for name, seconds in server.cache_ttl_seconds.items() if seconds} | dict(
        rules.kept_seconds
    )
    if server.allowed_tools is None:
        return ToolRules(rules.default, rules.named, kept)
    return ToolRules(False, {name: rules.allows(name) for name in server.allowed_tools}, kept)
