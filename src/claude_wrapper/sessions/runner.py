"""Runs one session on this replica, as long as there is something to do.

Everything that a client wants is in the event log before anybody acts on it: the runner takes messages from there in
order, and on the way looks for interrupts and answers. So it does not matter which replica took the request, and after a
restart the next look into the log finds what was left: a queue, or a turn whose calls have their answers now, which goes
on in a fresh process that says the last model message again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import structlog

from claude_wrapper.broker.calls import Credential, CredentialKind
from claude_wrapper.errors import Conflict, HeldElsewhere, LeaseLost, NotFound, WrapperError
from claude_wrapper.sessions import records
from claude_wrapper.sessions.agentspec import ASK, DENY, Setup
from claude_wrapper.sessions.budgets import BUDGET_REACHED, reached
from claude_wrapper.sessions.conversation import Conversation
from claude_wrapper.sessions.evaluation import Evaluation, content_of, marking
from claude_wrapper.sessions.eventlog import Stored
from claude_wrapper.sessions.grading import Grader
from claude_wrapper.sessions.journal import TURN_EVENTS, Books, SessionJournal
from claude_wrapper.sessions.leg import Leg
from claude_wrapper.sessions.outcomes import DEFINED, Step, interrupted, more_to_do, next_step, refused
from claude_wrapper.sessions.records import CallRow, Session
from claude_wrapper.sessions.spec import Message, OnDisconnect, TurnInput
from claude_wrapper.sessions.takeover import MAX_ATTEMPTS, UNSURE, Continuation, How, continuation, known_result
from claude_wrapper.sessions.transcript import Resumption, client_view, next_turn, resumption
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.wire.managed import END_TURN, EXHAUSTED, error_event
from claude_wrapper.wire.managed_tools import SANDBOX_PREFIX

log = structlog.get_logger(__name__)

INTERRUPTS: Final = ("user.interrupt",)
_WRITTEN_SECONDS: Final = 2.0
_WRITTEN_PAUSE: Final = 0.01


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """How turns are run."""

    turn_seconds: float | None
    """Longest turn; None: what the organisation's security level says."""
    parked_seconds: float
    """How long a process waits for the client; after that it is given up, and the answer starts another."""


class Host(Protocol):
    """What a runner asks of the sessions that it belongs to."""

    async def open(self, session: Session) -> tuple[Conversation, SessionJournal]:
        """The session's conversation, taken and restored if it must be. Raises HeldElsewhere."""
        ...

    def holds(self, session: str) -> bool:
        """Whether this replica holds the session."""
        ...

    async def take_back(self, session: Session, journal: SessionJournal) -> None:
        """Forget a turn of the Messages door whose server died."""
        ...

    async def credential(self, principal: Principal) -> Credential:
        """What the session's model requests are made with. Raises CredentialMissing."""
        ...

    async def setup(self, session: Session, credential: Credential) -> Setup:
        """The agent's set-up. Raises PermissionDenied."""
        ...


class Runner:
    """One session's turns. `wake` whenever something was written for it."""

    def __init__(
        self, books: Books, host: Host, settings: RunnerSettings, session: str, principal: Principal, *, grader: Grader
    ) -> None:
        """`principal` is who asked: the turns are theirs, and so is the upstream credential."""
        self.principal = principal
        self.task: asyncio.Task[None] | None = None
        """What runs it."""
        self._books = books
        self._host = host
        self._grader = grader
        self._settings = settings
        self._session = session
        self._woken = asyncio.Event()
        self._answers: dict[str, asyncio.Future[Mapping[str, Any]]] = {}
        self._delivered: set[str] = set()
        self._ran: dict[str, Mapping[str, Any]] = {}
        self._unsure: frozenset[str] = frozenset()
        self._closing = False
        self._draining = False

    def drain(self) -> None:
        """The server is going to stop: end the turn that runs, begin none, wait for no client."""
        self._draining = True
        self._woken.set()

    def close(self) -> None:
        """The server stops: the turn that runs is left in the log as it is, and another replica goes on with it."""
        self._closing = self._draining = True
        self._woken.set()

    @property
    def woken(self) -> bool:
        """Somebody called and it has not looked yet."""
        return self._woken.is_set()

    def wake(self) -> None:
        """Look into the log."""
        self._woken.set()

    async def run(self) -> None:
        """Work until there is nothing to do. Raises HeldElsewhere when another replica holds the session."""
        while not self._draining:
            self._woken.clear()
            try:
                if not await self._step() and not self._woken.is_set():
                    return
            except HeldElsewhere:
                raise
            except LeaseLost:
                log.info("session.moved", session=self._session)  # whoever took it goes on

    # One step ---------------------------------------------------------------------------------------------------------

    async def _step(self) -> bool:
        """Do the next thing; False when there is none."""
        books, principal = self._books, self.principal
        before = self._host.holds(self._session)
        try:
            async with books.db.read() as tx:
                session = await records.get_session(tx, principal, self._session)
                queue = await books.log.queued(tx, principal, self._session, (*TURN_EVENTS, "system.message"))
                interrupts = await books.log.queued(tx, principal, self._session, INTERRUPTS)
                calls = await records.calls_of(tx, principal, self._session)
        except NotFound:
            return False
        if session.ended:
            return False
        conversation, journal = await self._host.open(session)
        if not before:
            return True  # what was read before the session was taken may be out of date
        if conversation.awaiting_tools and not session.awaited:
            await self._answer_parked(conversation, calls)
            return False
        if conversation.busy:
            if interrupts:
                await self._interrupt(conversation, journal, interrupts)
            return False  # a turn of the other door; its journal wakes us
        if interrupts:
            await self._interrupt_idle(journal, interrupts)
            return True
        if session.awaited:
            return False
        if session.status == records.RUNNING and await self._go_on(session, journal, conversation, calls):
            return True
        return await self._work(session, journal, conversation, queue)

    async def _work(
        self, session: Session, journal: SessionJournal, conversation: Conversation, queue: Sequence[Stored]
    ) -> bool:
        """Begin something new: a turn, or an evaluation; False when there is nothing."""
        queue = [one for one in queue if one.type in TURN_EVENTS or queue[0].type in TURN_EVENTS]
        goes_on = session.status == records.RUNNING or session.stop_reason == BUDGET_REACHED
        step = next_step(session.outcomes, [one.type for one in queue], goes_on=goes_on)
        if step is Step.REST:
            if session.status == records.RUNNING:
                await self._lost(journal)
            return False
        if reached(session.budget, session.usage):
            return False  # until it is raised
        if step is Step.EVALUATE:
            judging = Evaluation(self._books, self._grader, journal, self.principal)
            await judging.run(session, self._woken, lambda: self._closing)
        else:
            await self._next(session, journal, conversation, queue if step is Step.TURN else ())
        return True

    async def _next(
        self,
        session: Session,
        journal: SessionJournal,
        conversation: Conversation,
        queue: Sequence[Stored],
    ) -> None:
        """Answer the first message of the queue, with the system message that came with it; without a queue, tell the
        agent what the grader said."""
        taken = list(queue[:2] if len(queue) > 1 and queue[1].type == "system.message" else queue[:1])
        async with self._books.db.read() as tx:
            messages = await records.load_messages(tx, self.principal, self._session)
        asked = next_turn(messages, content_of(session, taken))
        journal.taking, journal.marking = taken, marking(self._books, self.principal, self._session, taken)
        await self._turn(session, journal, conversation, content=asked.content, past=asked.history)

    async def _go_on(
        self, session: Session, journal: SessionJournal, conversation: Conversation, calls: Sequence[CallRow]
    ) -> bool:
        """Go on with a turn that runs nowhere; False when there is none."""
        if session.turn is None:  # its process was given up while it waited for the client
            return await self._resume(session, journal, conversation, calls)
        await self._take_over(session, journal, conversation, calls)
        return True

    async def _take_over(
        self, session: Session, journal: SessionJournal, conversation: Conversation, calls: Sequence[CallRow]
    ) -> None:
        """The server that ran this turn died in it: go on from what is in the log."""
        turn = session.turn or {}
        attempt = int(turn.get("attempt", 1))
        self._books.own.steps["taken_over"] += 1
        log.warning("turn.taken_over", session=self._session, attempt=attempt, durable=bool(turn.get("durable")))
        if not turn.get("durable"):
            await self._host.take_back(session, journal)
            return
        books, principal = self._books, self.principal
        async with books.db.transaction() as tx:
            await records.guard(tx, principal, self._session, journal.fence)
            messages = await records.load_messages(tx, principal, self._session)
            unfinished = await books.log.unfinished(tx, principal, self._session)
            texts = None if unfinished is None else unfinished.texts
            found = continuation(messages, calls, texts=texts, start=turn.get("start"))
            await records.cut_messages(tx, principal, self._session, found.position)
            if found.last is not None:
                await records.save_messages(tx, principal, self._session, {found.position - 1: found.last})
            events = [] if unfinished is None else [unfinished.end]
            events.append({"type": "session.status_rescheduled"})
            stored = await books.log.write(tx, principal, self._session, events, fence=journal.fence)
        await books.log.publish(self._session, stored)
        if found.how is How.FINISHED:
            await self._finish(session, journal)
        elif attempt >= MAX_ATTEMPTS:
            await self._lost(journal)
        else:
            journal.attempt = attempt + 1
            self._ran, self._unsure = dict(found.ran), found.unsure
            await self._go_on_with(session, journal, conversation, found)

    async def _go_on_with(
        self, session: Session, journal: SessionJournal, conversation: Conversation, found: Continuation | Resumption
    ) -> None:
        """Run the turn from where it was found; what ran of it is in `_ran`."""
        self._delivered.clear()
        self._answers.clear()
        await self._turn(
            session,
            journal,
            conversation,
            content=found.content,
            past=found.history,
            replay=found.replayed,
        )

    async def _finish(self, session: Session, journal: SessionJournal) -> None:
        """The turn had said everything when its server died: write its end."""
        books, principal = self._books, self.principal
        async with books.db.transaction() as tx:
            await records.guard(tx, principal, self._session, journal.fence)
            waiting = await books.log.queued(tx, principal, self._session, TURN_EVENTS)
            values: dict[str, Any] = {"status": records.RUNNING, "stop_reason": None, "turn": None}
            events: list[dict[str, Any]] = []
            if not waiting and not more_to_do(session.outcomes):
                values |= {"status": records.IDLE, "stop_reason": dict(END_TURN)}
                usage = {"type": "session.usage", "usage": session.usage, "budget": session.budget}
                events = [usage, *journal.idle_events(END_TURN)]
            await records.change_session(tx, principal, self._session, **values)
            stored = await books.log.write(tx, principal, self._session, events, fence=journal.fence)
        await books.log.publish(self._session, stored)

    async def _resume(
        self,
        session: Session,
        journal: SessionJournal,
        conversation: Conversation,
        calls: Sequence[CallRow],
    ) -> bool:
        """Go on with a turn whose process is gone and whose calls are answered; False when there is none."""
        async with self._books.db.read() as tx:
            messages = await records.load_messages(tx, self.principal, self._session)
        found = resumption(messages)
        if found is None:
            return False
        said = {str(block.get("id")) for block in found.replayed if block.get("type") == "tool_use"}
        ours = [call for call in calls if call.tool_use_id in said]
        if any("cancelled" in (call.answer or {}) for call in ours) or not any(call.kind != "tool" for call in ours):
            return False
        async with self._books.db.transaction() as tx:
            await records.guard(tx, self.principal, self._session, journal.fence)
            await records.cut_messages(tx, self.principal, self._session, found.position + 1)
        self._ran = {
            call.tool_use_id: call.answer["output"]
            for call in ours
            if call.answer and "output" in call.answer and call.kind not in records.CLIENT_KINDS
        }
        await self._go_on_with(session, journal, conversation, found)
        return True

    async def _turn(
        self,
        session: Session,
        journal: SessionJournal,
        conversation: Conversation,
        *,
        content: str | list[dict[str, Any]],
        past: Sequence[Message],
        replay: list[dict[str, Any]] | None = None,
    ) -> None:
        try:
            credential = await self._host.credential(self.principal)
            made = await self._host.setup(session, credential)
        except WrapperError as error:
            await self._refuse(journal, error)
            return
        spec = made.spec
        if replay is not None and (self._ran or self._unsure):
            # What has run already must be asked about, so that it does not run again.
            past_calls = {*self._ran, *self._unsure}
            names = {str(block.get("name")) for block in replay if str(block.get("id")) in past_calls}
            spec = replace(spec, asked_tools=spec.asked_tools | names)
        seconds = self._settings.turn_seconds or made.turn_seconds
        turn_input = TurnInput(
            content=content,
            model=made.model,
            credential=credential,
            spec=spec,
            allowed_models=self.principal.allowed_models,
            history=client_view(past),
            past=past,
            system=made.system,
            overrides=made.overrides if credential.kind is CredentialKind.API_KEY else {},
            on_disconnect=OnDisconnect.CONTINUE,
            turn_seconds=seconds,
            approve=self._approver(made, journal),
            durable=True,
            replay=replay,
        )
        try:
            leg = conversation.submit(turn_input)
        except Conflict:
            return  # it was archived or deleted meanwhile: the next look finds that
        attending = asyncio.get_running_loop().create_task(self._attending(conversation, journal, leg, seconds))
        try:
            with contextlib.suppress(WrapperError):  # the journal has written what went wrong
                async for _ in leg.items():
                    pass
            await conversation.settled()
        finally:
            attending.cancel()
            await asyncio.wait({attending})
            self._answers.clear()
            self._delivered.clear()
            self._ran, self._unsure = {}, frozenset()

    # While a turn runs ------------------------------------------------------------------------------------------------

    async def _attending(self, conversation: Conversation, journal: SessionJournal, leg: Leg, seconds: float) -> None:
        with contextlib.suppress(LeaseLost):  # the journal finds out with its next write, and ends the turn
            await self._attend(conversation, journal, leg, seconds)

    async def _attend(self, conversation: Conversation, journal: SessionJournal, leg: Leg, seconds: float) -> None:
        """Hand over what the client sends during the turn; give the process up when it waits too long."""
        waiting = False
        self._woken.set()
        leg.started.add_done_callback(lambda _: self._woken.set())
        while True:
            try:
                async with asyncio.timeout(self._settings.parked_seconds if waiting else None):
                    await self._woken.wait()
            except TimeoutError:
                log.info("turn.suspended", session=self._session, reason="no answer of the client")
                await conversation.suspend()
                waiting = False
                continue
            self._woken.clear()
            if self._closing and not waiting:
                journal.hand_over()
                if not leg.started.done():
                    leg.hang_up()
            if self._closing:
                await conversation.suspend()
            async with self._books.db.read() as tx:
                session = await records.get_session(tx, self.principal, self._session)
                interrupts = await self._books.log.queued(tx, self.principal, self._session, INTERRUPTS)
                calls = await records.calls_of(tx, self.principal, self._session)
            if leg.started.done():  # before that, no process is there to be told
                await self._deliver(conversation, journal, calls)
            if waiting and not session.awaited:
                conversation.allow_seconds(seconds)
            waiting = bool(session.awaited)
            if self._draining and waiting:  # as it is now: one that was answered a moment ago runs to its end here
                await conversation.suspend()
            if session.ended:
                await self._stop(conversation, journal, leg)
            elif interrupts:
                await self._interrupt(conversation, journal, interrupts)
                if not leg.started.done():
                    leg.hang_up()

    async def _stop(self, conversation: Conversation, journal: SessionJournal, leg: Leg) -> None:
        journal.interrupted = True
        if not leg.started.done():
            leg.hang_up()
        with contextlib.suppress(WrapperError):
            await conversation.interrupt()

    async def _deliver(self, conversation: Conversation, journal: SessionJournal, calls: Sequence[CallRow]) -> None:
        for call in calls:
            if call.answer is None or call.tool_use_id in self._delivered or call.kind == "tool":
                continue
            if (
                call.kind == "approval"
                and call.answer.get("result") == "allow"
                and not call.answer.keys() & {"given", "output"}
            ):
                async with self._books.db.transaction() as tx:
                    await records.guard(tx, self.principal, self._session, journal.fence)
                    await records.note_given(tx, self.principal, self._session, call)
            self._delivered.add(call.tool_use_id)
            journal.given(call.tool_use_id)
            if call.kind in records.CLIENT_KINDS:
                conversation.answer_calls([{"tool_use_id": call.tool_use_id, **call.result}])
            else:
                future = self._future(call.tool_use_id)
                if not future.done():
                    future.set_result(call.answer)

    def _future(self, tool_use_id: str) -> asyncio.Future[Mapping[str, Any]]:
        if tool_use_id not in self._answers:
            self._answers[tool_use_id] = asyncio.get_running_loop().create_future()
        return self._answers[tool_use_id]

    def _approver(
        self, made: Setup, journal: SessionJournal
    ) -> Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]:
        async def approve(request: dict[str, Any]) -> dict[str, Any]:
            tool_use_id, name = str(request.get("tool_use_id")), str(request.get("tool_name"))
            if tool_use_id in self._ran:
                return {"behavior": "deny", "message": known_result(self._ran[tool_use_id])}
            if tool_use_id in self._unsure:
                return {"behavior": "deny", "message": UNSURE}
            verdict = made.decide(name, request.get("input"))
            if verdict == DENY:
                return {"behavior": "deny", "message": f"The tool {name} is not enabled for this agent."}
            if verdict == ASK and not name.startswith(SANDBOX_PREFIX):  # of those the call itself waits
                answer = await asyncio.shield(self._future(tool_use_id))
                if answer.get("result") != "allow":
                    reason = answer.get("deny_message") or "The user does not allow this call."
                    return {"behavior": "deny", "message": str(reason)}
            else:
                try:
                    await self._written(journal, tool_use_id)
                except (LeaseLost, NotFound):
                    return {"behavior": "deny", "message": "Another server goes on with this session."}
            return {"behavior": "allow", "updatedInput": request.get("input", {})}

        return approve

    async def _written(self, journal: SessionJournal, tool_use_id: str) -> None:
        """Wait until the call is in the log: what may have run can be known there, whenever this server dies.

        Raises LeaseLost when another replica holds the session. A call that the log does not get (a sub-agent's that
        the CLI does not tell of) is not waited for long.
        """
        clock = self._books.clock
        until = clock.monotonic() + _WRITTEN_SECONDS
        while True:
            async with self._books.db.read() as tx:
                await records.check_fence(tx, self.principal, self._session, journal.fence)
                if await records.has_call(tx, self.principal, self._session, tool_use_id):
                    return
            if clock.monotonic() >= until:
                log.info("call.not_written", session=self._session, tool_use_id=tool_use_id)
                return
            await clock.sleep(_WRITTEN_PAUSE)

    # Interrupts and losses --------------------------------------------------------------------------------------------

    async def _interrupt(
        self, conversation: Conversation, journal: SessionJournal, interrupts: Sequence[Stored]
    ) -> None:
        async with self._books.db.transaction() as tx:
            await records.guard(tx, self.principal, self._session, journal.fence)
            await self._books.log.processed(tx, self.principal, self._session, interrupts)
        journal.interrupted = True
        with contextlib.suppress(WrapperError):
            await conversation.interrupt()

    async def _interrupt_idle(self, journal: SessionJournal, interrupts: Sequence[Stored]) -> None:
        """Nothing runs here: an interrupt only ends the wait for the client's answers, or the turn of a dead server."""
        books = self._books
        stored: list[Stored] = []
        async with books.db.transaction() as tx:
            session = await records.get_held(tx, self.principal, self._session, journal.fence)
            await books.log.processed(tx, self.principal, self._session, interrupts)
            outcomes, events = interrupted(session.outcomes, books.clock.now())
            if session.awaited or session.turn is not None or more_to_do(session.outcomes):
                if (unfinished := await books.log.unfinished(tx, self.principal, self._session)) is not None:
                    events.append(unfinished.end)
                events += await records.cancel_calls(tx, self.principal, self._session, books.clock.now())
                idle = {"status": records.IDLE, "stop_reason": dict(END_TURN), "turn": None, "outcomes": outcomes}
                await records.change_session(tx, self.principal, self._session, **idle)
                events += journal.idle_events(END_TURN)
                stored = await books.log.write(tx, self.principal, self._session, events, fence=journal.fence)
        await books.log.publish(self._session, stored)

    async def _answer_parked(self, conversation: Conversation, calls: Sequence[CallRow]) -> None:
        """A turn of the Messages door waits for its caller's tools, and the results came through this one."""
        waiting = conversation.awaiting_tools
        results = [
            {"type": "tool_result", "tool_use_id": call.tool_use_id, **(call.answer or {})}
            for call in calls
            if call.tool_use_id in waiting and call.answer is not None
        ]
        if len(results) < len(waiting):
            return
        with contextlib.suppress(Conflict):
            leg = conversation.answer_parked(results)
            with contextlib.suppress(WrapperError):
                async for _ in leg.items():
                    pass

    async def _lost(self, journal: SessionJournal) -> None:
        """The log says that a turn runs, and none does: its server died."""
        message = "The server that ran this turn stopped before it ended. What was said until then is kept."
        await self._close(journal, error_event("unknown_error", message))

    async def _refuse(self, journal: SessionJournal, error: WrapperError) -> None:
        """The turn cannot be run at all: its message is answered with the error."""
        books = self._books
        async with books.db.transaction() as tx:
            session = await records.get_held(tx, self.principal, self._session, journal.fence)
            await books.log.processed(tx, self.principal, self._session, journal.taking)
            seqs = [one.seq for one in journal.taking if one.type == DEFINED]
            failed = refused(session.outcomes, seqs, error.message, books.clock.now())
            await records.change_session(tx, self.principal, self._session, outcomes=failed)
        journal.taking, journal.marking = (), None
        await self._close(journal, error_event("unknown_error", error.message))

    async def _close(self, journal: SessionJournal, error: Mapping[str, Any]) -> None:
        books = self._books
        events = [{"type": "session.error", "error": dict(error)}, *journal.idle_events(EXHAUSTED)]
        async with books.db.transaction() as tx:
            cancelled = await records.cancel_calls(tx, self.principal, self._session, books.clock.now())
            await records.change_session(
                tx, self.principal, self._session, status=records.IDLE, stop_reason=dict(EXHAUSTED), turn=None
            )
            stored = await books.log.write(
                tx, self.principal, self._session, [*cancelled, *events], fence=journal.fence
            )
        await books.log.publish(self._session, stored)
