"""Which requests of a process are let through: a short allow-list of exact methods and paths. Pure.

The target is compared as it stands on the wire and is never decoded: anything that could be read in two ways (`..`,
`//`, `%2f`, `\\`, `;`, absolute form, control characters) is not on the list, so it is refused.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from claude_wrapper.broker.refusals import refuse


class Kind(enum.StrEnum):
    """What a permitted request is for."""

    MESSAGES = "messages"
    COUNT_TOKENS = "count_tokens"
    MODELS = "models"
    PING = "ping"


@dataclass(frozen=True, slots=True)
class Route:
    """A permitted request: `path` and `query` may be sent on as they are."""

    kind: Kind
    path: str
    query: str = ""


_MODEL = re.compile(r"/v1/models(?:/[A-Za-z0-9](?:[A-Za-z0-9:@_-]|\.(?!\.)){0,127})?\Z")
_QUERY = re.compile(r"[A-Za-z0-9._~!$&'()*+,=:@/?%-]{0,1024}\Z")


def decide(method: str, target: str) -> Route:
    """The route of a request line, or raise `Refused` (403, 404, 405)."""
    path, mark, query = target.partition("?")
    if mark and not _QUERY.match(query):
        raise refuse(404, "not_found_error", "The query of this request holds characters that are not allowed.")
    if path == "/v1/messages":
        return _only("POST", method, Route(Kind.MESSAGES, path, query))
    if path == "/v1/messages/count_tokens":
        return _only("POST", method, Route(Kind.COUNT_TOKENS, path, query))
    if _MODEL.match(path):
        return _only("GET", method, Route(Kind.MODELS, path, query))
    if path == "/" and method in {"HEAD", "GET"}:
        return Route(Kind.PING, path)  # clients look whether the host is there
    if path.startswith(("/v1/", "/api/")):
        raise refuse(403, "permission_error", "This endpoint is not available to an agent process.")
    raise refuse(404, "not_found_error", "There is nothing here.")


def _only(allowed: str, method: str, route: Route) -> Route:
    if method != allowed:
        raise refuse(405, "invalid_request_error", f"{method} is not allowed here; use {allowed}.")
    return route
