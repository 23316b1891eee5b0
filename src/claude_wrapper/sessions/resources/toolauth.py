"""The `auth` of a credential for tools: what may be shown and what is secret, apart. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions.resources.values import Fields, host_of, time_of, url_of, wire_time

STATIC_BEARER: Final = "static_bearer"
MCP_OAUTH: Final = "mcp_oauth"
ENVIRONMENT_VARIABLE: Final = "environment_variable"
KINDS: Final = (STATIC_BEARER, MCP_OAUTH, ENVIRONMENT_VARIABLE)
MAX_SECRET: Final = 16_384
MAX_HOSTS: Final = 16
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}\Z")
# A placeholder in one of these would change how the process itself runs.
_RESERVED: Final = frozenset({"PATH", "HOME", "SHELL", "USER", "TMPDIR", "BASH_ENV", "ENV", "IFS", "NODE_OPTIONS"})
_RESERVED_PREFIXES: Final = ("ANTHROPIC_", "CLAUDE_", "LD_", "NODE_", "PYTHON")
_HEADER_SAFE: Final = re.compile(r"[\x21-\x7e]+\Z")


@dataclass(frozen=True, slots=True)
class ToolAuth:
    """A credential's `auth`, taken apart."""

    kind: str
    target: str
    """The MCP server's URL in its plain form, or the name of the variable."""
    shown: Mapping[str, Any]
    """The API's `auth` object."""
    secret: Mapping[str, str] = field(repr=False)


def new_auth(auth: Fields, now: datetime) -> ToolAuth:
    """The `auth` of a create."""
    kind = auth.one_of("type", *KINDS)
    return _NEW[kind](auth, now)


def changed_auth(auth: Fields, shown: Mapping[str, Any], secret: Mapping[str, str], now: datetime) -> ToolAuth:
    """The `auth` after an update: what is omitted stays; type, server and name cannot change."""
    kind = auth.data.get("type")
    if kind != shown["type"]:
        raise InvalidRequest(f"is {shown['type']!r} and cannot be changed", field=auth.at("type"))
    for name in ("mcp_server_url", "secret_name"):
        if auth.given(name) and auth.data[name] != shown.get(name):
            raise InvalidRequest("cannot be changed; make another credential", field=auth.at(name))
    return _CHANGED[kind](auth, shown, secret, now)


def plain_url(url: str) -> str:
    """A URL in the form by which servers are compared: lower-case host, no default port, no slash at the end."""
    parts = urlsplit(url)
    default = {"https": 443, "http": 80}[parts.scheme]
    host = (parts.hostname or "").lower()
    host = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port not in {None, default} else ""
    return urlunsplit((parts.scheme, host + port, parts.path.rstrip("/"), parts.query, ""))


def _token(fields: Fields, name: str) -> str:
    value = fields.text(name, most=MAX_SECRET)
    if not _HEADER_SAFE.match(value):
        raise InvalidRequest("must be printable ASCII without spaces", field=fields.at(name))
    return value


def _new_bearer(auth: Fields, now: datetime) -> ToolAuth:
    del now
    auth.only("type", "token", "mcp_server_url")
    url = url_of(auth.data.get("mcp_server_url"), auth.at("mcp_server_url"))
    shown = {"type": STATIC_BEARER, "mcp_server_url": url}
    return ToolAuth(STATIC_BEARER, plain_url(url), shown, {"token": _token(auth, "token")})


def _changed_bearer(auth: Fields, shown: Mapping[str, Any], secret: Mapping[str, str], now: datetime) -> ToolAuth:
    del now
    auth.only("type", "token", "mcp_server_url")
    changed = {"token": _token(auth, "token")} if auth.given("token") else secret
    return ToolAuth(STATIC_BEARER, plain_url(shown["mcp_server_url"]), shown, changed)


def _new_oauth(auth: Fields, now: datetime) -> ToolAuth:
    auth.only("type", "access_token", "mcp_server_url", "expires_at", "refresh")
    url = url_of(auth.data.get("mcp_server_url"), auth.at("mcp_server_url"))
    secret = {"access_token": _token(auth, "access_token")}
    shown: dict[str, Any] = {
        "type": MCP_OAUTH,
        "mcp_server_url": url,
        "expires_at": _expiry(auth, now),
        "refresh": None,
    }
    if (refresh := auth.maybe_object("refresh")) is not None:
        shown["refresh"] = _new_refresh(refresh, secret)
    return ToolAuth(MCP_OAUTH, plain_url(url), shown, secret)


def _new_refresh(refresh: Fields, secret: dict[str, str]) -> dict[str, Any]:
    refresh.only("client_id", "refresh_token", "token_endpoint", "token_endpoint_auth", "resource", "scope")
    secret["refresh_token"] = refresh.text("refresh_token", most=MAX_SECRET)
    method = refresh.object("token_endpoint_auth").only("type", "client_secret")
    kind = method.one_of("type", "none", "client_secret_basic", "client_secret_post")
    if kind != "none":
        secret["client_secret"] = method.text("client_secret", most=MAX_SECRET)
    return {
        "client_id": refresh.text("client_id", most=2048),
        "token_endpoint": url_of(refresh.data.get("token_endpoint"), refresh.at("token_endpoint")),
        "token_endpoint_auth": {"type": kind},
        "resource": refresh.maybe_text("resource", most=2048),
        "scope": refresh.maybe_text("scope", most=4096) or None,
    }


def _changed_oauth(auth: Fields, shown: Mapping[str, Any], secret: Mapping[str, str], now: datetime) -> ToolAuth:
    auth.only("type", "access_token", "mcp_server_url", "expires_at", "refresh")
    changed, kept = dict(secret), dict(shown)
    if auth.given("access_token"):
        changed["access_token"] = _token(auth, "access_token")
    if auth.given("expires_at"):
        kept["expires_at"] = _expiry(auth, now)
    if (refresh := auth.maybe_object("refresh")) is not None:
        if shown["refresh"] is None:
            raise InvalidRequest("this credential was made without refresh; make another one", field=refresh.path)
        kept["refresh"] = _changed_refresh(refresh, shown["refresh"], changed)
    return ToolAuth(MCP_OAUTH, plain_url(shown["mcp_server_url"]), kept, changed)


def _changed_refresh(refresh: Fields, shown: Mapping[str, Any], secret: dict[str, str]) -> dict[str, Any]:
    refresh.only("refresh_token", "scope", "token_endpoint_auth", "client_id", "token_endpoint", "resource")
    for name in ("client_id", "token_endpoint", "resource"):
        if refresh.given(name) and refresh.data[name] != shown[name]:
            raise InvalidRequest("cannot be changed; make another credential", field=refresh.at(name))
    kept = dict(shown)
    if refresh.given("refresh_token"):
        secret["refresh_token"] = refresh.text("refresh_token", most=MAX_SECRET)
    if refresh.has("scope"):
        kept["scope"] = refresh.maybe_text("scope", most=4096) or None
    method = refresh.maybe_object("token_endpoint_auth")
    if method is not None and method.only("type", "client_secret").given("client_secret"):
        # The kind stays as it is, whichever of the two is named beside the new secret.
        if shown["token_endpoint_auth"]["type"] == "none":
            raise InvalidRequest("this token endpoint takes no client secret", field=method.at("client_secret"))
        secret["client_secret"] = method.text("client_secret", most=MAX_SECRET)
    return kept


def _expiry(auth: Fields, now: datetime) -> str | None:
    if not auth.given("expires_at"):
        return None
    at = time_of(auth.data["expires_at"], auth.at("expires_at"))
    if at <= now:
        raise InvalidRequest("must be in the future", field=auth.at("expires_at"))
    return wire_time(at)


def _new_variable(auth: Fields, now: datetime) -> ToolAuth:
    del now
    auth.only("type", "secret_name", "secret_value", "networking", "injection_location")
    name = auth.text("secret_name", most=255)
    upper = name.upper()
    if not _VARIABLE.match(name) or upper in _RESERVED or upper.startswith(_RESERVED_PREFIXES):
        raise InvalidRequest(
            "must be the name of an environment variable that the process does not use itself",
            field=auth.at("secret_name"),
        )
    shown = {
        "type": ENVIRONMENT_VARIABLE,
        "secret_name": name,
        "networking": _networking(auth.object("networking")),
        "injection_location": _location(auth, {"header": True, "body": False}),
    }
    secret = {"secret_value": auth.text("secret_value", most=MAX_SECRET)}
    return ToolAuth(ENVIRONMENT_VARIABLE, name, shown, secret)


def _changed_variable(auth: Fields, shown: Mapping[str, Any], secret: Mapping[str, str], now: datetime) -> ToolAuth:
    del now
    auth.only("type", "secret_name", "secret_value", "networking", "injection_location")
    kept = {**shown, "injection_location": _location(auth, shown["injection_location"])}
    if (networking := auth.maybe_object("networking")) is not None:
        kept["networking"] = _networking(networking)
    value = auth.maybe_text("secret_value", most=MAX_SECRET, least=1)
    changed = secret if value is None else {"secret_value": value}
    return ToolAuth(ENVIRONMENT_VARIABLE, shown["secret_name"], kept, changed)


def _networking(given: Fields) -> dict[str, Any]:
    if given.one_of("type", "unrestricted", "limited") == "unrestricted":
        given.only("type")
        return {"type": "unrestricted"}
    given.only("type", "allowed_hosts")
    hosts = [host_of(host, path) for host, path in given.items("allowed_hosts", most=MAX_HOSTS)]
    if not hosts:
        raise InvalidRequest("must name at least one host", field=given.at("allowed_hosts"))
    return {"type": "limited", "allowed_hosts": list(dict.fromkeys(hosts))}


def _location(auth: Fields, present: Mapping[str, bool]) -> dict[str, bool]:
    given = auth.maybe_object("injection_location")
    if given is None:
        return dict(present)
    given.only("header", "body")
    location = {name: given.boolean(name, default=present[name]) for name in ("header", "body")}
    if not any(location.values()):
        raise InvalidRequest("at least one of header and body must be true", field=given.path)
    return location


_NEW: Final[Mapping[str, Callable[[Fields, datetime], ToolAuth]]] = {
    STATIC_BEARER: _new_bearer,
    MCP_OAUTH: _new_oauth,
    ENVIRONMENT_VARIABLE: _new_variable,
}
_CHANGED: Final[Mapping[str, Callable[[Fields, Mapping[str, Any], Mapping[str, str], datetime], ToolAuth]]] = {
    STATIC_BEARER: _changed_bearer,
    MCP_OAUTH: _changed_oauth,
    ENVIRONMENT_VARIABLE: _changed_variable,
}
