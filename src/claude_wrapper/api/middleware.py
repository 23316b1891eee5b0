"""One request: its id, its log line, its metrics, its trace. Plain ASGI: nothing is buffered, nothing wraps the body."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from claude_wrapper.api import errors
from claude_wrapper.clock import Clock
from claude_wrapper.errors import Draining
from claude_wrapper.ids import REQUEST, Ids
from claude_wrapper.telemetry import context

_OF_TURN = {"cw-session-id": "session", "cw-turn-id": "turn", "cw-process": "process"}
"""Response headers that say which turn answered."""


@dataclass(slots=True)
class Seen:
    """What is known of a request; complete when it has ended. Times are in seconds."""

    method: str
    path: str
    route: str = "unmatched"
    """The route's template: a path with identifiers in it is no label."""
    status: int = 0
    first_byte: float | None = None
    seconds: float = 0.0
    fields: dict[str, Any] = field(default_factory=dict)
    """Identifiers for the log line: `org`, `key`, `session`, `turn`, `process`, `error`, `limit`, `scope`."""


class RequestWatch(Protocol):
    """One request, watched."""

    def ended(self, seen: Seen) -> None:
        """It was answered, or its caller has gone."""
        ...


class Watch(Protocol):
    """Watches requests."""

    def request(self, seen: Seen, headers: Mapping[str, str]) -> RequestWatch:
        """A request arrived. What is bound to the context here holds until it has ended."""
        ...

    def routes(self, templates: tuple[str, ...]) -> None:
        """The route table, once."""
        ...


class InFlight(Protocol):
    """Counts requests in flight."""

    def enter(self) -> None: ...

    def leave(self) -> None: ...


class RequestContext:
    """Gives each request an id (`request-id` and `x-request-id`), and tells the watch of its beginning and end."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        clock: Clock,
        ids: Ids,
        watch: Watch,
        flight: InFlight,
        paths: Mapping[Any, str],
    ) -> None:
        """`paths` maps an endpoint to its route's template."""
        self.paths = paths
        self.flight = flight
        self.app = app
        self.clock = clock
        self.ids = ids
        self.watch = watch
        watch.routes(tuple(paths.values()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = self.ids.new(REQUEST)
        seen = Seen(scope["method"], scope["path"])
        scope["request_id"] = request_id
        scope["log_fields"] = seen.fields
        began = self.clock.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["request-id"] = request_id
                headers["x-request-id"] = request_id
                for name, value in scope.get("answer_headers", {}).items():
                    headers.setdefault(name, value)
                for name, known_as in _OF_TURN.items():
                    if name in headers:
                        seen.fields[known_as] = headers[name]
            elif seen.first_byte is None and message.get("body"):
                seen.first_byte = self.clock.monotonic() - began
            await send(message)

        with context.bound(request=request_id):
            watched = self.watch.request(seen, Headers(scope=scope))
            left = False

            def leave() -> None:
                nonlocal left
                if not left:
                    left = True
                    self.flight.leave()

            self.flight.enter()
            scope["not_waited_for"] = leave
            try:
                await self.app(scope, receive, send_with_id)
            except asyncio.CancelledError:
                if not seen.status:  # the drain is over: whoever has no answer yet is told to ask elsewhere
                    seen.fields["error"] = Draining.code
                    over = Draining("the server stopped before it could answer; send the request again", retry_after=1)
                    await errors.response(over, request_id)(scope, receive, send_with_id)
                raise
            except Exception:
                seen.status = seen.status or 500  # answered further out
                raise
            finally:
                leave()
                seen.seconds = self.clock.monotonic() - began
                seen.route = self.paths.get(scope.get("endpoint"), "unmatched")
                seen.status = seen.status or 499
                watched.ended(seen)
