"""`/v1/sessions/{id}/threads`: the session's own agent and its sub-agents."""

from __future__ import annotations

from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api.managed.events import event_stream, events_page
from claude_wrapper.api.managed.resource_common import Call, answer, get, post
from claude_wrapper.errors import Conflict
from claude_wrapper.sessions import threads
from claude_wrapper.sessions.managed import WRITE
from claude_wrapper.sessions.records import Session
from claude_wrapper.sessions.threads import Thread
from claude_wrapper.storage.pagination import MAX_LIMIT, Page, PageRequest


async def list_threads(call: Call) -> Response:
    """A page of a session's threads."""
    session = await _session(call)
    query = call.query
    limit = query.integer("limit", least=1, most=MAX_LIMIT) or MAX_LIMIT
    page = PageRequest(limit, cursor=query.text("page"), newest_first=False)
    statuses = frozenset(query.many("statuses") or ())

    async def work(tx: AsyncConnection) -> Page[Thread]:
        return await threads.list_threads(tx, call.principal, session.id, statuses, page)

    found = await call.read(work)
    return answer({"data": [one.to_wire(session) for one in found.data], "next_page": found.next_page})


async def get_thread(call: Call) -> Response:
    """One thread."""
    session = await _session(call)
    return answer((await _thread(call, session)).to_wire(session))


async def archive_thread(call: Call) -> Response:
    """Archive the thread of a sub-agent that has ended."""
    call.principal.require(WRITE)
    session = await _session(call)
    thread = await _thread(call, session)
    if thread.parent_id is None:
        raise Conflict("this is the session's own thread: archive the session")
    if thread.status == "running":
        raise Conflict(f"thread {thread.id} is running: interrupt the session first")

    async def work(tx: AsyncConnection) -> Thread:
        return await threads.archive_thread(tx, call.principal, session.id, thread.id, call.deps.clock.now())

    return answer((await call.write(work)).to_wire(session))


async def list_thread_events(call: Call) -> Response:
    """A page of a thread's events."""
    return await events_page(call, await _scope(call))


async def stream_thread(call: Call) -> Response:
    """A thread's events as they happen, as server-sent events."""
    return await event_stream(call, await _scope(call))


async def _scope(call: Call) -> str | None:
    """Which events belong to the thread: None, the session's own."""
    thread = await _thread(call, await _session(call))
    return None if thread.parent_id is None else thread.id


async def _session(call: Call) -> Session:
    return await call.deps.sessions.get(call.principal, call.id("session_id", "session"))


async def _thread(call: Call, session: Session) -> Thread:
    thread_id = call.id("thread_id", "thread")

    async def work(tx: AsyncConnection) -> Thread:
        return await threads.get_thread(tx, call.principal, session.id, thread_id)

    return await call.read(work)


ROUTES: Final[tuple[Route, ...]] = (
    get("/v1/sessions/{session_id}/threads", list_threads),
    get("/v1/sessions/{session_id}/threads/{thread_id}", get_thread),
    post("/v1/sessions/{session_id}/threads/{thread_id}/archive", archive_thread),
    get("/v1/sessions/{session_id}/threads/{thread_id}/events", list_thread_events),
    get("/v1/sessions/{session_id}/threads/{thread_id}/stream", stream_thread),
)
