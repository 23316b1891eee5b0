"""Sessions as their clients see them: made, changed, spoken to, archived, deleted; and who runs them.

Everything here is a transaction on the rows and the event log. What is written for a session to act on wakes its runner,
on this replica or on the one that holds it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import (
    Conflict,
    HeldElsewhere,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    StorageUnavailable,
)
from claude_wrapper.ids import EVENT, SESSION
from claude_wrapper.sessions import mounts, records
from claude_wrapper.sessions.askers import acting, asking, noted
from claude_wrapper.sessions.budgets import require_budget
from claude_wrapper.sessions.doors import Doors
from claude_wrapper.sessions.eventlog import Stored
from claude_wrapper.sessions.grading import Grader
from claude_wrapper.sessions.journal import TURN_EVENTS, Books
from claude_wrapper.sessions.outcomes import defined, interrupted
from claude_wrapper.sessions.ownership import BEATS
from claude_wrapper.sessions.records import CallRow, Filter, Session
from claude_wrapper.sessions.resources.definitions import overridden
from claude_wrapper.sessions.resources.values import Fields, merged_metadata
from claude_wrapper.sessions.runner import Runner, RunnerSettings
from claude_wrapper.sessions.selfhosted.demand import dismiss, enqueue, queue_channel, wakes
from claude_wrapper.sessions.serverbook import know
from claude_wrapper.sessions.sessionfields import NewSession, budget_of, status_events
from claude_wrapper.sessions.threads import note_thread
from claude_wrapper.storage.pagination import Page, PageRequest
from claude_wrapper.tenancy.principal import Principal

log = structlog.get_logger(__name__)

READ: Final = "read:sessions"
WRITE: Final = "write:sessions"
_CLOSE_SECONDS: Final = 3.0
_LISTEN_SECONDS: Final = 1.0
_MOST_STRAYS: Final = 8
"""Sessions of dead replicas that one replica goes on with at once: the others wait instead of crowding its pool."""
CALLS: Final = "sessions/calls"
"""Replicas call each other here: (replica, or empty for whoever can; session)."""
MAX_QUEUED: Final = 100
"""Messages that may wait in one session."""


class ManagedSessions:
    """All sessions, through the eyes of one principal at a time."""

    def __init__(
        self,
        books: Books,
        doors: Doors,
        grader: Callable[[Doors], Grader],
        settings: RunnerSettings,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        """`grader` makes the grader of these sessions; `spawn` starts a task and keeps a reference to it."""
        self.books = books
        self.doors = doors
        self._grader = grader(doors)
        self._settings = settings
        self._spawn = spawn
        self._runners: dict[str, Runner] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._strays: set[asyncio.Task[None]] = set()
        self.on_deleted: Callable[[Session], None] = lambda _session: None
        """Called when a session's rows are gone: what it has elsewhere goes too."""
        self._left: set[str] = set()
        books.own.on_free = self._call_others
        doors.on_change = self.wake
        doors.recover = self.recover

    # The life of a session --------------------------------------------------------------------------------------------

    async def create(self, principal: Principal, new: NewSession) -> Session:
        """A session, idle; its initial events start it at once. Needs `write:sessions`."""
        principal.require(WRITE)
        _require_model(principal, new.agent)
        books = self.books
        now = books.clock.now()
        initial = await self._grader.accept(principal, new.initial_events, field="initial_events")
        session_id, thread = books.ids.new(SESSION), books.ids.new("sthr")
        async with books.db.transaction() as tx:
            asker = noted(principal) if initial else None
            await records.insert_session(tx, {**new.row(principal, session_id, thread, now), "asker": asker})
            session = await records.get_session(tx, principal, session_id)
            await note_thread(tx, principal, session, thread, name=session.agent_name, status=records.IDLE, now=now)
            await know(tx, principal, session.agent.get("mcp_servers") or (), now)
            for at, one in enumerate(new.mounts):
                # Listed by age: a moment apart, they stay in the order in which they were given.
                later = now + timedelta(microseconds=at)
                await mounts.add(tx, principal, session_id, one, now=later)
            stored = await books.log.write(tx, principal, session_id, initial, queued=True)
            if outcomes := defined(stored):
                await records.change_session(tx, principal, session_id, outcomes=outcomes)
                session = replace(session, outcomes=outcomes)
            queued = await enqueue(tx, principal, session, now=now, new_id=books.ids.new)
        if queued:
            await self._call_workers(session)
        await books.log.publish(session_id, stored)
        if stored:
            self.start(principal, session_id)
        return session

    async def get(self, principal: Principal, session: str) -> Session:
        """Needs `read:sessions`; raises NotFound."""
        principal.require(READ)
        await self.doors.caught_up(session)
        async with self.books.db.read() as tx:
            found = await records.get_session(tx, principal, session)
        await self._look_after(principal, found)
        return found

    async def page(self, principal: Principal, wanted: Filter, page: PageRequest) -> Page[Session]:
        """Needs `read:sessions`."""
        principal.require(READ)
        async with self.books.db.read() as tx:
            return await records.list_sessions(tx, principal, wanted, page)

    async def update(self, principal: Principal, session: str, fields: Fields) -> Session:
        """Title, metadata, budget, and the tools and servers of an agent that does not run. Needs `write:sessions`."""
        principal.require(WRITE)
        fields.only("title", "metadata", "agent", "budget", "vault_ids")
        if fields.given("vault_ids"):
            raise InvalidRequest("cannot be changed after the session was made", field="vault_ids")
        async with self.books.db.transaction() as tx:
            present = await records.get_session(tx, principal, session, lock=True)
            _require_open(present)
            values = _changes(present, fields)
            if not values:
                return present
            await records.change_session(tx, principal, session, **values)
            shown = {name: value for name, value in values.items() if name in {"title", "metadata", "agent", "budget"}}
            stored = await self.books.log.write(tx, principal, session, [{"type": "session.updated", **shown}])
            changed = await records.get_session(tx, principal, session)
        await self.books.log.publish(session, stored)
        if "budget" in values:
            self.start(principal, session)  # messages may have waited for it
        return changed

    async def archive(self, principal: Principal, session: str) -> Session:
        """End a session; it stays readable. Doing it twice is no error. Needs `write:sessions`."""
        principal.require(WRITE)
        now = self.books.clock.now()
        async with self.books.db.transaction() as tx:
            present = await records.get_session(tx, principal, session, lock=True)
            stored: list[Stored] = []
            if present.archived_at is None:
                outcomes, events = interrupted(present.outcomes, now)
                values = {"archived_at": now, "status": records.TERMINATED, "stop_reason": None, "outcomes": outcomes}
                await records.change_session(tx, principal, session, **values)
                await records.cancel_calls(tx, principal, session, now)
                thread = {"session_thread_id": present.thread_id, "agent_name": present.agent_name}
                events += [
                    {"type": "session.thread_status_terminated", **thread},
                    {"type": "session.status_terminated"},
                ]
                stored = await self.books.log.write(tx, principal, session, events)
                await dismiss(tx, principal, session, now=now)
            found = await records.get_session(tx, principal, session)
        await self.books.log.publish(session, stored)
        await self._end(principal, found)
        return found

    async def delete(self, principal: Principal, session: str) -> None:
        """Forget a session and everything that it said. Needs `write:sessions`."""
        principal.require(WRITE)
        async with self.books.db.transaction() as tx:
            found = await records.get_session(tx, principal, session, lock=True)
            stored = await self.books.log.write(tx, principal, session, [{"type": "session.deleted"}])
            await records.delete_session(tx, principal, session)
        await self.books.log.publish(session, stored)
        await self._end(principal, found)
        self.on_deleted(found)

    async def _end(self, principal: Principal, session: Session) -> None:
        self.wake(session.id)
        await self.call(session.holder, session.id)
        await self.doors.close(session)

    # Speaking to it ---------------------------------------------------------------------------------------------------

    async def send(self, principal: Principal, session: str, events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write checked client events and act on them; the events as they were written. Needs `write:sessions`.

        Raises NotFound (also for a call that does not exist), Conflict (ended session, answered call, busy session
        with `run_mode: reject`). All or nothing.
        """
        principal.require(WRITE)
        books = self.books
        events = await self._grader.accept(principal, events, field="events")
        async with books.db.transaction() as tx:
            present = await records.get_session(tx, principal, session, lock=True)
            _require_open(present)
            if present.origin == records.BY_MESSAGES and not present.agent.get("model"):
                raise Conflict(f"session {session} has had no turn yet")
            # A worker asks for nothing: the turns are still whose they were.
            asker_now = principal if principal.worker is None else asker_of(present)
            if principal.worker is None and (asker := noted(principal)) != present.asker:
                await records.change_session(tx, principal, session, asker=asker)
            stored = await self._take(tx, principal, present, events)
            queued = wakes(events) and await enqueue(
                tx, principal, present, now=books.clock.now(), new_id=books.ids.new
            )
        if queued:
            await self._call_workers(present)
        await books.log.publish(session, stored)
        self.start(asker_now, session)
        return [one.json() for one in stored if one.type in _ECHOED]

    async def _call_workers(self, session: Session) -> None:
        """Those that wait for work in its environment; one that does not hear of it finds it with its next poll."""
        with contextlib.suppress(StorageUnavailable):
            await self.books.state.publish(queue_channel(str(session.environment_id)), b"")

    async def _take(
        self, tx: AsyncConnection, principal: Principal, session: Session, events: Sequence[dict[str, Any]]
    ) -> list[Stored]:
        books = self.books
        stored: list[Stored] = []
        waiting = await books.log.queued(tx, principal, session.id, TURN_EVENTS)
        for index, given in enumerate(events):
            field = f"events[{index}]"
            kind, event = given["type"], given
            queued = False
            if kind in {"user.message", "user.define_outcome"}:
                queued = True
                _require_model(principal, session.agent)
                require_budget(session.id, session.budget, session.usage)
                if len(waiting) + index >= MAX_QUEUED:
                    raise Conflict(f"session {session.id}: {MAX_QUEUED} messages are waiting already")
                stored += await self._run_mode(tx, principal, session, event, busy=bool(waiting))
                event = {name: value for name, value in event.items() if name != "run_mode"}
            elif kind in {"user.interrupt", "system.message"}:
                queued = True
            else:
                event = await self._answer(tx, principal, session, event, field)
            event = {"id": books.ids.new(EVENT), **event}
            stored += await books.log.write(tx, principal, session.id, [event], queued=queued)
        if outcomes := defined(stored):
            await records.change_session(tx, principal, session.id, outcomes=[*session.outcomes, *outcomes])
        if any(event["type"] in _ANSWERS for event in events):
            stored += await self._after_answers(tx, principal, session)
        return stored

    async def _run_mode(
        self, tx: AsyncConnection, principal: Principal, session: Session, event: Mapping[str, Any], *, busy: bool
    ) -> list[Stored]:
        """What a message does to a session that is running."""
        mode = event.get("run_mode", "enqueue")
        busy = busy or session.status in {records.RUNNING, records.RESCHEDULING} or bool(session.awaited)
        if not busy or mode == "enqueue":
            return []
        if mode == "reject":
            raise Conflict(
                f"session {session.id} is {session.status} (run_mode: reject)", details={"error_code": "session_busy"}
            )
        interrupt = [{"type": "user.interrupt"}]
        return await self.books.log.write(tx, principal, session.id, interrupt, queued=True)

    async def _answer(
        self, tx: AsyncConnection, principal: Principal, session: Session, event: dict[str, Any], field: str
    ) -> dict[str, Any]:
        """Record a confirmation or a result; the event as it is to be written."""
        kind = event["type"]
        name = "custom_tool_use_id" if kind == "user.custom_tool_result" else "tool_use_id"
        event_id = event[name]
        call = await self._call(tx, principal, session, event_id)
        if call is None:
            raise InvalidRequest(f"there is no call {event_id[:128]!r} in this session", field=f"{field}.{name}")
        if call.kind not in _ANSWERED_BY[kind]:
            asked = kind == "user.tool_result" and call.kind == "sandbox_ask"
            why = "waits for a user.tool_confirmation first" if asked else _WRONG_CALL[kind]
            raise InvalidRequest(why, field=f"{field}.{name}")
        answer: dict[str, Any] = {key: value for key, value in event.items() if key in _ANSWER_FIELDS}
        if kind != "user.tool_confirmation":
            answer = {"content": [], "is_error": False, **answer}
        now = self.books.clock.now()
        if call.kind == "sandbox_ask" and answer.get("result") == "allow":
            done = await records.release_call(tx, principal, session.id, event_id)
        else:
            done = await records.answer_call(tx, principal, session.id, event_id, answer=answer, now=now)
        if not done:
            message, details = (
                f"the call {event_id!r} was answered or cancelled already",
                {"error_code": "already_answered"},
            )
            if kind == "user.tool_result":
                # A worker tries a conflict again for as long as its lease lasts, and runs nothing else meanwhile.
                raise InvalidRequest(message, field=f"{field}.{name}", details=details)
            raise Conflict(f"{field}.{name}: {message}", details=details)
        if call.thread_id is not None:
            event = {**event, "session_thread_id": call.thread_id}
        return event

    async def _call(self, tx: AsyncConnection, principal: Principal, session: Session, event_id: str) -> CallRow | None:
        return next(iter(await records.calls_of(tx, principal, session.id, event_id=event_id)), None)

    async def _after_answers(self, tx: AsyncConnection, principal: Principal, session: Session) -> list[Stored]:
        """An idle session goes on when nothing is open any more; else it says what is."""
        if not session.awaited:
            return []
        left = [call.event_id for call in await records.calls_of(tx, principal, session.id, open_only=True)]
        reason = {"type": "requires_action", "event_ids": left} if left else None
        status = records.IDLE if left else records.RUNNING
        await records.change_session(tx, principal, session.id, status=status, stop_reason=reason)
        return await self.books.log.write(tx, principal, session.id, status_events(session, reason))

    async def drain(self) -> None:
        """The server is going to stop: begin no turn; returns when those that run have ended.

        Sessions without files are given back as they come to rest, the others when the server has stopped.
        """
        self._closed = True
        for session in self.doors.give_back(self._runners):
            await self.call(None, session)
        for runner in list(self._runners.values()):
            runner.drain()
        while self._tasks:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            for session in self.doors.give_back(self._runners):
                await self.call(None, session)

    async def close(self) -> None:
        """The server stops: turns that still run are left to the other replicas."""
        self._closed = True
        self._left = {*self._runners}
        for runner in list(self._runners.values()):
            runner.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)

    async def _call_others(self) -> None:
        for session in self._left:
            await self.call(None, session)

    # Who runs it ------------------------------------------------------------------------------------------------------

    def wake(self, session: str) -> None:
        """Something happened to a session: if it runs here, its runner looks."""
        runner = self._runners.get(session)
        if runner is not None:
            runner.wake()

    def start(self, principal: Principal, session: str) -> asyncio.Task[None] | None:
        """Let the session run if there is something to do; the task of its runner, unless the server stops."""
        if self._closed:
            return None
        runner = self._runners.get(session)
        if runner is not None:
            runner.principal = principal
            runner.wake()
            return runner.task
        runner = self._runners[session] = Runner(
            self.books, self.doors, self._settings, session, principal, grader=self._grader
        )
        task = runner.task = self._spawn(self._run(session, runner))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, session: str, runner: Runner) -> None:
        try:
            await runner.run()
        except HeldElsewhere as elsewhere:
            await self.call(elsewhere.holder, session)
        except NotFound:
            log.info("session.gone", session=session)
        finally:
            if self._runners.get(session) is runner:
                del self._runners[session]
            if runner.woken and not self._closed:  # between its last look and now
                self.start(runner.principal, session)

    async def _look_after(self, principal: Principal, session: Session) -> None:
        """A session that is said to run and that nobody runs has lost its server."""
        if session.status == records.RUNNING and session.id not in self._runners and not self.doors.busy(session.id):
            self.start(asker_of(session), session.id)

    # Among replicas ---------------------------------------------------------------------------------------------------

    async def call(self, holder: str | None, session: str) -> None:
        """Tell the replica that holds a session to look into its log (None: whoever can take it)."""
        if holder == self.books.own.replica:
            return
        try:
            await self.books.state.publish(CALLS, msgspec.msgpack.encode((holder or "", session)))
        except StorageUnavailable as error:
            # The holder looks by itself every few seconds.
            log.warning("session.holder_not_called", session=session, cause=error.message)

    async def listen(self) -> None:
        """Hear the calls of other replicas, until cancelled."""
        own = self.books.own.replica
        while True:
            try:
                async with self.books.state.subscribe(CALLS) as calls:
                    async for message in calls:
                        to, session = msgspec.msgpack.decode(message, type=tuple[str, str])
                        if to in ("", own):
                            await self._called(session)
            except StorageUnavailable as error:
                log.warning("sessions.not_listening", cause=error.message)
            await self.books.clock.sleep(_LISTEN_SECONDS)

    async def _called(self, session_id: str) -> None:
        try:
            async with self.books.db.read() as tx:
                session = await records.any_session(tx, session_id)
        except StorageUnavailable:
            return  # found by `attend`
        if session is not None and not session.ended:
            self.start(asker_of(session), session_id)
        elif session is not None:
            self.wake(session_id)
            await self.doors.close(session)
        else:
            await self.doors.gone(session_id)

    async def attend(self) -> None:
        """Upkeep, until cancelled: sessions that have something to do and that nobody runs, most of all those whose
        replica died, are run here."""
        own = self.books.own
        first = True
        while True:
            if not first:
                await self.books.clock.sleep(own.lease_seconds / BEATS)
            first = False
            room = _MOST_STRAYS - len(self._strays)
            if room <= 0:
                continue
            try:
                async with self.books.db.read() as tx:
                    found = await records.unattended(tx, own.replica, room + len(self._runners))
                await own.bury()
            except StorageUnavailable as error:
                log.warning("sessions.not_attended", cause=error.message)
                continue
            for session in found:
                if room > 0 and session.id not in self._runners and not self.doors.busy(session.id):
                    room -= 1
                    task = self.start(asker_of(session), session.id)
                    if task is not None:
                        self._strays.add(task)
                        task.add_done_callback(self._strays.discard)

    async def recover(self, session: Session) -> None:
        """Go on with the turn of a session whose server died; returns when it is over."""
        task = self.start(asker_of(session), session.id)
        if task is not None:
            await asyncio.wait({task})


def asker_of(session: Session) -> Principal:
    """Whose turns these are, for a replica that nobody asked."""
    return acting(session.owner) if session.asker is None else asking(session.org_id, session.asker)


_ANSWER_FIELDS: Final = frozenset({"content", "is_error", "result", "deny_message"})
_ANSWERS: Final = frozenset({"user.tool_confirmation", "user.custom_tool_result", "user.tool_result"})
_ANSWERED_BY: Final[Mapping[str, frozenset[str]]] = {
    "user.custom_tool_result": frozenset({"custom"}),
    "user.tool_confirmation": frozenset({"approval", "sandbox_ask"}),
    "user.tool_result": frozenset({"sandbox"}),
}
_ECHOED: Final = _ANSWERS | {"user.message", "user.interrupt", "user.define_outcome", "system.message"}
_WRONG_CALL: Final[Mapping[str, str]] = {
    "user.custom_tool_result": "is not a call of a custom tool",
    "user.tool_confirmation": "is not a call that waits for a confirmation",
    "user.tool_result": "is run by the server: results are taken for self-hosted environments alone",
}


def _require_open(session: Session) -> None:
    if session.ended:
        state = "archived" if session.archived_at is not None else session.status
        raise Conflict(
            f"session {session.id} is {state} and takes no changes or events",
            details={"error_code": "session_archived" if state == "archived" else "session_terminated"},
        )


def _changes(present: Session, fields: Fields) -> dict[str, Any]:
    """The columns that an update sets."""
    values: dict[str, Any] = {}
    if fields.has("title"):
        values["title"] = fields.maybe_text("title", most=512)
    if fields.given("metadata"):
        values["metadata"] = merged_metadata(present.metadata, fields.object("metadata"))
    if fields.has("budget"):
        if present.budget is None and fields.given("budget"):
            raise InvalidRequest("cannot be added after the session was made", field="budget")
        values["budget"] = budget_of(fields)
    if fields.given("agent"):
        if present.status == records.RUNNING or present.awaited:
            raise Conflict(f"session {present.id} is running: its agent can be changed once it is idle")
        values["agent"] = _agent_with(present, fields.object("agent"))
    return values


def _require_model(principal: Principal, agent: Mapping[str, Any]) -> None:
    """Raises PermissionDenied for a key that may not use the agent's model."""
    name = str((agent.get("model") or {}).get("id", ""))
    if name and not principal.may_use(name):
        raise PermissionDenied(f"agent.model: this key may not use {name}")


def _agent_with(present: Session, fields: Fields) -> Mapping[str, Any]:
    return overridden(present.agent, fields.only("tools", "mcp_servers"))
