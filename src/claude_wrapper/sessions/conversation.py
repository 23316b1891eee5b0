"""One conversation: its turns in order, each on a process that holds exactly this conversation.

A turn runs as a task of its own, so that it outlives its request when it must. Whatever goes wrong, the process is left
holding what the caller believes it holds: a turn that failed, or whose caller went away, is rewound out of the CLI's
context (its retry starts from the same history); a process that cannot be brought there is thrown away, and the next
turn gets the history injected into a fresh one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog

from claude_wrapper.agent.launch import CHAT
from claude_wrapper.agent.turns import Turn as AgentTurn
from claude_wrapper.broker.calls import STREAM_CUT, Binding, TurnContext, UpstreamCall
from claude_wrapper.clock import Clock
from claude_wrapper.errors import (
    AgentCrashed,
    AgentTimeout,
    Conflict,
    Draining,
    InvalidRequest,
    RateLimited,
    TurnInterrupted,
    UpstreamError,
    WrapperError,
)
from claude_wrapper.ids import MESSAGE, TURN, Ids
from claude_wrapper.pool.pool import Claim, Pool
from claude_wrapper.pool.requests import ClaimRequest, Keep, Kind
from claude_wrapper.sessions.bridge import CLIENT_SERVER, Bridge, RemoteConnector
from claude_wrapper.sessions.leg import Item, Leg, Started
from claude_wrapper.sessions.permissions import Permissions
from claude_wrapper.sessions.process import Resume, SlotProcess
from claude_wrapper.sessions.spec import Approve, Journal, Message, OnDisconnect, Owner, TurnEnd, TurnInput
from claude_wrapper.sessions.watch import TurnWatch, Watch
from claude_wrapper.wire.control import ControlRefused
from claude_wrapper.wire.merge import CLIENT_PREFIX, CONTINUED_BY_CLI, MessageMerger

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Rooms:
    """What a conversation works with."""

    pool: Pool[SlotProcess]
    clock: Clock
    ids: Ids
    connect_remote: RemoteConnector
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    """Starts a task and keeps a reference until it ends."""
    max_queued_turns: int = 16
    kept_dir: Path = Path()
    """Where the files of conversations without a process lie."""
    parked_seconds: float = 600.0
    """How long a turn waits for the results of the caller's own tools."""
    watch: Watch = field(default_factory=Watch)


@dataclass(slots=True)
class _Running:
    """The turn in flight."""

    turn: str
    agent_turn: AgentTurn
    leg: Leg
    input: TurnInput
    deadline: asyncio.Timeout
    started: Started
    process: SlotProcess
    user_messages: list[Message] = field(default_factory=list)
    interrupted: bool = False
    """The caller, or whoever speaks for it, ended the turn early."""
    done: bool = False
    """The whole answer was handed over and the conversation settled."""
    cut: bool = False
    """The message ended before the CLI's turn did."""
    suspended: bool = False
    """It goes on in another process, later."""
    parked: asyncio.Event | None = None
    """Set while the turn waits for tool results; the event says that the next leg is attached."""


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
        self.ended = False
        self.journal: Journal | None = None
        """Who writes down what happens here."""
        self._end = TurnEnd()
        self._rooms = rooms
        self._on_settled = on_settled
        self._order = asyncio.Lock()
        self._queued = 0
        self._watch = TurnWatch()
        self._running: _Running | None = None
        self._bridge: Bridge | None = None
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

        leg = Leg(self._merger(turn_input), hung_up)
        self._queued += 1
        task = self._rooms.spawn(self._run(turn_input, leg))
        return leg

    def answer_tools(self, turn_input: TurnInput, results: Sequence[dict[str, Any]]) -> Leg:
        """Continue the parked turn with the caller's tool results (blocks of type `tool_result`)."""
        running = self._running
        if running is None or running.parked is None or self._bridge is None:
            raise Conflict(f"session {self.session} is not waiting for tool results")
        leg = Leg(self._merger(turn_input), lambda one: self._caller_gone(one, None))
        leg.start(Started(self.session, running.turn, running.started.pid, Kind.WARM.value, 0.0))
        running.leg = self._leg = leg
        running.input = turn_input
        running.user_messages.append(Message("user", turn_input.content))
        self.messages = [*turn_input.history, *running.user_messages[-1:]]
        running.process.endpoint.begin(self._context(running.turn, turn_input))
        running.deadline.reschedule(asyncio.get_running_loop().time() + turn_input.turn_seconds)
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
        running = self._running
        if running is not None:
            until = None if seconds is None else asyncio.get_running_loop().time() + seconds
            running.deadline.reschedule(until)

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
        turn_input = await journal.begin(turn_input)
        self._end = TurnEnd(Draining("the turn was cancelled"))
        try:
            return await self._on_process(turn_input, leg)
        except WrapperError as error:
            self._end = TurnEnd(error)
            raise
        finally:
            await asyncio.shield(asyncio.ensure_future(journal.end(self._end)))

    async def _on_process(self, turn_input: TurnInput, leg: Leg) -> bool:
        try:
            return await self._attempt(turn_input, leg)
        except _DiedIdle as died:
            # It had ended between two turns, before anything was asked: another process takes the turn.
            log.info("turn.moved", session=self.session, cause=str(died.__cause__))
            return await self._attempt(turn_input, leg)

    async def _attempt(self, turn_input: TurnInput, leg: Leg) -> bool:
        claim = await self._claim(turn_input)
        keep = Keep.DISCARD
        try:
            process = claim.process
            turn = self._rooms.ids.new(TURN)
            process.endpoint.bind(self._binding(turn_input))
            process.endpoint.begin(replace(self._context(turn, turn_input), trace=self._watch.trace))
            await self._prepare(process, claim.kind, turn_input)
            await process.reach(self.owner.org)
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
            if keep is not Keep.SESSION:
                self.lose(claim.process)
            await claim.release(keep)
        return settled

    def lose(self, process: SlotProcess) -> None:
        """The process goes. What an agent did to its files and learned is kept for its next process."""
        self.process = None
        if process.profile.tools != ():
            self.resume = process.keep(self._rooms.kept_dir / process.slot)

    async def _claim(self, turn_input: TurnInput) -> Claim[SlotProcess]:
        if self.process is not None and self.process.fingerprint != turn_input.spec.fingerprint:
            self.lose(self.process)
            await self._rooms.pool.end_session(self.session)  # set up otherwise: another process takes over
        return await self._rooms.pool.claim(
            ClaimRequest(
                claim=self._rooms.ids.new("claim"),
                session=self.session,
                org=self.owner.org,
                principal=self.owner.principal,
                profile=turn_input.spec.profile,
                reuse_idle=turn_input.reuse_idle,
                resume=replace(self.resume, uuid="") if self.resume and turn_input.replay is not None else self.resume,
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
        permissions = Permissions(spec.allowed_tools, process.confined_to)
        bridge.offer(spec.client_tools)
        process.agent.on_control = _controls(permissions, bridge, turn_input.approve)
        if kind is not Kind.WARM:
            await self._bind_fresh(process, turn_input)
        if process.model != turn_input.model:
            await _set_model(process, turn_input.model)
        if process.permission_mode != spec.permission_mode:
            await process.agent.set_permission_mode(spec.permission_mode)
            process.permission_mode = spec.permission_mode
        if turn_input.max_thinking_tokens is not None:
            await process.agent.set_max_thinking_tokens(turn_input.max_thinking_tokens)
        if spec.asked_tools != process.asked_tools:
            await process.agent.apply_flag_settings({"permissions": {"ask": sorted(spec.asked_tools)}})
            process.asked_tools = spec.asked_tools
        servers = bridge.servers(spec.mcp_servers, with_client_tools=bool(spec.client_tools))
        if servers != process.mcp_servers:
            await process.agent.mcp_set_servers(servers)
            process.mcp_servers = servers
        self.process = process

    async def _bind_fresh(self, process: SlotProcess, turn_input: TurnInput) -> None:
        spec = turn_input.spec
        process.fingerprint = spec.fingerprint
        if not process.initialized:
            await process.agent.initialize(
                system_prompt=[block["text"] for block in spec.system if block.get("type") == "text"]
                if spec.system is not None
                else None,
                append_system_prompt=spec.append_system_prompt,
                json_schema=dict(spec.json_schema) if spec.json_schema else None,
            )
            process.initialized = True
        # A process that was started with --resume holds the history already.
        resumed, self.resume = self.resume is not None and turn_input.replay is None, None
        past = turn_input.history if turn_input.past is None else turn_input.past
        if past and not resumed:
            await process.agent.inject(_with_tool_prefix(past, spec.client_tools), model=turn_input.model)

    async def _converse(
        self, process: SlotProcess, turn_input: TurnInput, leg: Leg, started: Started
    ) -> tuple[Keep, bool]:
        line = self._rooms.ids.uuid()
        if turn_input.replay is not None:
            process.endpoint.replay(turn_input.replay)
        agent_turn = process.agent.turn(turn_input.content, uuid=line)
        error: WrapperError | None = None
        calls: Sequence[UpstreamCall] = ()
        silent = True
        try:
            async with asyncio.timeout(turn_input.turn_seconds) as deadline, agent_turn:
                self._running = running = _Running(
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
        self, running: _Running, line: str, error: WrapperError | None, calls: Sequence[UpstreamCall]
    ) -> tuple[Keep, bool]:
        """Bring process and known history to the same place: whether the process stays, and whether that was done
        before the caller had its answer."""
        self.turns += 1
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
        if error is None and running.interrupted and not leg.gone:
            self._settle(leg)  # ended early on purpose: what was said so far stands, here and in the process
            return Keep.SESSION, True
        if error is None and not running.cut:
            error = TurnInterrupted() if running.interrupted else _failure(leg.merger, calls) or TurnInterrupted()
        if self.messages and self.messages[-1].role == "user":
            self.messages.pop()  # the caller will send it again
        # Several requests may have been answered on the way: the last one alone cannot be taken back.
        undone = len(running.user_messages) == 1 and await self._undo(running.process, line)
        if error is not None:
            leg.finish(error)
            return (Keep.SESSION if undone else Keep.DISCARD), False
        self.messages.extend(running.user_messages[-1:])
        self._end = TurnEnd(kept=True, calls=calls)
        self._settle(leg)
        if not undone:
            return Keep.DISCARD, True
        return (Keep.SESSION if await self._retell(running) else Keep.DISCARD), True

    def _conclude_durable(self, running: _Running, error: WrapperError | None, calls: Sequence[UpstreamCall]) -> Keep:
        """Nothing is taken back: a process that still answers holds what happened."""
        leg = running.leg
        error = error or (None if running.interrupted else _failure(leg.merger, calls))
        self._end = TurnEnd(error, running.interrupted, kept=True, suspended=running.suspended, calls=calls)
        if not running.done and (content := leg.merger.message()["content"]):
            self.messages.append(Message("assistant", content))
        leg.finish(error)
        usable = running.process.alive and not running.suspended and (error is None or isinstance(error, UpstreamError))
        return Keep.SESSION if usable else Keep.DISCARD

    async def _retell(self, running: _Running) -> bool:
        """Put the turn back as its caller saw it: the CLI had gone on where the message ended."""
        said = [{"role": one.role, "content": one.content} for one in self.messages[-2:]]
        try:
            await running.process.agent.inject(said, model=running.input.model)
        except WrapperError as failed:
            log.info("turn.not_retold", session=self.session, cause=failed.message)
            return False
        return True

    async def _deliver(self, running: _Running, frame: Any) -> None:
        if running.parked is not None:
            if running.interrupted:
                return  # nobody will ask for what is left of it
            await running.parked.wait()
        leg = running.leg
        events = leg.merger.feed(frame)
        self._watch.frame(frame, events)
        await leg.put(Item(frame, events))
        merger = leg.merger
        if not merger.finished or running.parked is not None or running.cut or merger.failure is not None:
            return
        if frame.type == "result":
            if not running.interrupted:
                running.done = True
                self._settle(leg)
        elif merger.client_calls:
            self._park(running)
        else:
            # The caller's message is complete although the CLI goes on by itself: the rest is not wanted.
            running.cut = True
            await running.agent_turn.interrupt()

    def _park(self, running: _Running) -> None:
        """The caller's own tools were called: this request is answered, the process waits for the next one."""
        assert self._bridge is not None  # noqa: S101 - checked by the only caller
        leg = running.leg
        message = leg.merger.message()
        self._bridge.expect([block["id"] for block in message["content"] if block["type"] == "tool_use"])
        running.parked = asyncio.Event()
        running.deadline.reschedule(None)
        self._settle(leg)
        self._rooms.spawn(self._expire(running, running.parked))

    async def _expire(self, running: _Running, parked: asyncio.Event) -> None:
        """Free a parked turn that nobody answers."""
        waiting = asyncio.ensure_future(self._rooms.clock.sleep(self._rooms.parked_seconds))
        answered = asyncio.ensure_future(parked.wait())
        try:
            await asyncio.wait({waiting, answered}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            answered.cancel()
        if running.parked is parked and self._running is running and not running.interrupted:
            log.info("turn.unparked", session=self.session, reason="no tool results", turn=running.turn)
            with contextlib.suppress(WrapperError):
                await self.interrupt()

    async def _undo(self, process: SlotProcess, line: str) -> bool:
        """Take a failed or abandoned turn out of the process's context. False when that is not possible."""
        if not process.alive:
            return False
        try:
            await process.agent.rewind(line)
        except WrapperError as error:
            log.info("turn.not_rewound", session=self.session, cause=str(error))
            return False
        return True

    # Small things ------------------------------------------------------------------------------------------------------

    def _merger(self, turn_input: TurnInput) -> MessageMerger:
        spec = turn_input.spec
        return MessageMerger(
            self._rooms.ids.new(MESSAGE),
            turn_input.model,
            structured=spec.json_schema is not None,
            # The caller of a durable turn is told of its tools by the journal; the turn itself goes on.
            strip_mcp_prefix="" if turn_input.durable else CLIENT_PREFIX,
            # Without tools of its own the process stands for a plain model, which stops where the CLI would go on.
            end_at=frozenset() if spec.profile.tools != () or turn_input.durable else CONTINUED_BY_CLI,
        )

    def _binding(self, turn_input: TurnInput) -> Binding:
        owner = self.owner
        return Binding(
            org=owner.org,
            workspace=owner.workspace,
            key_id=owner.key_id,
            user=owner.user,
            session=self.session,
            credential=turn_input.credential,
        )

    @staticmethod
    def _context(turn: str, turn_input: TurnInput) -> TurnContext:
        return TurnContext(
            turn=turn,
            model=turn_input.model,
            system=turn_input.system,
            overrides=turn_input.overrides,
            placeholder=turn_input.spec.profile == CHAT,
        )

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


def _controls(
    permissions: Permissions, bridge: Bridge, approve: Approve | None
) -> Callable[[str, dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]:
    async def on_control(subtype: str, request: dict[str, Any]) -> dict[str, Any]:
        if subtype == "can_use_tool":
            decision = permissions.decide(request)
            return await approve(request) if approve is not None and decision["behavior"] == "allow" else decision
        if subtype == "mcp_message":
            return {"mcp_response": await bridge.handle(request["server_name"], request["message"])}
        return {}

    return on_control


async def _set_model(process: SlotProcess, model: str) -> None:
    """The CLI asks the upstream about a model that it does not know: its answer is the caller's."""
    try:
        await process.agent.set_model(model)
    except ControlRefused as refused:
        calls = await process.endpoint.end()
        raise _upstream_error(calls) or InvalidRequest(refused.message, field="model") from refused
    process.model = model


def _upstream_error(calls: Sequence[UpstreamCall]) -> UpstreamError | None:
    """The last call that failed, as the broker saw it."""
    for call in reversed(calls):
        if call.error_type == STREAM_CUT:
            return UpstreamError(call.error_message, status=502, upstream_request_id=call.upstream_request_id)
        if call.status >= 400:
            return UpstreamError(
                call.error_message,
                status=call.status,
                error_type=call.error_type or "api_error",
                upstream_request_id=call.upstream_request_id,
                retry_after=call.retry_after,
            )
    return None


def _failure(merger: MessageMerger, calls: Sequence[UpstreamCall]) -> WrapperError | None:
    """What really went wrong: the broker saw the true status, the CLI only reports its own reading of it."""
    failure = merger.failure
    if failure is None:
        return None
    return _upstream_error(calls) or UpstreamError(failure.message, status=failure.status, error_type=failure.type)


def _with_tool_prefix(history: Sequence[Message], client_tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The caller's tools are known to the CLI as `mcp__client__NAME`, in its history too."""
    names = {str(tool["name"]) for tool in client_tools}
    prefixed: list[dict[str, Any]] = []
    for message in history:
        content = message.content
        if isinstance(content, list):
            content = [
                {**block, "name": f"mcp__{CLIENT_SERVER}__{block['name']}"}
                if block.get("type") == "tool_use" and block.get("name") in names
                else block
                for block in content
            ]
        prefixed.append({"role": message.role, "content": content})
    return prefixed
