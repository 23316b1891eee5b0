"""What happens in a conversation, written into its session's event log, through whichever door it happens.

The frames of a turn are taken at once and written behind, in order: a batch is whatever came while the batch before was
being committed, so the stream of tokens never waits for the database, and a busy session costs fewer transactions.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import LeaseLost, NotFound, StorageUnavailable, UpstreamError, WrapperError
from claude_wrapper.ids import Ids
from claude_wrapper.sessions import records
from claude_wrapper.sessions.conversation import Conversation
from claude_wrapper.sessions.eventlog import EventLog, InFlight, Stored, answering
from claude_wrapper.sessions.mcpservers import shown_names
from claude_wrapper.sessions.ownership import Ownership
from claude_wrapper.sessions.records import CallRow, Session
from claude_wrapper.sessions.spec import Message, TurnEnd, TurnInput
from claude_wrapper.sessions.threads import note_thread
from claude_wrapper.sessions.transcript import Recorder, names_in
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.state import SharedState
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.wire.managed import (
    END_TURN,
    EXHAUSTED,
    Outcome,
    Output,
    TurnTranslator,
    error_event,
    upstream_error,
)
from claude_wrapper.wire.managed_mcp import McpStatus
from claude_wrapper.wire.streamjson import Frame
from claude_wrapper.wire.usage import Usage

log = structlog.get_logger(__name__)

TURN_EVENTS: Final = ("user.message", "user.define_outcome")
"""Events of the client that a turn answers."""
_CATCH_UP_SECONDS: Final = 2.0
_BEHIND: Final = 512
"""Outputs that may wait for the database; past that the turn waits for it."""


@dataclass(frozen=True, slots=True)
class Books:
    """What sessions are written with."""

    db: Database
    log: EventLog
    state: SharedState
    own: Ownership
    clock: Clock
    ids: Ids


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
    told: asyncio.Event
    """Set while no model message is being said: what its caller may have been answered with already."""
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
        self.interrupted = False
        """The client ended the running turn."""
        self._books = books
        self._principal = principal
        self._conversation = conversation
        self._on_change = on_change
        self._on_lost = on_lost
        self._turn: _Turn | None = None
        self._mcp = McpStatus()
        self._waiting: list[tuple[Output, int | None]] = []
        self._writing: asyncio.Task[None] | None = None
        self._failed: WrapperError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    async def caught_up(self) -> None:
        """Return when what the process has said until now is in the log; who was just answered finds it there."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CATCH_UP_SECONDS):
                if self._turn is not None and self._conversation.awaiting_tools:
                    # A caller has its calls a moment before the message that made them is over.
                    await self._turn.told.wait()
                if self._writing is not None:
                    await asyncio.wait({self._writing})
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
            async with books.db.transaction() as tx:
                await records.get_held(tx, self._principal, session, self.fence)
                messages = await records.load_messages(tx, self._principal, session)
                recorder = Recorder(messages)
                past = tuple(messages)
                start = len(messages) - 1
                if turn_input.replay is None:
                    start = recorder.user(turn_input.content)
                    await records.save_message(tx, self._principal, session, start, messages[start])
                events: list[dict[str, Any]] = []
                if not turn_input.durable:
                    events.append({"type": "user.message", "content": _shown_content(turn_input.content)})
                    turn_input = replace(turn_input, past=past)
                if turn_input.replay is None:
                    events += self.running_events()
                stored = await books.log.write(tx, self._principal, session, events)
                running = {"start": start, "durable": turn_input.durable}
                await records.change_session(
                    tx, self._principal, session, status=records.RUNNING, stop_reason=None, turn=running
                )
                known = await records.calls_of(tx, self._principal, session)
                if self.taking:
                    await books.log.processed(tx, self._principal, session, self.taking)
            await books.log.publish(session, stored)
            self._mcp.begin(shown_names(self.session.agent))
            translator = TurnTranslator(books.ids.new, self.decide, self._mcp)
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
            self._turn = _Turn(
                translator, recorder, inflight, turn_input, now, start, replaying, cleanup, opened, asyncio.Event()
            )
            self._failed, self.taking, self.interrupted = None, (), False
        return turn_input

    async def frame(self, frame: Frame) -> None:
        """Take a frame; it is written soon. Raises what writing an earlier one failed with."""
        turn = self._turn
        if turn is None:
            return
        if self._failed is not None:
            raise self._failed
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
        if turn.replaying:
            # The message that is said again is in the log and in the transcript already.
            turn.replaying = not output.settled
            return
        position = turn.recorder.feed(frame)
        if output or output.results or position is not None:
            self._waiting.append((output, position))
            self._write_behind()
            if len(self._waiting) > _BEHIND and self._writing is not None:
                await asyncio.wait({self._writing})

    def note(self, event: Mapping[str, Any]) -> None:
        """Write an event that is not the process's own, in its place among what the process says."""
        turn = self._turn
        if turn is None or turn.lost:
            return
        output = turn.translator.noted(event)
        if output:
            self._waiting.append((output, None))
            self._write_behind()

    def reused(self, tool_use_id: str) -> None:
        """The result of this call, when it comes, is marked as one that was kept."""
        if self._turn is not None:
            self._turn.translator.reused.add(tool_use_id)

    def given(self, tool_use_id: str) -> None:
        """The process has been given the client's answer to this call."""
        if self._turn is not None:
            self._turn.open_calls.discard(tool_use_id)

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
            await self._flush()
            await self._books.db.run(lambda tx: self._end(tx, turn, end))
            await self._books.log.publish(self.session.id, self._ended)
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

    _ended: Sequence[Stored] = ()

    # Writing behind ---------------------------------------------------------------------------------------------------

    def _write_behind(self) -> None:
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write(), name=f"journal {self.session.id}")

    async def _flush(self) -> None:
        while self._waiting and self._failed is None:
            self._write_behind()
            if self._writing is not None:
                await asyncio.wait({self._writing})
        if self._writing is not None:
            await asyncio.wait({self._writing})
        self._waiting.clear()

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                turn = self._turn
                if turn is None:
                    return
                at = 0
                while at < len(batch):
                    previews = bool(batch[at][0].previews)
                    to = at
                    while to < len(batch) and bool(batch[to][0].previews) == previews:
                        to += 1
                    await self._write_run(turn, batch[at:to])
                    at = to
        except WrapperError as error:
            self._failed = error
            if isinstance(error, LeaseLost):
                self._on_lost()
        except Exception as error:  # told to the turn, which ends
            log.exception("journal.failed", session=self.session.id)
            self._failed = WrapperError(f"the turn could not be written down: {type(error).__name__}")

    async def _write_run(self, turn: _Turn, run: Sequence[tuple[Output, int | None]]) -> None:
        """Outputs that all have previews, or all have none."""
        for thread_id in dict.fromkeys(output.thread_id for output, _ in run if output.previews):
            deltas = [one for output, _ in run if output.thread_id == thread_id for one in output.previews]
            await turn.inflight.show(deltas, thread_id=thread_id)
        if any(output.events or output.results or output.settled or at is not None for output, at in run):
            stored = await self._books.db.run(lambda tx: self._commit(tx, turn, run))
            turn.inflight.done(one.id for one in stored)
            await self._books.log.publish(self.session.id, stored)
            if any(output.settled or output.results for output, _ in run):
                self._on_change()

    async def _commit(self, tx: AsyncConnection, turn: _Turn, run: Sequence[tuple[Output, int | None]]) -> list[Stored]:
        """One batch: events, calls, results, transcript, and the status that follows from them."""
        books, principal, session = self._books, self._principal, self.session.id
        now = books.clock.now()
        events = [event for output, _ in run for event in output.events]
        if events:
            stored = await books.log.write(tx, principal, session, events, fence=self.fence)
        else:
            await records.guard(tx, principal, session, self.fence)
            stored = []
        for position in sorted({at for _, at in run if at is not None}):
            message = turn.recorder.messages[position]
            model = turn.input.model if message.role == "assistant" else ""
            await records.save_message(tx, principal, session, position, message, model=model)
        for output, _ in run:
            await records.add_calls(tx, principal, session, output.calls)
            for thread_id, name, status in output.threads:
                await note_thread(tx, principal, self.session, thread_id, name=name, status=status, now=now)
        results = [result for output, _ in run for result in output.results]
        if results:
            stored += await self._note_results(tx, results)
        if any(output.settled for output, _ in run):
            stored += await self._ask_client(tx)
        return stored

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
            if call.kind in records.SANDBOX_KINDS and (call.answer is None or "result" in call.answer):
                # No worker answered it: it was denied, or the process answered in its place.
                unheard.append({"type": "agent.tool_result", "tool_use_id": call.event_id, **output})
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

    async def _end(self, tx: AsyncConnection, turn: _Turn, end: TurnEnd) -> None:
        books, principal, session_id = self._books, self._principal, self.session.id
        session = await records.get_held(tx, principal, session_id, self.fence)
        active = session.active_ms + round((books.clock.monotonic() - turn.began) * 1000)
        values: dict[str, Any] = {"usage": _with_usage(session.usage, end), "active_ms": active, "turn": None}
        self._ended = ()
        if session.ended or (session.awaited and (end.suspended or not end.interrupted)):
            # The process is gone and the client owes answers: the turn goes on when they come.
            await records.change_session(tx, principal, session_id, **values)
            return
        if not end.kept:
            await records.cut_messages(tx, principal, session_id, turn.start)
        await records.cancel_calls(tx, principal, session_id, books.clock.now())
        outcome = _outcome(turn, end)
        events = turn.translator.close().events
        if outcome.error is not None:
            events.append({"type": "session.error", "error": dict(outcome.error)})
        if await books.log.queued(tx, principal, session_id, TURN_EVENTS):
            values |= {"status": records.RUNNING, "stop_reason": None}
        else:
            usage = {"type": "session.usage", "usage": values["usage"], "budget": session.budget}
            events += [usage, *self.idle_events(outcome.stop_reason, outcome.stop_details)]
            values |= {"status": records.IDLE, "stop_reason": dict(outcome.stop_reason)}
        await records.change_session(tx, principal, session_id, **values)
        self._ended = await books.log.write(tx, principal, session_id, events)

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
            await records.cancel_calls(tx, principal, session_id, books.clock.now())
            events = [*await books.log.unfinished_request(tx, principal, session_id)]
            events += [{"type": "session.error", "error": dict(error)}, *self.idle_events(EXHAUSTED)]
            await records.change_session(
                tx, principal, session_id, status=records.IDLE, stop_reason=dict(EXHAUSTED), turn=None
            )
            stored = await books.log.write(tx, principal, session_id, events, fence=self.fence)
            messages = await records.load_messages(tx, principal, session_id)
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


def _outcome(turn: _Turn, end: TurnEnd) -> Outcome:
    """What the client is told: what the broker saw, else what the CLI said."""
    if end.interrupted:
        return Outcome(END_TURN)
    error, told = end.error, turn.translator.outcome
    if told is not None and (error is None or told.stop_reason["type"] != "retries_exhausted"):
        return told
    if isinstance(error, UpstreamError):
        return Outcome(EXHAUSTED, error=upstream_error(error.status, error.message))
    if error is not None:
        return Outcome(EXHAUSTED, error=error_event("unknown_error", error.message))
    return told or Outcome(END_TURN)


def _with_usage(usage: Mapping[str, Any], end: TurnEnd) -> dict[str, Any]:
    """The session's usage with the turn's calls, as the broker saw them."""
    turn = sum((call.usage for call in end.calls), start=Usage())
    cached = usage.get("cache_creation") or {}
    tools = usage.get("server_tool_use") or {}
    return {
        "input_tokens": usage.get("input_tokens", 0) + turn.input_tokens,
        "output_tokens": usage.get("output_tokens", 0) + turn.output_tokens,
        "cache_read_input_tokens": usage.get("cache_read_input_tokens", 0) + turn.cache_read_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": cached.get("ephemeral_5m_input_tokens", 0) + turn.cache_write_5m_tokens,
            "ephemeral_1h_input_tokens": cached.get("ephemeral_1h_input_tokens", 0) + turn.cache_write_1h_tokens,
        },
        "server_tool_use": {
            "web_search_requests": tools.get("web_search_requests", 0) + turn.web_search_requests,
            "web_fetch_requests": tools.get("web_fetch_requests", 0) + turn.web_fetch_requests,
        },
    }


def _shown_content(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [block for block in blocks if block.get("type") in {"text", "image", "document"}]
