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
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import structlog

from claude_wrapper.agent.launch import CHAT
from claude_wrapper.agent.turns import Turn as AgentTurn
from claude_wrapper.broker.calls import Binding, TurnContext, UpstreamCall
from claude_wrapper.clock import Clock
from claude_wrapper.errors import (
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
from claude_wrapper.sessions.spec import Approve, Message, OnDisconnect, Owner, TurnInput
from claude_wrapper.wire.control import ControlRefused
from claude_wrapper.wire.merge import CONTINUED_BY_CLI, MessageMerger

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
    parked_seconds: float = 600.0
    """How long a turn waits for the results of the caller's own tools."""


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
    cut: bool = False
    """The message ended before the CLI's turn did."""
    parked: asyncio.Event | None = None
    """Set while the turn waits for tool results; the event says that the next leg is attached."""


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
        self.head: str | None = None
        """Id of the last message that was answered."""
        self.thread_fields: Mapping[str, Any] = {}
        """What a thread was created with and its continuations do not repeat: `system`, `tools`."""
        self.resume: Resume | None = None
        self.turns = 0
        self.process: SlotProcess | None = None
        """The process that holds this conversation, while one does."""
        self.ended = False
        self._rooms = rooms
        self._on_settled = on_settled
        self._order = asyncio.Lock()
        self._queued = 0
        self._running: _Running | None = None
        self._bridge: Bridge | None = None

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
        running.leg = leg
        running.input = turn_input
        running.user_messages.append(Message("user", turn_input.content))
        self.messages = [*turn_input.history, *running.user_messages[-1:]]
        running.process.endpoint.begin(self._context(running.turn, turn_input))
        running.deadline.reschedule(asyncio.get_running_loop().time() + turn_input.turn_seconds)
        parked, running.parked = running.parked, None
        self._bridge.answer(results)
        parked.set()
        return leg

    async def interrupt(self) -> None:
        """End the running turn early; its caller gets what there is."""
        running = self._running
        if running is not None:
            running.interrupted = True
            await running.agent_turn.interrupt()

    # The turn ---------------------------------------------------------------------------------------------------------

    async def _run(self, turn_input: TurnInput, leg: Leg) -> None:
        error: WrapperError | None = None
        try:
            if self._running is not None and self._running.parked is not None:
                await self.interrupt()  # a new message instead of the tool results: the parked turn is over
            async with self._order:
                await self._turn(turn_input, leg)
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
            (self._last_leg or leg).finish(error)
            leg.finish(error)
            self._on_settled(self)

    _last_leg: Leg | None = None

    async def _turn(self, turn_input: TurnInput, leg: Leg) -> None:
        claim = await self._claim(turn_input)
        keep = Keep.DISCARD
        try:
            process = claim.process
            turn = self._rooms.ids.new(TURN)
            process.endpoint.bind(self._binding(turn_input))
            process.endpoint.begin(self._context(turn, turn_input))
            await self._prepare(process, claim.kind, turn_input)
            await process.reach(self.owner.org)
            started = Started(self.session, turn, process.pid, claim.kind.value, claim.waited_seconds)
            leg.start(started)
            keep = await self._converse(process, turn_input, leg, started)
        except (InvalidRequest, UpstreamError):
            # Nothing was said yet: the process is as good as before.
            keep = Keep.SESSION if claim.kind is Kind.WARM else Keep.DETACH
            raise
        finally:
            if keep is not Keep.SESSION:
                self.process = None
            await asyncio.shield(asyncio.ensure_future(claim.release(keep)))

    async def _claim(self, turn_input: TurnInput) -> Claim[SlotProcess]:
        if self.process is not None and self.process.fingerprint != turn_input.spec.fingerprint:
            await self._rooms.pool.end_session(self.session)  # set up otherwise: another process takes over
            self.process = None
        return await self._rooms.pool.claim(
            ClaimRequest(
                claim=self._rooms.ids.new("claim"),
                session=self.session,
                org=self.owner.org,
                principal=self.owner.principal,
                profile=turn_input.spec.profile,
                reuse_idle=turn_input.reuse_idle,
                resume=self.resume,
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
        if turn_input.max_thinking_tokens is not None:
            await process.agent.set_max_thinking_tokens(turn_input.max_thinking_tokens)
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
        if spec.permission_mode != "default":
            await process.agent.set_permission_mode(spec.permission_mode)
        if self.resume is not None:
            self.resume = None  # the process was started with --resume: it holds the history already
        elif turn_input.history:
            await process.agent.inject(_with_tool_prefix(turn_input.history, spec.client_tools), model=turn_input.model)

    async def _converse(self, process: SlotProcess, turn_input: TurnInput, leg: Leg, started: Started) -> Keep:
        line = self._rooms.ids.uuid()
        agent_turn = process.agent.turn(turn_input.content, uuid=line)
        error: WrapperError | None = None
        calls: Sequence[UpstreamCall] = ()
        try:
            async with asyncio.timeout(turn_input.turn_seconds) as deadline, agent_turn:
                self._running = running = _Running(
                    started.turn, agent_turn, leg, turn_input, deadline, started, process,
                    [Message("user", turn_input.content)],
                )  # fmt: skip
                self.messages = [*turn_input.history, *running.user_messages]
                async for frame in agent_turn:
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
        return await self._conclude(running, line, error, calls)

    async def _conclude(
        self, running: _Running, line: str, error: WrapperError | None, calls: Sequence[UpstreamCall]
    ) -> Keep:
        """Bring process and known history to the same place, and say whether the process can stay."""
        leg = self._last_leg = running.leg
        process = running.process
        self.turns += 1
        if error is None and not running.interrupted:
            error = _failure(leg.merger, calls)
        if error is None and not running.interrupted and not running.cut:
            self._answered(leg)
            leg.finish()
            return Keep.SESSION
        leg.finish(error or (TurnInterrupted() if running.interrupted and not running.cut else None))
        if len(running.user_messages) > 1 or not await self._undo(process, line):
            # Several requests were answered on the way: taking back the last one alone is not possible.
            self._forget_last(running)
            return Keep.DISCARD
        self._forget_last(running)
        if not running.cut or error is not None:
            return Keep.SESSION
        self.messages.extend(running.user_messages)
        self._answered(leg)
        answered = self.messages[-2:]
        try:
            await process.agent.inject(
                [{"role": one.role, "content": one.content} for one in answered], model=running.input.model
            )
        except WrapperError:
            return Keep.DISCARD
        return Keep.SESSION

    def _answered(self, leg: Leg) -> None:
        self.messages.append(Message("assistant", leg.merger.message()["content"]))
        self.head = leg.merger.message_id

    def _forget_last(self, running: _Running) -> None:
        """The caller will send its last message again: it is not part of the known history."""
        del running
        if self.messages and self.messages[-1].role == "user":
            self.messages = self.messages[:-1]

    async def _deliver(self, running: _Running, frame: Any) -> None:
        if running.parked is not None:
            if running.interrupted:
                return  # nobody will ask for what is left of it
            await running.parked.wait()
        leg = running.leg
        await leg.put(Item(frame, leg.merger.feed(frame)))
        merger = leg.merger
        if not merger.finished or frame.type == "result" or running.parked is not None or running.cut:
            return
        if merger.client_calls and merger.failure is None:
            self._park(running)
        else:
            # The caller's message is complete although the CLI goes on: its request is answered, the rest is not wanted.
            running.cut = True
            leg.finish(None if merger.failure is None else _failure(merger, ()))
            await running.agent_turn.interrupt()

    def _park(self, running: _Running) -> None:
        """The caller's own tools were called: this request is answered, the process waits for the next one."""
        assert self._bridge is not None  # noqa: S101 - checked by the only caller
        leg = running.leg
        message = leg.merger.message()
        self._bridge.expect([block["id"] for block in message["content"] if block["type"] == "tool_use"])
        self._answered(leg)
        running.parked = asyncio.Event()
        running.deadline.reschedule(None)
        leg.finish()
        self._on_settled(self)
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
        if not process.alive or self._last_leg is None:
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
            # Without tools of its own the process stands for a plain model, which stops where the CLI would go on.
            end_at=frozenset() if spec.profile.tools != () else CONTINUED_BY_CLI,
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
