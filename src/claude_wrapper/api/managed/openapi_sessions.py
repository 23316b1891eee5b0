"""How the routes of sessions are described: the summary is the handler's own, the rest follows from the route."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from starlette.routing import Route

from claude_wrapper.api.managed import events, sessions, threads

SESSION_ROUTES: Final[tuple[Route, ...]] = (*sessions.ROUTES, *events.ROUTES, *threads.ROUTES)
"""All routes of sessions, their events and threads."""

_ERRORS: Final = ("400", "401", "403", "404", "409", "413", "429", "500", "503")
_LISTS: Final = ("/sessions", "/events", "/threads", "/resources")


def _text(name: str, about: str, kind: str = "string") -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": kind}, "description": about}


_STREAM: Final = (
    {**_text("Last-Event-ID", "Resume after this event; the same as `after`."), "in": "header"},
    _text("after", "Resume after this event; without it, events from now on.", "integer"),
    _text("event_deltas[]", "`agent.message`, `agent.thinking`: previews of the message in flight."),
)
_PAGE: Final = (
    _text("limit", "How many.", "integer"),
    _text("page", "`next_page` of the page before."),
)


def describe_sessions(errors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Paths of the OpenAPI document; `errors` is its response object by status."""
    paths: dict[str, dict[str, Any]] = {}
    for route in SESSION_ROUTES:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operation = _operation(method.lower(), route.path, route.endpoint.__doc__ or "")
            operation["responses"] |= {status: errors[status] for status in _ERRORS if status in errors}
            paths.setdefault(route.path, {})[method.lower()] = operation
    return paths


def _operation(method: str, path: str, summary: str) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    streams = path.endswith("/stream")
    if streams:
        parameters += _STREAM
    elif method == "get" and path.endswith(_LISTS):
        parameters += _PAGE
    kind = "text/event-stream" if streams else "application/json"
    schema = {"type": "string"} if streams else {"type": "object"}
    operation: dict[str, Any] = {
        "summary": summary.splitlines()[0].rstrip("."),
        "tags": ["Sessions"],
        "parameters": parameters,
        "responses": {"200": {"description": "As asked for.", "content": {kind: {"schema": schema}}}},
    }
    if method == "post":
        operation["requestBody"] = {
            "required": False,
            "content": {"application/json": {"schema": {"type": "object"}, "example": _EXAMPLES.get(path, {})}},
        }
    return operation


_EXAMPLES: Final[Mapping[str, Any]] = {
    "/v1/sessions": {"agent": "agent_01", "environment_id": "env_01", "title": "A first session"},
    "/v1/sessions/{session_id}/events": {
        "events": [{"type": "user.message", "content": [{"type": "text", "text": "Hello!"}]}]
    },
}
