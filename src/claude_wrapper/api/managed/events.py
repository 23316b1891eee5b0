"""`/v1/sessions/{id}/events` and its stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api import errors, sse
from claude_wrapper.api.managed.resource_common import Call, answer, get, post
from claude_wrapper.api.managed.sessions import bounds
from claude_wrapper.api.managed.workers import RESULTS
from claude_wrapper.errors import InvalidRequest, PermissionDenied, RateLimited, WrapperError
from claude_wrapper.limits import Facts
from claude_wrapper.sessions.eventlog import Opened, Preview, SlowReader, Stored
from claude_wrapper.storage.pagination import Position, decode_cursor, encode_cursor
from claude_wrapper.wire import sse as wire_sse
from claude_wrapper.wire.managed import delta_frames
from claude_wrapper.wire.managed_input import check_events

_DEFAULT_LIMIT: Final = 100
_MAX_LIMIT: Final = 1000
_PREVIEWS: Final = frozenset({"agent.message", "agent.thinking"})
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MOST: Final = 2**53


async def send_events(call: Call) -> Response:
    """Messages, interrupts, confirmations and results for a session."""
    session_id = call.id("session_id", "session")
    events = check_events(dict((await call.fields()).data))
    _require_sendable(call, events)
    async with call.deps.tenants.admission.admit(call.principal, Facts(session=session_id)):
        written = await call.deps.sessions.send(call.principal, session_id, events)
    return answer({"data": written})


def _require_sendable(call: Call, events: Sequence[Mapping[str, Any]]) -> None:
    """A turn that runs gets its results also while the server is shutting down; nothing else begins then."""
    kinds = {event["type"] for event in events}
    if call.principal.worker is not None and not kinds <= RESULTS:
        raise PermissionDenied(f"a worker may send {', '.join(sorted(RESULTS))} alone")
    if not kinds <= RESULTS:
        call.deps.refuse_when_draining()


async def list_events(call: Call) -> Response:
    """A page of a session's events."""
    return await events_page(call, None)


async def stream_events(call: Call) -> Response:
    """A session's events as they happen, as server-sent events."""
    return await event_stream(call, None)


async def events_page(call: Call, thread_id: str | None) -> Response:
    """A page of the session's own events, or of a sub-agent's."""
    query = call.query
    session = await call.deps.sessions.get(call.principal, call.id("session_id", "session"))
    limit = query.integer("limit", least=1, most=_MAX_LIMIT) or _DEFAULT_LIMIT
    newest_first = query.one_of("order", "asc", "desc") == "desc"
    cursor = query.text("page")
    at = None if cursor is None else (decode_cursor(cursor)[0].at - _EPOCH) // timedelta(microseconds=1)
    found = await call.deps.sessions.books.log.read(
        call.principal,
        session.id,
        after=at if at is not None and not newest_first else 0,
        before=at if at is not None and newest_first else None,
        types=query.many("types") or (),
        thread_id=thread_id,
        newest_first=newest_first,
        limit=limit + 1,
        between=bounds(query),
    )
    shown = found[:limit]
    more = len(found) > limit
    next_page = encode_cursor(Position(_EPOCH + timedelta(microseconds=shown[-1].seq), "")) if more else None
    data = [msgspec.Raw(one.body) for one in shown]
    return answer({"data": data, "next_page": next_page})


async def event_stream(call: Call, thread_id: str | None) -> Response:
    """The stream of the session, or of a sub-agent; attached when the response begins."""
    deltas = frozenset(call.query.many("event_deltas") or ())
    if unknown := sorted(deltas - _PREVIEWS):
        raise InvalidRequest(f"{unknown[0][:64]!r} has no previews", field="event_deltas")
    session = await call.deps.sessions.get(call.principal, call.id("session_id", "session"))
    stream = call.deps.sessions.books.log.stream(
        call.principal, session.id, after=_after(call), previews=bool(deltas), thread_id=thread_id
    )
    await anext(stream)
    call.request.scope["not_waited_for"]()  # it ends when its client goes: a server that stops cuts it, without loss
    return sse.EventStream(_frames(stream, deltas, errors.request_id_of(call.request)))


def _after(call: Call) -> int | None:
    """Where to resume: the `Last-Event-ID` header or `after`; None: from now on."""
    given = call.request.headers.get("last-event-id") or call.query.text("after")
    if not given:
        return None
    if not given.isascii() or not given.isdigit() or int(given) > _MOST:
        raise InvalidRequest("must be the id of an event of this stream: a number", field="after")
    return int(given)


async def _frames(
    stream: AsyncIterator[Opened | Stored | Preview], deltas: frozenset[str], request_id: str
) -> AsyncIterator[bytes]:
    seen: int | None = None
    try:
        async for item in stream:
            if isinstance(item, Stored):
                seen = item.seq
                yield wire_sse.encode(item.type, item.body, id=str(item.seq))
            elif isinstance(item, Preview) and item.delta.type in deltas:
                for event in delta_frames(item.delta):
                    yield wire_sse.encode(event["type"], msgspec.json.encode(event))
    except SlowReader:
        last = "" if seen is None else f" with Last-Event-ID: {seen}"
        cut = RateLimited(f"this reader is too slow and was cut off; connect again{last}", retry_after=1)
        yield wire_sse.encode("error", errors.body(cut, request_id))
    except WrapperError as away:
        # The answer has begun: the client is told in the stream, and comes back with the last id that it saw.
        yield wire_sse.encode("error", errors.body(away, request_id))
    finally:
        aclose: Any = getattr(stream, "aclose", None)
        if aclose is not None:
            await aclose()


ROUTES: Final[tuple[Route, ...]] = (
    post("/v1/sessions/{session_id}/events", send_events),
    get("/v1/sessions/{session_id}/events", list_events),
    get("/v1/sessions/{session_id}/events/stream", stream_events),
    get("/v1/sessions/{session_id}/stream", stream_events),
)
