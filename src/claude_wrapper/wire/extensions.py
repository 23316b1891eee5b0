"""Our own fields of a Messages request: `agent`, `session_id`, `mcp_servers` (two forms) and `oauth_credentials`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import msgspec

from claude_wrapper.errors import InvalidRequest

MAX_MCP_SERVERS = 20  # as many as the Messages API takes
MAX_CACHE_SECONDS = 86_400
"""How long a result of an MCP tool may be used again at most (`cache_ttl_seconds`, our extension)."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}\Z")
_REMOTE: Mapping[str, Literal["http", "sse"]] = {"http": "http", "sse": "sse"}
RESERVED_MCP_NAMES = frozenset({"client", "sandbox", "claude_code"})
"""Servers of this server's own: tools that the API client runs (see `merge`) or its worker does, and the CLI itself."""


class AgentOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`agent`: ask for agent behaviour instead of that of a plain model."""

    tools: Literal["none", "default"] | list[str] = "default"
    """Built-in tools: none, the CLI's default set, or these."""
    permission_mode: Literal["default", "acceptEdits", "plan", "dontAsk", "auto", "bypassPermissions"] | None = None
    append_system_prompt: str | None = None
    max_turns: Annotated[int, msgspec.Meta(ge=1)] | None = None
    on_disconnect: Literal["interrupt", "continue"] | None = None
    """None: the endpoint's own default."""


class OAuthCredentials(msgspec.Struct, frozen=True):
    """`oauth_credentials`: a caller's own subscription token, as the original system took it."""

    access_token: Annotated[str, msgspec.Meta(min_length=1)]
    refresh_token: str | None = None
    expires_at: int | float | str | None = None
    """Seconds or milliseconds since 1970, or RFC 3339; not interpreted here."""

    def __repr__(self) -> str:
        return f"OAuthCredentials(expires_at={self.expires_at!r})"


@dataclass(frozen=True, slots=True)
class McpServer:
    """One MCP server, whichever form named it."""

    name: str
    transport: Literal["stdio", "http", "sse"]
    command: str | None = None
    args: tuple[str, ...] = field(default=(), repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    enabled: bool = True
    allowed_tools: tuple[str, ...] | None = None
    """None: all of them."""
    cache_ttl_seconds: Mapping[str, int] = field(default_factory=dict)
    """Tools whose results may be used again, and for how long."""

    @property
    def local(self) -> bool:
        """Whether it is a command that runs beside the agent."""
        return self.transport == "stdio"

    def to_cli(self) -> dict[str, Any]:
        """The value that the CLI's `mcp_set_servers` takes for a local command."""
        return {"type": "stdio", "command": self.command, "args": list(self.args), "env": dict(self.env)}


def check_session_id(value: str, path: str = "session_id") -> str:
    """A name of a conversation: letters, digits and `_.:-`, so that no path, NUL or query part can hide in it."""
    if not _SESSION.match(value) or ".." in value:
        raise InvalidRequest(
            "must be 1 to 128 letters, digits, '_', '-', '.' or ':', begin with a letter or digit and not hold '..'",
            field=path,
        )
    return value


def parse_mcp_servers(value: Any, path: str = "mcp_servers") -> tuple[McpServer, ...]:
    """Both forms to one: the API's list of `{type:"url", name, url, …}` and the CLI's `{name: {command | url, …}}`.

    Raises InvalidRequest with the path of the first offending field. Names are unique.
    """
    if value is None:
        return ()
    if isinstance(value, list):
        entries = [(f"{path}[{index}]", entry) for index, entry in enumerate(value)]
        servers = tuple(_from_list(_object(entry, at), at) for at, entry in entries)
    elif isinstance(value, dict):
        servers = tuple(
            _from_map(_name(name, f"{path}.{name}"), _object(entry, f"{path}.{name}"), f"{path}.{name}")
            for name, entry in value.items()
        )
    else:
        raise InvalidRequest("must be a list of servers or an object of named servers", field=path)
    if len(servers) > MAX_MCP_SERVERS:
        raise InvalidRequest(f"holds {len(servers)} servers; at most {MAX_MCP_SERVERS} are allowed", field=path)
    names = [server.name for server in servers]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"two servers are named {twice!r}", field=path)
    return servers


def _from_list(entry: Mapping[str, Any], path: str) -> McpServer:
    name = _name(_string(entry, "name", path), f"{path}.name")
    if entry.get("type", "url") != "url":  # the CLI's kinds in a list, with their name inside
        return _from_map(name, entry, path)
    headers = _strings(entry, "headers", path)
    if token := entry.get("authorization_token"):
        if not isinstance(token, str):
            raise InvalidRequest("must be a string", field=f"{path}.authorization_token")
        headers["Authorization"] = f"Bearer {token}"
    url = _url(_string(entry, "url", path), f"{path}.url")
    return McpServer(
        name, "http", url=url, headers=check_headers(headers, f"{path}.headers"), **_tool_configuration(entry, path)
    )


def _tool_configuration(entry: Mapping[str, Any], path: str) -> dict[str, Any]:
    """`tool_configuration: {enabled?, allowed_tools?, cache_ttl_seconds?: {tool: seconds}}`; the last is ours."""
    at = f"{path}.tool_configuration"
    configuration = _object(entry.get("tool_configuration") or {}, at)
    allowed = configuration.get("allowed_tools")
    return {
        "enabled": configuration.get("enabled", True) is not False,
        "allowed_tools": None if allowed is None else _string_list(allowed, f"{at}.allowed_tools"),
        "cache_ttl_seconds": {
            tool: check_cache_seconds(seconds, f"{at}.cache_ttl_seconds.{tool}")
            for tool, seconds in _object(
                configuration.get("cache_ttl_seconds") or {}, f"{at}.cache_ttl_seconds"
            ).items()
        },
    }


def check_cache_seconds(value: Any, path: str) -> int:
    """A time to live for kept results. Raises InvalidRequest."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_CACHE_SECONDS:
        raise InvalidRequest(f"must be a whole number of seconds from 0 to {MAX_CACHE_SECONDS}", field=path)
    return value


def _from_map(name: str, entry: Mapping[str, Any], path: str) -> McpServer:
    kind = entry.get("type") or ("stdio" if "command" in entry else "http")
    if kind == "stdio":
        env = _strings(entry, "env", path)
        for variable, content in env.items():
            if not _VARIABLE.match(variable) or "\0" in content:
                raise InvalidRequest("is not a valid environment variable", field=f"{path}.env.{variable}")
        command = _string(entry, "command", path)
        args = _string_list(entry.get("args") or [], f"{path}.args")
        if any("\0" in part for part in (command, *args)):
            raise InvalidRequest("must not hold NUL", field=f"{path}.command")
        tools = _tool_configuration(entry, path)
        return McpServer(name, "stdio", command=command, args=args, env=env, **tools)
    if isinstance(kind, str) and kind in _REMOTE:
        url = _url(_string(entry, "url", path), f"{path}.url")
        headers = check_headers(_strings(entry, "headers", path), f"{path}.headers")
        return McpServer(name, _REMOTE[kind], url=url, headers=headers, **_tool_configuration(entry, path))
    raise InvalidRequest(f"is {kind!r}; must be stdio, http, sse or (in a list) url", field=f"{path}.type")


def _name(name: str, path: str) -> str:
    if not _NAME.match(name):
        raise InvalidRequest("a server's name is 1 to 64 letters, digits, '_' or '-'", field=path)
    if name in RESERVED_MCP_NAMES:
        raise InvalidRequest(f"the name {name!r} is reserved", field=path)
    return name


def _object(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest("must be an object", field=path)
    return value


def _string(entry: Mapping[str, Any], key: str, path: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise InvalidRequest("must be a non-empty string", field=f"{path}.{key}")
    return value


def _strings(entry: Mapping[str, Any], key: str, path: str) -> dict[str, str]:
    values = entry.get(key) or {}
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise InvalidRequest("must be an object of strings", field=f"{path}.{key}")
    return dict(values)


def _string_list(value: Any, path: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidRequest("must be a list of strings", field=path)
    return tuple(value)


FRAMING: Final = frozenset(
    {"host", "connection", "content-length", "content-encoding", "transfer-encoding", "accept-encoding"}
    | {"te", "trailer", "upgrade", "expect", "keep-alive", "proxy-connection", "proxy-authorization"}
)
"""Headers that say where a request ends and whom it is for. Connections are used again, for other callers too: a wrong
length would make the next one's request a part of this one."""


def check_headers(headers: dict[str, str], path: str) -> dict[str, str]:
    """Headers that can be sent. Raises InvalidRequest."""
    for name, value in headers.items():
        if name.lower() in FRAMING:
            raise InvalidRequest("is a header that the server sets itself", field=f"{path}.{name}")
        if not _HEADER.match(name) or any(mark in value for mark in "\r\n\0"):
            raise InvalidRequest("is not a valid HTTP header", field=f"{path}.{name}")
    return headers


def _url(url: str, path: str) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname)
        _ = parts.port  # raises ValueError when it is not a number
    except ValueError:
        valid = False
    if not valid or any(mark <= " " for mark in url):
        raise InvalidRequest("must be an http or https URL", field=path)
    return url
