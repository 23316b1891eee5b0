"""What happens in a conversation, written into its session's event log, through whichever door it happens.

The frames of a turn are taken at once and written behind, in order: a batch is whatever came while the batch before was
being committed, so the stream of tokens never waits for the database, and a busy session costs fewer transactions.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import LeaseLost, NotFound, StorageUnavailable
from claude_wrapper.ids import Ids
from claude_wrapper.sessions import records
from claude_wrapper.sessions.budgets import BUDGET_REACHED, reached, require_budget, usage_to_wire
from claude_wrapper.sessions.conversation import Conversation
from claude_wrapper.sessions.eventlog import EventLog, InFlight, Mark, MovedOn, Stored, answering
from claude_wrapper.sessions.mcpservers import shown_names
from claude_wrapper.sessions.outcomes import interrupted, more_to_do
from claude_wrapper.sessions.ownership import Ownership
from claude_wrapper.sessions.records import CallRow, Session
from claude_wrapper.sessions.spec import Message, TurnEnd, TurnInput
from claude_wrapper.sessions.threads import note_thread
from claude_wrapper.sessions.transcript import Recorder, names_in
from claude_wrapper.sessions.turnend import ListPrice, outcome_of, shown_content, with_usage
from claude_wrapper.sessions.writebehind import Entry, WriteBehind
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.state import SharedState
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.wire.managed import END_TURN, EXHAUSTED, Output, TurnTranslator, error_event
from claude_wrapper.wire.managed_mcp import McpStatus
from claude_wrapper.wire.streamjson import Frame

log = structlog.get_logger(__name__)

TURN_EVENTS: Final = ("user.message", "user.define_outcome")
"""Events of the client that a turn answers."""
Marking = Callable[[AsyncConnection], Awaitable[Mapping[str, Any]]]
"""Within a transaction → columns of the session that are set by it."""
_CATCH_UP_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Books:
    """What sessions are written with."""

    db: Database
    log: EventLog
    state: SharedState
    own: Ownership
    clock: Clock
    ids: Ids
    list_price: ListPrice


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the session was at the end of the turn before: while this replica holds it, nobody else writes its transcript."""

    messages: list[Message]
    session: Session | None
    """None: the client has queued more."""
    mark: Mark
    """Where somebody else's writing shows: a client's events, an update, an archive."""


@dataclass(frozen=True, slots=True)
class _Opening:
    """How a turn begins."""

    write: Callable[[sa.Connection], tuple[list[Stored], Mark]]
    recorder: Recorder
    start: int
    """Position of the turn's user message in the transcript."""
    past: tuple[Message, ...]


@dataclass(slots=True)
class _Turn:
    translator: TurnTranslator
    recorder: Recorder
    inflight: InFlight
    input: TurnInput
    began: float
    start: int
    """Position of the turn's user message in the transcript."""
    replaying: bool
    cleanup: contextlib.AsyncExitStack
    open_calls: set[str]
    """The model's ids of calls whose answers the process has not been given."""
    at_work: set[str]
    """Ids of calls that have no result yet; those of `open_calls` wait for the client, the others may be running."""
    behind: WriteBehind
    session: Session | None
    """The session as it was when the turn began; None once somebody else has written to it."""
    mark: Mark
    told: asyncio.Event
    """Set while no model message is being said: what its caller may have been answered with already."""
    spent: bool = False
    """The session's budget was reached on the way."""
    called: bool = False
    """Tools were called, by the model or before the turn: their answers are in the database."""
    lost: bool = False
    """The process gave up waiting for the client, which still may answer: what it says since then does not count."""


class SessionJournal:
    """The `Journal` of one session's conversation."""

    def __init__(
        self,
        books: Books,
        session: Session,
        principal: Principal,
        conversation: Conversation,
        *,
        fence: int,
        decide: Callable[[str, Any], str],
        on_change: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        """`principal` is the session's own (its organisation and workspace); `on_change`: the runner should look.

        `fence` is what this replica was given when it took the session; once another has it nothing is written here,
        and `on_lost` is called.
        """
        self.fence = fence
        self.session = session
        self.decide = decide
        self.taking: Sequence[Stored] = ()
        """The client's events that the next turn answers."""
        self.marking: Marking | None = None
        """Further columns of the session that the next turn's beginning sets."""
        self.interrupted = False
        """The client ended the running turn."""
        self.attempt = 1
        """How often the next turn has been begun: more than once if its servers died."""
        self._handed_over = False
        self._books = books
        self._principal = principal
        self._conversation = conversation
        self._on_change = on_change
        self._on_lost = on_lost
        self._turn: _Turn | None = None
        self._mcp = McpStatus()
        self._kept: _Kept | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    async def caught_up(self) -> None:
        """Return when what the process has said until now is in the log; who was just answered finds it there."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CATCH_UP_SECONDS):
                if self._turn is not None and self._conversation.awaiting_tools:
                    # A caller has its calls a moment before the message that made them is over.
                    await self._turn.told.wait()
                if self._turn is not None:
                    await self._turn.behind.caught_up()
                if self._turn is not None and self._turn.translator.outcome is not None:
                    await self._idle.wait()

    # Journal ----------------------------------------------------------------------------------------------------------

    async def begin(self, turn_input: TurnInput) -> TurnInput:
        """Note the turn, and give it the whole past for a fresh process.

        Raises NotFound for a deleted session, LeaseLost for one that another replica took.
        """
        try:
            return await self._begin(turn_input)
        except LeaseLost:
            self._on_lost()
            raise

    async def _begin(self, turn_input: TurnInput) -> TurnInput:
        books, session = self._books, self.session.id
        cleanup = contextlib.AsyncExitStack()
        async with cleanup:
            inflight = InFlight(books.log, session)
            await cleanup.enter_async_context(answering(books.state, inflight, session))
            kept, self._kept = self._kept if turn_input.replay is None else None, None
            known: Sequence[CallRow] = ()
            if kept is not None and self.marking is None and (kept.session or self.session).budget is None:
                opening = self._opening(turn_input, kept.messages)
                stored, mark = await books.db.write(opening.write)
            else:
                async with books.db.transaction() as tx:
                    await self._check_budget(tx, None if kept is None else kept.session)
                    if kept is None:
                        messages = await records.load_messages(tx, self._principal, session)
                        known = await records.calls_of(tx, self._principal, session)
                    else:
                        messages = kept.messages
                    marks = {} if self.marking is None else await self.marking(tx)
                    opening = self._opening(turn_input, messages, marks)
                    stored, mark = await tx.run_sync(opening.write)
            recorder, start = opening.recorder, opening.start
            if not turn_input.durable:
                turn_input = replace(turn_input, past=opening.past)
            await books.log.publish(session, stored)
            self._mcp.begin(shown_names(self.session.agent))
            translator = TurnTranslator(books.ids.new, self.decide, self._mcp)
            said: dict[str, tuple[str, str]] = {}
            if turn_input.replay is not None:
                names = names_in(turn_input.replay)
                said = {
                    one.tool_use_id: (one.event_id, names[one.tool_use_id]) for one in known if one.tool_use_id in names
                }
                translator.know(said, done=[one.tool_use_id for one in known if _ran(one)])
            replaying = turn_input.replay is not None
            now = books.clock.monotonic()
            cleanup = cleanup.pop_all()
            opened = {one.tool_use_id for one in known if one.kind != "tool" and one.answered_at is None}
            self._idle.clear()
            alone = (
                kept is not None
                and self.marking is None
                and mark == Mark(kept.mark.seq + len(stored), kept.mark.version + 1)
            )
            self._turn = turn = _Turn(
                translator=translator,
                recorder=recorder,
                inflight=inflight,
                input=turn_input,
                began=now,
                start=start,
                replaying=replaying,
                cleanup=cleanup,
                open_calls=opened,
                at_work={one.tool_use_id for one in known if one.tool_use_id in said and not _ran(one)},
                behind=WriteBehind(
                    lambda outputs: _show(turn, outputs), lambda run: self._write(turn, run), name=f"journal {session}"
                ),
                session=kept.session if kept is not None and alone else None,
                mark=mark,
                told=asyncio.Event(),
                called=bool(known),
            )
            self.taking, self.marking, self.interrupted = (), None, False
            self.attempt = 1
        return turn_input

    def _opening(
        self, turn_input: TurnInput, messages: Sequence[Message], marks: Mapping[str, Any] = MappingProxyType({})
    ) -> _Opening:
        """What the beginning of a turn writes, after these messages; `marks`: further columns of the session."""
        before = len(messages)
        if turn_input.durable and turn_input.replay is None and turn_input.past is not None:
            # What an earlier turn left unanswered is in the new message, which takes its place.
            messages = messages[: len(turn_input.past)]
        recorder, start = Recorder(list(messages)), len(messages) - 1
        replaced = before > len(messages)
        events: list[dict[str, Any]] = []
        if not turn_input.durable:
            events.append({"type": "user.message", "content": shown_content(turn_input.content)})
        if turn_input.replay is None:
            start = recorder.user(turn_input.content)
            events += self.running_events()
        running = {"start": start, "durable": turn_input.durable, "attempt": self.attempt}
        changes = {"status": records.RUNNING, "stop_reason": None, "turn": running, **marks}
        said = {start: recorder.messages[start]} if turn_input.replay is None else {}
        write = self._note(events, changes, said)
        taking, now = self.taking, self._books.clock.now()

        def whole(tx: sa.Connection) -> tuple[list[Stored], Mark]:
            written = write(tx)
            if replaced:
                records.cut_messages_now(tx, self._principal, self.session.id, start + 1)
            if taking:
                self._books.log.processed_now(tx, self._principal, self.session.id, taking, now)
            return written

        return _Opening(whole, recorder, start, tuple(messages))

    def _note(
        self,
        events: Sequence[dict[str, Any]],
        changes: Mapping[str, Any],
        messages: Mapping[int, Message],
        *,
        model: str = "",
        at: Mark | None = None,
    ) -> Callable[[sa.Connection], tuple[list[Stored], Mark]]:
        """What writes events, changes of the session's row and messages of its transcript, as they are now."""
        log, principal, session, fence = self._books.log, self._principal, self.session.id, self.fence
        batch = log.batch(principal, session, events)
        rows = records.message_rows(principal, session, messages, model=model)

        def write(tx: sa.Connection) -> tuple[list[Stored], Mark]:
            written = log.write_now(tx, principal, session, batch, changes, fence=fence, at=at)
            records.save_messages_now(tx, rows)
            return written

        return write

    async def _check_budget(self, tx: AsyncConnection, session: Session | None) -> None:
        """Raises Conflict when it is spent."""
        known = session or self.session
        if known.budget is None:
            return  # it cannot be added later
        self.session = fresh = await records.get_held(tx, self._principal, self.session.id, self.fence)
        require_budget(fresh.id, fresh.budget, fresh.usage)

    async def _spend(self, turn: _Turn) -> None:
        """A model request is over and the turn goes on: end it if the budget is reached. What the process tells of its
        usage is enough to stop early; what is billed and shown is what the broker saw."""
        budget = self.session.budget
        if budget is None or turn.spent or not turn.translator.goes_on:
            return
        used = self._books.list_price(turn.input.model, turn.translator.usage, self._books.clock.now())
        if reached(budget, self.session.usage, more_micros=used):
            turn.spent = True
            await self._conversation.interrupt()

    async def frame(self, frame: Frame) -> None:
        """Take a frame; it is written soon. Raises what writing an earlier one failed with."""
        turn = self._turn
        if turn is None:
            return
        if turn.behind.failed is not None:
            raise turn.behind.failed
        if turn.lost:
            return
        output = turn.translator.feed(frame)
        if turn.translator.speaking:
            turn.told.clear()
        else:
            turn.told.set()
        if self._gave_up(turn, output):
            turn.lost = True
            self._conversation.doubt()
            return
        self._follow_calls(turn, output)
        if turn.replaying:
            # The message that is said again is in the log and in the transcript already.
            turn.replaying = not output.settled
            return
        position = turn.recorder.feed(frame)
        if output or output.results or position is not None:
            turn.called = turn.called or bool(output.calls)
            turn.behind.put(output, position)
            await turn.behind.room()
        if output.settled:
            await self._spend(turn)

    def note(self, event: Mapping[str, Any]) -> None:
        """Write an event that is not the process's own, in its place among what the process says."""
        turn = self._turn
        if turn is None or turn.lost:
            return
        output = turn.translator.noted(event)
        if output:
            turn.behind.put(output, None)

    def reused(self, tool_use_id: str) -> None:
        """The result of this call, when it comes, is marked as one that was kept."""
        if self._turn is not None:
            self._turn.translator.reused.add(tool_use_id)

    def hand_over(self) -> None:
        """The server stops: the running turn ends here without an end in the log, and another replica goes on with it."""
        if self._turn is not None and self._turn.input.durable:
            self._turn.lost = self._handed_over = True

    def given(self, tool_use_id: str) -> None:
        """The process has been given the client's answer to this call."""
        if self._turn is not None:
            self._turn.open_calls.discard(tool_use_id)
            self._conversation.goes_on()

    def _follow_calls(self, turn: _Turn, output: Output) -> None:
        """Say when the turn only waits for its client, and when tools that ran beside that have ended."""
        turn.at_work |= {call.tool_use_id for call in output.calls}
        turn.at_work -= {tool_use_id for tool_use_id, _ in output.results}
        if turn.open_calls and (output.settled or output.results) and not turn.translator.speaking:
            self._conversation.waits(quiet=turn.at_work <= turn.open_calls)

    def _gave_up(self, turn: _Turn, output: Output) -> bool:
        """A process that is being stopped takes the silence of the client for a refusal: the client never refused."""
        turn.open_calls |= {call.tool_use_id for call in output.calls if call.kind != "tool"}
        if not turn.input.durable or self.interrupted:
            return False
        return any(tool_use_id in turn.open_calls for tool_use_id, _ in output.results)

    async def end(self, end: TurnEnd) -> None:
        """Write how the turn ended; what waits for an answer of the client stays as it is if the process is lost."""
        turn = self._turn
        if turn is None:
            return
        end = replace(end, interrupted=end.interrupted or self.interrupted, suspended=end.suspended or turn.lost)
        try:
            left = await turn.behind.stop()
            if self._handed_over:
                await turn.behind.write(left)
                return
            unsaid = turn.translator.close().events
            if turn.session is None or turn.called or not await self._end_alone(turn, turn.session, end, left, unsaid):
                await turn.behind.write(left)
                if turn.behind.failed is not None:
                    raise turn.behind.failed  # an end without what was said before it would lose that for good
                stored = await self._books.db.run(lambda tx: self._end(tx, turn, end, unsaid))
                await self._books.log.publish(self.session.id, stored)
        except NotFound:
            pass  # deleted in the middle of the turn
        except LeaseLost:
            self._on_lost()  # another replica goes on with it
        except StorageUnavailable:
            log.exception("session.end_not_written", session=self.session.id)
        finally:
            self._turn = None
            self._idle.set()
            await turn.cleanup.aclose()
            self._on_change()

    # Writing behind ---------------------------------------------------------------------------------------------------

    async def _write(self, turn: _Turn, run: Sequence[Entry]) -> None:
        try:
            if turn.called or any(output.calls or output.results or output.threads for output, _ in run):
                stored = await self._books.db.run(lambda tx: self._commit(tx, turn, run))
            else:
                stored, mark = await self._books.db.write_patiently(self._said(turn, run))
                self._moved(turn, mark, len(stored))
        except LeaseLost:
            self._on_lost()
            raise
        turn.inflight.done(one.id for one in stored)
        await self._books.log.publish(self.session.id, stored)
        if turn.called and any(output.settled or output.results for output, _ in run):
            self._on_change()

    async def _commit(self, tx: AsyncConnection, turn: _Turn, run: Sequence[Entry]) -> list[Stored]:
        """One batch: events, calls, results, transcript, and the status that follows from them."""
        books, principal, session = self._books, self._principal, self.session.id
        now = books.clock.now()
        stored, mark = await tx.run_sync(self._said(turn, run))
        self._moved(turn, mark, len(stored))
        for output, _ in run:
            await records.add_calls(tx, principal, session, output.calls)
            for thread_id, name, status in output.threads:
                await note_thread(tx, principal, self.session, thread_id, name=name, status=status, now=now)
        results = [result for output, _ in run for result in output.results]
        if results:
            stored += await self._note_results(tx, results)
        if turn.called and any(output.settled for output, _ in run):
            stored += await self._ask_client(tx)
        return stored

    def _said(self, turn: _Turn, run: Sequence[Entry]) -> Callable[[sa.Connection], tuple[list[Stored], Mark]]:
        events = [event for output, _ in run for event in output.events]
        return self._note(events, {}, _grown(turn, run), model=turn.input.model)

    @staticmethod
    def _moved(turn: _Turn, mark: Mark, written: int) -> None:
        before, turn.mark = turn.mark, mark
        if mark != Mark(before.seq + written, before.version):
            turn.session = None  # somebody else has written to it

    async def _note_results(self, tx: AsyncConnection, results: Sequence[tuple[str, dict[str, Any]]]) -> list[Stored]:
        """Calls that have run; and the client's results that came through `/v1/messages`."""
        books, principal, session = self._books, self._principal, self.session.id
        known = {call.tool_use_id: call for call in await records.calls_of(tx, principal, session)}
        now, events = books.clock.now(), []
        unheard: list[dict[str, Any]] = []
        for tool_use_id, output in results:
            call = known.get(tool_use_id)
            if call is None:
                continue
            if call.kind == "custom" and call.answered_at is None:
                events.append({"type": "user.custom_tool_result", "custom_tool_use_id": call.event_id, **output})
            if call.kind in records.SANDBOX_KINDS and call.answer is None:
                unheard.append(records.cancelled_event(call, output))
            elif call.kind in records.SANDBOX_KINDS and "result" in (call.answer or {}):
                unheard.append({"type": "agent.tool_result", "tool_use_id": call.event_id, **output})  # denied
            await records.set_output(tx, principal, session, call, output=output, now=now)
        if events:
            events += self.running_events()
            await records.change_session(tx, principal, session, status=records.RUNNING, stop_reason=None)
        return await books.log.write(tx, principal, session, [*unheard, *events])

    async def _ask_client(self, tx: AsyncConnection) -> list[Stored]:
        """The model message is complete: does it wait for the client?"""
        pending = await records.calls_of(tx, self._principal, self.session.id, open_only=True)
        if not pending:
            return []
        self._conversation.allow_seconds(None)
        reason = {"type": "requires_action", "event_ids": [call.event_id for call in pending]}
        await records.change_session(tx, self._principal, self.session.id, status=records.IDLE, stop_reason=reason)
        return await self._books.log.write(tx, self._principal, self.session.id, self.idle_events(reason))

    # The end ----------------------------------------------------------------------------------------------------------

    async def _end_alone(
        self, turn: _Turn, session: Session, end: TurnEnd, left: Sequence[Entry], unsaid: Sequence[dict[str, Any]]
    ) -> bool:
        """The end of a turn that nobody else has written to and that called nothing: all in one transaction.

        False when somebody wrote meanwhile; then nothing has happened.
        """
        books = self._books
        events = [event for output, _ in left for event in output.events]
        closing, values = self._closing(turn, session, end, queued=False)
        closing = [*unsaid, *closing]

        grown = _grown(turn, left) if end.kept else {}
        write = self._note([*events, *closing], values, grown, model=turn.input.model, at=turn.mark)

        def work(tx: sa.Connection) -> tuple[list[Stored], Mark]:
            written = write(tx)
            if not end.kept:
                records.cut_messages_now(tx, self._principal, session.id, turn.start)
            return written

        try:
            stored, mark = await books.db.write_patiently(work)
        except MovedOn:
            return False
        self._keep(turn, _after(session, values), end, mark)
        await books.log.publish(session.id, stored)
        return True

    async def _end(
        self, tx: AsyncConnection, turn: _Turn, end: TurnEnd, unsaid: Sequence[dict[str, Any]]
    ) -> list[Stored]:
        books, principal, session_id = self._books, self._principal, self.session.id
        session = await records.get_held(tx, principal, session_id, self.fence)
        owed = bool(session.awaited) or (end.suspended and await self._unheard(tx, turn))
        waits = owed and (end.suspended or not end.interrupted)
        if session.ended or waits or (turn.lost and not end.interrupted):
            # The process is gone. What the client owes, or has answered while the process went, is for the next one.
            await records.change_session(tx, principal, session_id, **_worked(turn, session, end, books))
            return []
        if not end.kept:
            await records.cut_messages(tx, principal, session_id, turn.start)
        cancelled = await records.cancel_calls(tx, principal, session_id, books.clock.now()) if turn.called else []
        queued = bool(await books.log.queued(tx, principal, session_id, TURN_EVENTS))
        closing, values = self._closing(turn, session, end, queued=queued)
        events = [*unsaid, *cancelled, *closing]
        stored, mark = await books.log.write_with(tx, principal, session_id, events, values, fence=self.fence)
        self._keep(turn, None if queued else _after(session, values), end, mark)
        return stored

    async def _unheard(self, tx: AsyncConnection, turn: _Turn) -> bool:
        """Whether the client has answered a call of the turn that its process was not given any more."""
        calls = await records.calls_of(tx, self._principal, self.session.id) if turn.open_calls else []
        return any(
            call.tool_use_id in turn.open_calls and call.answer is not None and "cancelled" not in call.answer
            for call in calls
        )

    def _closing(
        self, turn: _Turn, session: Session, end: TurnEnd, *, queued: bool
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The last events of the turn, and what the session's row becomes."""
        values = _worked(turn, session, end, self._books)
        outcome = outcome_of(turn.translator, end)
        if turn.spent or reached(session.budget, values["usage"]):
            # What is queued waits until the budget is raised.
            outcome, queued = replace(outcome, stop_reason=BUDGET_REACHED), False
        events: list[dict[str, Any]] = []
        if self.interrupted:
            values["outcomes"], events = interrupted(session.outcomes, self._books.clock.now())
        elif outcome.stop_reason == END_TURN and more_to_do(session.outcomes):
            queued = True
        if outcome.error is not None:
            events.append({"type": "session.error", "error": dict(outcome.error)})
        if queued:
            return events, values | {"status": records.RUNNING, "stop_reason": None}
        usage = {"type": "session.usage", "usage": usage_to_wire(values["usage"]), "budget": session.budget}
        events += [usage, *self.idle_events(outcome.stop_reason, outcome.stop_details)]
        return events, values | {"status": records.IDLE, "stop_reason": dict(outcome.stop_reason)}

    def _keep(self, turn: _Turn, session: Session | None, end: TurnEnd, mark: Mark) -> None:
        """Remember the session as it is now: the next turn need not read it again."""
        messages = turn.recorder.messages if end.kept else turn.recorder.messages[: turn.start]
        self._kept = _Kept(messages, session, mark)

    async def take_back(self, session: Session) -> list[Message]:
        """The session's server died in a turn whose caller will send it again: forget the turn; what is left of the
        transcript. Raises LeaseLost, NotFound, StorageUnavailable."""
        books, principal, session_id = self._books, self._principal, session.id
        error = error_event("unknown_error", "The server that ran this turn stopped before it ended. Send it again.")
        async with books.db.transaction() as tx:
            present = await records.get_held(tx, principal, session_id, self.fence)
            turn = present.turn or {}
            if "start" in turn:
                await records.cut_messages(tx, principal, session_id, int(turn["start"]))
            events = await records.cancel_calls(tx, principal, session_id, books.clock.now())
            if (unfinished := await books.log.unfinished(tx, principal, session_id)) is not None:
                events.append(unfinished.end)
            events += [{"type": "session.error", "error": dict(error)}, *self.idle_events(EXHAUSTED)]
            await records.change_session(
                tx, principal, session_id, status=records.IDLE, stop_reason=dict(EXHAUSTED), turn=None
            )
            stored = await books.log.write(tx, principal, session_id, events, fence=self.fence)
            messages = await records.load_messages(tx, principal, session_id)
        self._kept = None
        await books.log.publish(session_id, stored)
        return messages

    def running_events(self) -> list[dict[str, Any]]:
        """The session works."""
        return [{"type": "session.status_running"}, {"type": "session.thread_status_running", **self._thread()}]

    def idle_events(self, reason: Mapping[str, Any], details: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The session waits, and for what."""
        why: dict[str, Any] = {"stop_reason": dict(reason)}
        if details is not None:
            why["stop_details"] = dict(details)
        return [
            {"type": "session.thread_status_idle", **self._thread(), **why},
            {"type": "session.status_idle", **why},
        ]

    def _thread(self) -> dict[str, Any]:
        return {"session_thread_id": self.session.thread_id, "agent_name": self.session.agent_name}


def _ran(call: CallRow) -> bool:
    return "output" in (call.answer or {})


def _worked(turn: _Turn, session: Session, end: TurnEnd, books: Books) -> dict[str, Any]:
    """What every end of a turn writes."""
    active = session.active_ms + round((books.clock.monotonic() - turn.began) * 1000)
    return {"usage": with_usage(session.usage, end, books.list_price), "active_ms": active, "turn": None}


def _grown(turn: _Turn, run: Sequence[Entry]) -> dict[int, Message]:
    return {at: turn.recorder.messages[at] for _, at in run if at is not None}


def _after(session: Session, values: Mapping[str, Any]) -> Session:
    outcomes = values.get("outcomes", session.outcomes)
    return replace(session, usage=values["usage"], active_ms=values["active_ms"], outcomes=outcomes)


async def _show(turn: _Turn, outputs: Sequence[Output]) -> None:
    for thread_id in dict.fromkeys(output.thread_id for output in outputs):
        deltas = [one for output in outputs if output.thread_id == thread_id for one in output.previews]
        await turn.inflight.show(deltas, thread_id=thread_id)
