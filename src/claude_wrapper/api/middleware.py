"""One request: its id, its log line, its metrics. Plain ASGI: nothing is buffered, nothing wraps the body."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from claude_wrapper.clock import Clock
from claude_wrapper.ids import REQUEST, Ids

log = structlog.get_logger("claude_wrapper.http")


@dataclass(slots=True)
class _Seen:
    status: int = 0
    fields: dict[str, Any] = field(default_factory=dict)


class InFlight(Protocol):
    """Counts requests in flight."""

    def enter(self) -> None: ...

    def leave(self) -> None: ...


class RequestContext:
    """Gives each request an id (`request-id` and `x-request-id`), and writes one canonical log line when it ends."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        clock: Clock,
        ids: Ids,
        observe: Callable[[str, str, int, float], None],
        flight: InFlight,
        paths: Mapping[Any, str],
    ) -> None:
        """`paths` maps an endpoint to its route's template: a path with identifiers in it is no label."""
        self.paths = paths
        self.flight = flight
        self.app = app
        self.clock = clock
        self.ids = ids
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = self.ids.new(REQUEST)
        scope["request_id"] = request_id
        seen = _Seen()
        scope["log_fields"] = seen.fields
        began = self.clock.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["request-id"] = request_id
                headers["x-request-id"] = request_id
            await send(message)

        structlog.contextvars.bind_contextvars(request=request_id)
        self.flight.enter()
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self.flight.leave()
            seconds = self.clock.monotonic() - began
            route = self.paths.get(scope.get("endpoint"), "unmatched")
            self.observe(route, scope["method"], seen.status or 499, seconds)
            log.info(
                "request.done",
                method=scope["method"],
                route=route,
                status=seen.status or 499,
                ms=round(seconds * 1000, 1),
                **seen.fields,
            )
            structlog.contextvars.unbind_contextvars("request")
