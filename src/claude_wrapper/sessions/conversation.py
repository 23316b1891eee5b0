"""One conversation: its turns in order, each on a process that holds exactly this conversation.

A turn runs as a task of its own, so that it outlives its request when it must. Whatever goes wrong, the process is left
holding what the caller believes it holds: a turn that failed, or whose caller went away, is rewound out of the CLI's
context (its retry starts from the same history); a process that cannot be brought there is thrown away, and the next
turn gets the history injected into a fresh one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import structlog

from claude_wrapper.broker.calls import UpstreamCall
from claude_wrapper.errors import (
    AgentCrashed,
    AgentTimeout,
    Conflict,
    Draining,
    InvalidRequest,
    LeaseLost,
    RateLimited,
    SpawnFailed,
    TurnInterrupted,
    UpstreamError,
    WrapperError,
)
from claude_wrapper.ids import MESSAGE, TURN
from claude_wrapper.pool.pool import Claim
from claude_wrapper.pool.requests import ClaimRequest, Keep, Kind
from claude_wrapper.sessions.bridge import SANDBOX_SERVER, Bridge, Trouble
from claude_wrapper.sessions.canary import MAIN
from claude_wrapper.sessions.concluding import failure, retell, undo
from claude_wrapper.sessions.leg import Item, Leg, Started
from claude_wrapper.sessions.permissions import Permissions
from claude_wrapper.sessions.preparing import announced, controls, give_past, initialize, past_of, set_up
from claude_wrapper.sessions.process import Resume, SlotProcess
from claude_wrapper.sessions.retelling import Retelling, retelling
from claude_wrapper.sessions.rooms import Rooms
from claude_wrapper.sessions.running import Running, binding_of, context_of, merger_for, unanswered
from claude_wrapper.sessions.spec import Content, Journal, Message, OnDisconnect, Owner, TurnEnd, TurnInput
from claude_wrapper.sessions.watch import TurnWatch

log = structlog.get_logger(__name__)


class _DiedIdle(WrapperError):
    """The conversation's own process had ended before it took the turn."""

    code = AgentCrashed.code


class Conversation:
    """A conversation of one owner. Made and found by `Conversations`."""

    def __init__(
        self,
        session: str,
        owner: Owner,
        rooms: Rooms,
        *,
        held: bool,
        on_settled: Callable[[Conversation], None],
    ) -> None:
        """`on_settled` is called when the known history changed and the conversation can be found by it again."""
        self.session = session
        self.owner = owner
        self.held = held
        """Whether the server holds the history for its caller; else the caller sends it with every request."""
        self.created_at: datetime = rooms.clock.now()
        self.last_used: float = rooms.clock.monotonic()
        self.messages: list[Message] = []
        """The history as its caller knows it."""
        self.keyed: tuple[int, str] | None = None
        """How many of the messages are hashed already, and their key: a long history is not hashed twice a turn."""
        self.head: str | None = None
        """Id of the last message that was answered."""
        self.thread_fields: Mapping[str, Any] = {}
        """What a thread was created with and its continuations do not repeat: `system`, `tools`."""
        self.resume: Resume | None = None
        self.turns = 0
        self.process: SlotProcess | None = None
        """The process that holds this conversation, while one does."""
        self.cli: str | None = None
        """Which CLI holds or held it (a launch profile's `cli`); None: none was chosen yet."""
        self.ended = False
        self.journal: Journal | None = None
        """Who writes down what happens here."""
        self.content: Content | None = None
        """Who brings the session's files, memory and skills into its process's workspace."""
        self._end = TurnEnd()
        self._began = rooms.clock.monotonic()
        """When the last turn got its process."""
        self._rooms = rooms
        self._on_settled = on_settled
        self._order = asyncio.Lock()
        self._queued = 0
        self._watch = TurnWatch()
        self._running: Running | None = None
        self._bridge: Bridge | None = None
        self._retelling: Retelling | None = None
        """How a spare that waits is given the conversation whose files were kept; None: only --resume will do."""
        self._leg: Leg | None = None
        """The request that the running turn answers at the moment."""

    # What callers ask -------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """A turn is running, parked or waiting."""
        return self._queued > 0 or self._running is not None

    @property
    def awaiting_tools(self) -> frozenset[str]:
        """Ids of the caller's tool calls that the parked turn waits for."""
        running = self._running
        if running is None or running.parked is None or self._bridge is None:
            return frozenset()
        return self._bridge.pending

    def touch(self) -> None:
        """Somebody uses it now."""
        self.last_used = self._rooms.clock.monotonic()

    def submit(self, turn_input: TurnInput) -> Leg:
        """Queue one turn. Raises RateLimited when too many wait already."""
        if self.ended:
            raise Conflict(f"session {self.session} has ended")
        if self._queued >= self._rooms.max_queued_turns:
            raise RateLimited(
                f"session {self.session}: {self._queued} turns are waiting already (limit: max_queued_turns); "
                "wait for one to end",
                retry_after=1,
            )
        task: asyncio.Task[None]

        def hung_up(leg: Leg) -> None:
            self._caller_gone(leg, task)

        leg = Leg(merger_for(turn_input, self._rooms.ids.new(MESSAGE)), hung_up)
        self._queued += 1
        task = self._rooms.spawn(self._run(turn_input, leg))
        return leg

    def answer_tools(self, turn_input: TurnInput, results: Sequence[dict[str, Any]]) -> Leg:
        """Continue the parked turn with the caller's tool results (blocks of type `tool_result`)."""
        running = self._running
        if running is None or running.parked is None or self._bridge is None:
            raise Conflict(f"session {self.session} is not waiting for tool results")
        leg = Leg(merger_for(turn_input, self._rooms.ids.new(MESSAGE)), lambda one: self._caller_gone(one, None))
        leg.start(Started(self.session, running.turn, running.started.pid, Kind.WARM.value, 0.0))
        running.leg = self._leg = leg
        running.input = turn_input
        running.user_messages.append(Message("user", turn_input.content))
        self.messages = [*turn_input.history, *running.user_messages[-1:]]
        running.process.endpoint.begin(context_of(running.turn, turn_input, leg))
        running.allow_seconds(turn_input.turn_seconds)
        parked, running.parked = running.parked, None
        self._bridge.answer(results)
        parked.set()
        return leg

    def answer_calls(self, results: Sequence[dict[str, Any]]) -> None:
        """Results of the caller's tools for the running durable turn, in any order; one too early waits."""
        if self._bridge is not None:
            self._bridge.answer(results)

    def answer_parked(self, results: list[dict[str, Any]]) -> Leg:
        """`answer_tools` by somebody who is not the parked turn's caller and knows only the results."""
        if self._running is None:
            raise Conflict(f"session {self.session} is not waiting for tool results")
        before = replace(self._running.input, content=results, history=tuple(self.messages))
        return self.answer_tools(replace(before, on_disconnect=OnDisconnect.CONTINUE), results)

    async def settled(self) -> None:
        """Return when no turn holds the conversation: what it did has been written down."""
        async with self._order:
            return

    def allow_seconds(self, seconds: float | None) -> None:
        """The running turn may take this long from now; None: without end, while a person is asked."""
        if self._running is not None:
            self._running.allow_seconds(seconds)

    def waits(self, *, quiet: bool) -> None:
        """The running durable turn waits for a person or a client; `quiet`: nothing else of it runs."""
        self._rooms.keeper.waits(self, quiet=quiet)

    def goes_on(self) -> None:
        """It has its answer."""
        self._rooms.keeper.goes_on(self)

    def doubt(self) -> None:
        """The running turn's process no longer holds what happened: it is not used again."""
        if self._running is not None:
            self._running.suspended = True

    async def suspend(self) -> None:
        """End the running turn without an end of its own: it is continued in another process."""
        if self._running is not None:
            self._running.suspended = True
            await self.interrupt()

    async def interrupt(self) -> None:
        """End the running turn early; its caller gets what there is."""
        running = self._running
        if running is not None:
            running.interrupted = True
            await running.agent_turn.interrupt()

    # The turn ---------------------------------------------------------------------------------------------------------

    async def _run(self, turn_input: TurnInput, leg: Leg) -> None:
        error: WrapperError | None = None
        last, settled = leg, False
        watch = self._rooms.watch.begin(self.owner, self.session, turn_input)
        try:
            if self._running is not None and self._running.parked is not None:
                await self.interrupt()  # a new message instead of the tool results: the parked turn is over
            async with self._order:
                self._leg, self._watch = leg, watch
                try:
                    settled = await self._turn(turn_input, leg)
                finally:
                    last, self._leg = self._leg or leg, None
        except WrapperError as failed:
            error = failed
        except asyncio.CancelledError:
            error = Draining("the turn was cancelled before it started")
            raise
        except Exception:  # the last resort of a background task: told to the caller and logged
            log.exception("turn.failed", session=self.session)
            error = WrapperError("the turn failed by an error of the server; its log has the details")
        finally:
            self._queued -= 1
            self.last_used = self._rooms.clock.monotonic()
            for one in (last, leg):
                one.finish(error)
            watch.ended(last)
            if self._rooms.versions is not None and self.cli is not None:
                self._rooms.versions.ended(self.cli, last.error, self._rooms.clock.monotonic() - self._began)
            if not settled and not self._queued:
                self._on_settled(self)

    def _settle(self, leg: Leg) -> None:
        """The leg is answered: the caller may go on from it before this turn has quite ended."""
        self.messages.append(Message("assistant", leg.merger.message()["content"]))
        self.head = leg.merger.message_id
        if self.held or self._queued == 1:
            self._on_settled(self)
        leg.finish()

    async def _turn(self, turn_input: TurnInput, leg: Leg) -> bool:
        """Run one turn; whether the conversation was settled by it."""
        journal = self.journal
        if journal is None:
            return await self._on_process(turn_input, leg)
        await self._rooms.keeper.begin(self)
        try:
            turn_input = await journal.begin(turn_input)
        except BaseException:
            self._rooms.keeper.ended(self)  # the save that was given up for this turn is still owed
            raise
        self._end = TurnEnd(Draining("the turn was cancelled"))
        try:
            return await self._on_process(turn_input, leg)
        except WrapperError as error:
            self._end = TurnEnd(error)
            raise
        finally:
            await asyncio.shield(asyncio.ensure_future(self._written(journal)))

    async def _written(self, journal: Journal) -> None:
        try:
            await journal.end(self._end)
        finally:
            self._rooms.keeper.ended(self)

    async def _on_process(self, turn_input: TurnInput, leg: Leg) -> bool:
        try:
            return await self._attempt(turn_input, leg)
        except _DiedIdle as died:
            # It had ended between two turns, before anything was asked: another process takes the turn.
            log.info("turn.moved", session=self.session, cause=str(died.__cause__))
            return await self._attempt(turn_input, leg)

    async def _attempt(self, turn_input: TurnInput, leg: Leg) -> bool:
        claim = await self._claim(turn_input)
        self._began = self._rooms.clock.monotonic()
        keep = Keep.DISCARD
        try:
            process = claim.process
            process.claimed = True
            if self.resume is not None and process.adopted is None:
                await process.adopt(self.resume)
            turn = self._rooms.ids.new(TURN)
            process.endpoint.bind(binding_of(self.session, self.owner, turn_input))
            process.endpoint.begin(replace(context_of(turn, turn_input, leg), trace=self._watch.trace))
            if self.content is not None:
                await self.content.enter(process.workdir)
            await self._prepare(process, claim.kind, turn_input)
            await process.reach(self.owner.org, None if self.content is None else self.content.hosts)
            if self.content is not None:
                await self.content.settle(process.workdir)
            started = Started(self.session, turn, process.pid, claim.kind.value, claim.waited_seconds)
            self._watch.started(started)
            keep, settled = await self._converse(process, turn_input, leg, started)
        except AgentCrashed as crashed:
            if claim.kind is Kind.WARM:
                raise _DiedIdle from crashed
            raise
        except (InvalidRequest, UpstreamError):
            # Nothing was said yet: the process is as good as before.
            keep = Keep.SESSION if claim.kind is Kind.WARM else Keep.DETACH
            raise
        finally:
            try:
                if self.content is not None:
                    await self.content.leave(claim.process.workdir)
            finally:
                if keep is not Keep.SESSION:
                    self.lose(claim.process)
                await claim.release(keep)
        return settled

    def lose(self, process: SlotProcess) -> None:
        """The process goes. What an agent did to its files and learned is kept for its next process."""
        self.process = None
        self.hang_up()
        if process.profile.tools != () and not self.ended:
            self.resume = process.keep(self._rooms.kept_dir / process.slot) or self.resume
            self._rooms.keeper.left(self, process)

    def hang_up(self) -> None:
        """End the conversations with remote MCP servers, which belong to the process that went."""
        if self._bridge is not None:
            self._rooms.spawn(self._bridge.disconnect())

    async def _claim(self, turn_input: TurnInput) -> Claim[SlotProcess]:
        if self.process is not None and self.process.fingerprint != turn_input.spec.fingerprint:
            self.lose(self.process)
            await self._rooms.pool.end_session(self.session)  # set up otherwise: another process takes over
        if self.process is None:
            await self._rooms.keeper.fetch(self, turn_input)
        versions = self._rooms.versions
        if versions is None or (self.process is not None and self.process.alive):
            return await self._claim_of(turn_input)
        self._move_to(await versions.of(self.session, self.owner, before=self.cli))
        try:
            return await self._claim_of(turn_input)
        except SpawnFailed as failed:
            # Nothing was said yet: a new version that does not start costs its conversations time, not an answer.
            cli = self.cli or MAIN
            other = await versions.of(self.session, self.owner, before=MAIN)
            if other == cli:
                raise
            versions.ended(cli, failed, 0.0)
            self._move_to(other)
            return await self._claim_of(turn_input)

    def _move_to(self, cli: str) -> None:
        """Another version does not read the old one's transcript: it gets the files, and is told the history."""
        if self.resume is not None and self.cli is not None and cli != self.cli:
            self.resume = replace(self.resume, uuid="")
        self.cli = cli

    async def _claim_of(self, turn_input: TurnInput) -> Claim[SlotProcess]:
        profile = turn_input.spec.profile
        resume = replace(self.resume, uuid="") if self.resume and turn_input.replay is not None else self.resume
        self._retelling = None
        if resume is not None and self._rooms.spares_adopt:
            self._retelling = await retelling(resume, past_of(turn_input))
        return await self._rooms.pool.claim(
            ClaimRequest(
                claim=self._rooms.ids.new("claim"),
                session=self.session,
                org=self.owner.org,
                principal=self.owner.principal,
                profile=replace(profile, cli=self.cli) if self.cli else profile,
                reuse_idle=turn_input.reuse_idle,
                resume=resume,
                resume_on_spare=self._retelling is not None,
            )
        )

    async def _prepare(self, process: SlotProcess, kind: Kind, turn_input: TurnInput) -> None:
        """Make the process hold this conversation, with this turn's model and tools."""
        spec = turn_input.spec
        bridge = self._bridge
        if kind is not Kind.WARM or bridge is None:
            if bridge is not None:
                await bridge.close()
            bridge = self._bridge = Bridge(self._rooms.connect_remote, self.owner)
        bridge.offer(spec.client_tools)
        bridge.offer(spec.worker_tools, server=SANDBOX_SERVER)
        permissions = Permissions(spec.allowed_tools, process.confined_to, spec.local_rules)
        process.agent.on_control = controls(permissions, bridge, turn_input.approve)
        if kind is not Kind.WARM:
            await initialize(process, spec, self.content)
            self.resume = None
            if not process.resumes or turn_input.replay is not None:
                await give_past(process, turn_input, self._retelling.seen if self._retelling is not None else ())
        bridge.on_trouble, bridge.on_reused = self._mcp_trouble, self._mcp_reused
        await set_up(process, bridge, turn_input)
        self.process = process

    async def _converse(
        self, process: SlotProcess, turn_input: TurnInput, leg: Leg, started: Started
    ) -> tuple[Keep, bool]:
        line = self._rooms.ids.uuid()
        if turn_input.replay is not None:
            process.endpoint.replay(turn_input.replay)
        content = turn_input.content
        if self.content is not None and self.content.news and started.kind == Kind.WARM:
            content = announced(self.content.news, content)
        agent_turn = process.agent.turn(content, uuid=line)
        error: WrapperError | None = None
        calls: Sequence[UpstreamCall] = ()
        silent = True
        try:
            async with asyncio.timeout(turn_input.turn_seconds) as deadline, agent_turn:
                self._running = running = Running(
                    started.turn, agent_turn, leg, turn_input, deadline, started, process,
                    [Message("user", turn_input.content)],
                )  # fmt: skip
                self.messages = [*turn_input.history, *running.user_messages]
                async for frame in agent_turn:
                    if silent:  # only now is it sure who answers: a process that died while idle is replaced
                        silent = False
                        leg.start(started)
                    if self.journal is not None:
                        await self.journal.frame(frame)
                    await self._deliver(running, frame)
        except TimeoutError:
            error = AgentTimeout(
                f"the turn took longer than {turn_input.turn_seconds:g} s (limit: turn_seconds) and was ended"
            )
        except WrapperError as failed:
            error = failed
        finally:
            calls = await process.endpoint.end()
            self._running = None
        if silent and isinstance(error, AgentCrashed) and started.kind == Kind.WARM and not leg.gone:
            self.messages.pop()
            raise error
        return await self._conclude(running, line, error, calls)

    async def _conclude(
        self, running: Running, line: str, error: WrapperError | None, calls: Sequence[UpstreamCall]
    ) -> tuple[Keep, bool]:
        """Bring process and known history to the same place: whether the process stays, and whether that was done
        before the caller had its answer."""
        self.turns += 1
        if running.process.half_told and error is None:
            await running.process.told()
        self._watch.interrupted = running.interrupted
        self._end = TurnEnd(error, running.interrupted, suspended=running.suspended, calls=calls)
        if running.input.durable:
            return self._conclude_durable(running, error, calls), True
        if running.done and error is None:
            self._end = TurnEnd(kept=True, calls=calls)
            return Keep.SESSION, True
        leg = running.leg
        if running.interrupted and running.parked is not None:
            # Answered up to the tool calls, which nobody will answer: the process holds more than it should.
            return Keep.DISCARD, True
        if error is None and running.suspended:
            # Nobody ended it early, and what was said is nowhere written: it runs once, where the caller asks again.
            error = LeaseLost(f"session {self.session} was taken over by another replica", retry_after=1)
        if error is None and running.interrupted and not leg.gone:
            self._settle(leg)  # ended early on purpose: what was said so far stands, here and in the process
            return Keep.SESSION, True
        if error is None and not running.cut:
            error = TurnInterrupted() if running.interrupted else failure(leg.merger, calls) or TurnInterrupted()
        if self.messages and self.messages[-1].role == "user":
            self.messages.pop()  # the caller will send it again
        # Several requests may have been answered on the way: the last one alone cannot be taken back.
        undone = len(running.user_messages) == 1 and await undo(running.process, line, self.session)
        if error is not None:
            leg.finish(error)
            return (Keep.SESSION if undone else Keep.DISCARD), False
        self.messages.extend(running.user_messages[-1:])
        self._end = TurnEnd(kept=True, calls=calls)
        self._settle(leg)
        if not undone:
            return Keep.DISCARD, True
        told = await retell(running.process, self.messages[-2:], running.input.model, self.session)
        return (Keep.SESSION if told else Keep.DISCARD), True

    def _conclude_durable(self, running: Running, error: WrapperError | None, calls: Sequence[UpstreamCall]) -> Keep:
        """Nothing is taken back: a process that still answers holds what happened."""
        leg = running.leg
        error = error or (None if running.interrupted else failure(leg.merger, calls))
        self._end = TurnEnd(error, running.interrupted, kept=True, suspended=running.suspended, calls=calls)
        if not running.done and (content := leg.merger.message()["content"]):
            self.messages.append(Message("assistant", content))
        leg.finish(error)
        usable = running.process.alive and not running.suspended and (error is None or isinstance(error, UpstreamError))
        return Keep.SESSION if usable else Keep.DISCARD

    async def _deliver(self, running: Running, frame: Any) -> None:
        if running.parked is not None:
            if running.interrupted:
                return  # nobody will ask for what is left of it
            await running.parked.wait()
        leg = running.leg
        events = leg.merger.feed(frame)
        await leg.put(Item(frame, events))
        self._watch.frame(frame, events)
        merger = leg.merger
        if not merger.finished or running.parked is not None or running.cut or merger.failure is not None:
            return
        if frame.type == "result":
            if not running.interrupted:
                running.done = True
                self._settle(leg)
                await asyncio.sleep(0)  # the caller gets the end of its answer before the process is given back
        elif merger.client_calls:
            self._park(running)
        else:
            # The caller's message is complete although the CLI goes on by itself: the rest is not wanted.
            running.cut = True
            await running.agent_turn.interrupt()

    def _park(self, running: Running) -> None:
        """The caller's own tools were called: this request is answered, the process waits for the next one."""
        assert self._bridge is not None  # noqa: S101 - checked by the only caller
        leg = running.leg
        message = leg.merger.message()
        self._bridge.expect([block["id"] for block in message["content"] if block["type"] == "tool_use"])
        running.parked = asyncio.Event()
        running.allow_seconds(None)
        self._settle(leg)
        self._rooms.spawn(self._expire(running, running.parked))

    async def _expire(self, running: Running, parked: asyncio.Event) -> None:
        """Free a parked turn that nobody answers."""
        await unanswered(parked, self._rooms.clock, self._rooms.parked_seconds)
        if running.parked is parked and self._running is running and not running.interrupted:
            log.info("turn.unparked", session=self.session, reason="no tool results", turn=running.turn)
            with contextlib.suppress(WrapperError):
                await self.interrupt()

    def _mcp_trouble(self, trouble: Trouble) -> None:
        log.info("mcp.failed", session=self.session, server=trouble.server, outcome=str(trouble.outcome))
        if self.journal is not None:
            self.journal.note(trouble.event())

    def _mcp_reused(self, tool_use_id: str) -> None:
        if self.journal is not None:
            self.journal.reused(tool_use_id)

    def _caller_gone(self, leg: Leg, task: asyncio.Task[None] | None) -> None:
        running = self._running
        if running is None or running.leg is not leg:
            if task is not None and not leg.started.done():
                task.cancel()  # still waiting for its turn or for a process
            return
        if running.input.on_disconnect is OnDisconnect.INTERRUPT:
            self._rooms.spawn(self._interrupt_quietly())

    async def _interrupt_quietly(self) -> None:
        with contextlib.suppress(WrapperError):
            await self.interrupt()
