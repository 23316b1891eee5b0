"""One Claude process, from `start` to `stop`.

Three tasks, and a few short ones: the *reader* cuts stdout into frames and gives each to the turn that it belongs to;
the *watcher* waits for the process to end and then ends everything that hangs on it; `stop` runs on its own so that a
cancelled caller does not leave half a process. The lane is a fair lock: whoever holds it has the conversation.

Whose frame is it? The CLI announces each user line by its uuid (`command_lifecycle`: queued, started, completed). From
`started` to `result` frames belong to that line's turn. Frames outside (a background job that the CLI continues by
itself) belong to no turn and go to `on_stray`; a `result` that names other lines is not ours. A process that never
printed a `command_lifecycle` is taken at its word, one turn at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec

from claude_wrapper.agent.controls import Controls, OnControl
from claude_wrapper.agent.inbox import Inbox
from claude_wrapper.agent.lifecycle import USABLE, Event, State, advance
from claude_wrapper.agent.settings import AgentSettings
from claude_wrapper.agent.subprocess import crashed
from claude_wrapper.agent.transport import ExitReport, Transport
from claude_wrapper.agent.turns import Record
from claude_wrapper.clock import Clock
from claude_wrapper.errors import (
    AgentCrashed,
    AgentProtocolError,
    AgentTimeout,
    Conflict,
    OutputLimitExceeded,
    WrapperError,
)
from claude_wrapper.ids import Ids, is_uuid
from claude_wrapper.wire import control
from claude_wrapper.wire.ndjson import LineFramer
from claude_wrapper.wire.streamjson import Frame, MalformedFrame, decode_frame
from claude_wrapper.wire.turn import TurnEvent, TurnState

OnStray = Callable[[Frame], None]

_INTERRUPT_AGAIN = 1.0
_LAST_WORDS_SECONDS = 1.0


class _Lifecycle(msgspec.Struct):
    command_uuid: str = ""
    state: str = ""


class _ResultOwner(msgspec.Struct):
    user_message_uuids: list[str] | None = None
    user_message_uuid: str | None = None


class _Block(msgspec.Struct):
    type: str = ""
    name: str = ""


class _Message(msgspec.Struct):
    content: list[_Block]


class _ToolCalls(msgspec.Struct):
    message: _Message


TRACELESS_TOOLS = frozenset({"Read", "Write", "Edit"})
"""Built-in tools of which nothing stays in the process when the conversation is rewound (files do stay). Measured with
CLI 2.1.327. Bash is not one: its working directory stays, and a background command reports to the next conversation."""

_TOOL_CALLS = msgspec.json.Decoder(_ToolCalls)
_LIFECYCLE = msgspec.json.Decoder(_Lifecycle)
_RESULT_OWNER = msgspec.json.Decoder(_ResultOwner)


class Link:
    """One process, its frames and its turns; `connection.Agent` adds what can be said to it."""

    def __init__(self, transport: Transport, *, clock: Clock, ids: Ids, settings: AgentSettings) -> None:
        """Use `start`; this takes a transport that is already connected, and must be called in the event loop."""
        self._transport = transport
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._state = State.STARTING
        self._failure: WrapperError | None = None
        self._lane = asyncio.Lock()
        self._waiting = 0
        self._running: Record | None = None
        self._announced = False  # the CLI names the user lines it works on
        self._first_uuid: str | None = None  # of this conversation: what a rewind to the start aims at
        self._last_uuid: str | None = None
        self._garbage = 0
        self._idle_output = 0
        self.session_uuid: str | None = None
        """The CLI's own id of the conversation, from the latest `system/init`."""
        self.said: str | None = None
        """`uuid` of the model's last frame: the line that its transcript must have to hold the conversation."""
        self.residue: set[str] = set()
        """Tools that ran in this process and leave something in it that a rewind does not take away."""
        self.on_stray: OnStray | None = None
        """Called with each frame that belongs to no turn. Must not block."""
        self.closed = asyncio.Event()
        """Set when nothing of the process is left."""
        self.exit: ExitReport | None = None
        """How it ended; set before `closed`."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopper: asyncio.Task[ExitReport] | None = None
        name = f"agent-{transport.pid}"
        self._controls = Controls(self._write, asks=settings.asks, calls=settings.calls, name=name)
        self._reader = asyncio.create_task(self._read(), name=f"{name}-reader")
        self._watcher = asyncio.create_task(self._watch(), name=f"{name}-watcher")

    # What it is ------------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The spawned process."""
        return self._transport.pid

    @property
    def main_pid(self) -> int:
        """The CLI itself."""
        return self._transport.main_pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._transport.returncode

    @property
    def stderr_tail(self) -> str:
        """The end of what it wrote to stderr."""
        return self._transport.stderr_tail

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    @property
    def alive(self) -> bool:
        """Whether it takes turns."""
        return self._state in USABLE

    @property
    def garbage(self) -> int:
        """Lines so far that were no frames."""
        return self._garbage

    @property
    def on_control(self) -> OnControl:
        """Answers the CLI's questions (`can_use_tool`, `hook_callback`, `mcp_message`); denies by default."""
        return self._controls.on_control

    @on_control.setter
    def on_control(self, answer: OnControl) -> None:
        self._controls.on_control = answer

    # The end ---------------------------------------------------------------------------------------------------------

    async def stop(self, *, grace: float | None = None) -> ExitReport:
        """End of input, SIGTERM, SIGKILL, each bounded. `grace` is the time before SIGTERM; 0 kills at once.

        A running turn may end within the grace; after that it fails. Idempotent; cancelling the caller does not
        stop the stopping (`closed` tells when it is done).
        """
        self._take(Event.STOP)
        grace = self._settings.exit_grace if grace is None else grace
        if self._stopper is None:
            self._stopper = asyncio.create_task(self._shut_down(grace), name=f"agent-{self.pid}-stop")
        elif grace <= 0 and not self._stopper.done():
            self._transport.hurry()
        return await asyncio.shield(self._stopper)

    def freeze(self) -> None:
        """Take its processor time away until `thaw`. Only between turns."""
        self._transport.freeze()

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._transport.thaw()

    # Turns -----------------------------------------------------------------------------------------------------------

    async def begin(self, record: Record) -> None:
        """Part of `Turn`: wait for the lane, then send."""
        try:
            await self._enter_lane()
        except BaseException as error:
            if isinstance(error, WrapperError):
                self._end(record, TurnEvent.LOST, error)
            else:
                self._end(record, TurnEvent.ABANDON)
            raise
        if record.over:  # given up while it waited
            self._lane.release()
            return
        try:
            await self._send(record)
        except BaseException:
            self.abandon_record(record)
            raise

    async def interrupt_record(self, record: Record) -> None:
        """Part of `Turn`."""
        if record.state is TurnState.QUEUED:
            self.abandon_record(record)
            return
        record.take(TurnEvent.INTERRUPT)
        if record.over or record.interrupted:
            return
        record.interrupted = True
        self._spawn_task(self._press(record), "interrupt")

    def abandon_record(self, record: Record) -> None:
        """Part of `Turn`: never blocks; the draining goes on by itself."""
        if record.over:
            return
        if record.state is TurnState.QUEUED:
            self._end(record, TurnEvent.ABANDON)
            return
        record.take(TurnEvent.ABANDON)
        record.inbox.discard()
        if not record.interrupted:
            record.interrupted = True
            self._spawn_task(self._press(record), "drain")

    async def _press(self, record: Record) -> None:
        """Interrupt until the result comes; past the bound the process is of no use."""
        deadline = self._loop.time() + self._settings.drain_seconds
        try:
            async with asyncio.timeout_at(deadline):
                if self._announced:
                    await record.acknowledged.wait()  # an interrupt before the CLI took the line would miss it
                while not record.over:
                    await self._controls.notify("interrupt", {})
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_INTERRUPT_AGAIN):
                            await record.ended.wait()
        except TimeoutError:
            if not record.over:
                seconds = self._settings.drain_seconds
                self._expire(record, AgentTimeout(f"an interrupted turn did not end within {seconds:g} s"))
        except WrapperError:
            return  # the process is gone; the watcher ends the turn

    async def _exchange(self, line: bytes, uuid: str) -> Frame:
        """Send a line and drop everything up to its result. The caller holds the lane."""
        record = self._record(uuid, line)
        record.owns_lane = False
        try:
            await self._send(record)
            while await record.inbox.get() is not None:
                pass
        except BaseException:
            self.abandon_record(record)
            raise
        if record.result is None:
            raise record.error or AgentProtocolError("the Claude process gave no result")
        return record.result

    @contextlib.asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        await self._enter_lane()
        try:
            yield
        finally:
            record = self._running
            if record is None or record.over:
                self._lane.release()
            else:
                record.owns_lane = True  # it is being drained, and frees the lane when it ends

    async def _enter_lane(self) -> None:
        self._check_usable()
        if self._waiting >= self._settings.waiting_turns:
            raise Conflict(f"{self._waiting} turns wait for this conversation already; wait for their answers")
        self._waiting += 1
        try:
            await self._lane.acquire()
        finally:
            self._waiting -= 1
        try:
            self._check_usable()
        except WrapperError:
            self._lane.release()
            raise

    def _record(self, uuid: str, line: bytes) -> Record:
        return Record(uuid, line, Inbox(self._settings.inbox_frames, self._settings.inbox_bytes))

    async def _send(self, record: Record) -> None:
        self._running = record
        self._take(Event.BEGIN)
        record.take(TurnEvent.SEND)
        self._first_uuid = self._first_uuid or record.uuid
        self._last_uuid = record.uuid
        self._idle_output = 0
        limit = self._settings.answer_seconds
        late = AgentTimeout(f"the Claude process did not take up a message within {limit:g} s")
        record.arm(self._loop.call_later(limit, self._expire, record, late))
        line, record.line = record.line, b""
        await self._write(line)

    def _expire(self, record: Record, error: WrapperError) -> None:
        if not record.over:
            self._end(record, TurnEvent.EXPIRE, error)
            self._break(error)

    def _end(self, record: Record, event: TurnEvent, error: WrapperError | None = None) -> None:
        record.finish(event, error)
        if self._running is record:
            self._running = None
            self._take(Event.FINISH)
            if record.owns_lane:
                self._lane.release()

    # Reading ---------------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        framer = LineFramer(self._settings.max_line)
        rate = self._settings.output_rate
        credit, then = float(rate), self._clock.monotonic()
        while chunk := await self._transport.read():
            now = self._clock.monotonic()
            credit = min(float(rate), credit + (now - then) * rate) - len(chunk)
            then = now
            try:
                self._account(len(chunk))
                for line in framer.feed(chunk):
                    record = self._take_line(line)
                    if record is not None and record.inbox.full:
                        await record.inbox.room()
            except WrapperError as error:
                self._break(error)
                return
            if credit < 0:
                await self._clock.sleep(-credit / rate)

    def _take_line(self, line: bytes) -> Record | None:
        """The record whose inbox got the frame, if any."""
        try:
            frame = decode_frame(line)
            if frame.type in control.TYPES:
                self._control(frame)
                return None
            return self._route(frame)
        except MalformedFrame:
            self._garbage += 1
            if self._garbage > self._settings.garbage_lines:
                raise
            return None

    def _route(self, frame: Frame) -> Record | None:
        """Give the frame to whom it belongs; the record when it was the running turn's."""
        record, kind = self._running, frame.type
        if kind == "command_lifecycle":
            self._lifecycle(frame, record)
            return None
        if kind == "system" and frame.subtype == "init" and is_uuid(frame.session_id or ""):
            # It names files later, and whatever else writes to the process's pipe may have said it.
            self.session_uuid = frame.session_id
        if record is None or (self._announced and not record.acknowledged.is_set()):
            self._stray(frame)
            return None
        if kind == "result":
            if not self._owns(frame, record):
                self._stray(frame)
                return None
            record.result = frame
            record.inbox.put(frame)
            self._end(record, TurnEvent.RESULT)
            return None
        if not record.answered:
            self._answered(record)
        if record.state is not TurnState.STREAMING:
            record.take(TurnEvent.FRAME)
        if kind == "assistant":
            if frame.parent_tool_use_id is None:
                self.said = frame.uuid
            if b'"tool_use"' in frame.raw:
                self._note_tools(frame)
        record.inbox.put(frame)
        return record

    def _lifecycle(self, frame: Frame, record: Record | None) -> None:
        try:
            found = _LIFECYCLE.decode(frame.raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise MalformedFrame("the Claude process wrote an unreadable command_lifecycle") from None
        self._announced = True
        if record is not None and found.command_uuid == record.uuid:
            if not record.answered:
                self._answered(record)
            if found.state != "queued":
                record.acknowledged.set()

    def _note_tools(self, frame: Frame) -> None:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            for block in _TOOL_CALLS.decode(frame.raw).message.content:
                if (
                    block.type == "tool_use"
                    and block.name not in TRACELESS_TOOLS
                    and not block.name.startswith("mcp__")
                ):
                    self.residue.add(block.name)

    def _answered(self, record: Record) -> None:
        record.answered = True
        limit = self._settings.turn_seconds
        late = AgentTimeout(f"the turn did not end within {limit:g} s")
        record.arm(self._loop.call_later(limit, self._expire, record, late))

    def _owns(self, frame: Frame, record: Record) -> bool:
        try:
            found = _RESULT_OWNER.decode(frame.raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return True  # the fields have another shape now: one turn at a time, so it is ours
        if found.user_message_uuids:
            return record.uuid in found.user_message_uuids
        return found.user_message_uuid in {None, record.uuid}

    def _stray(self, frame: Frame) -> None:
        if self.on_stray is not None:
            self.on_stray(frame)

    def _control(self, frame: Frame) -> None:
        if frame.type == control.RESPONSE:
            self._controls.replied(frame)
        elif frame.type == control.REQUEST:
            self._controls.asked(frame)
        else:
            self._controls.withdrawn(frame)

    def _account(self, size: int) -> None:
        record, limit = self._running, self._settings.turn_output
        if record is not None:
            record.output += size
            printed = record.output
        else:
            self._idle_output += size
            printed = self._idle_output
        if printed > limit:
            raise OutputLimitExceeded(f"the Claude process printed more than {limit} bytes in one turn")

    # Writing and ending ----------------------------------------------------------------------------------------------

    async def _write(self, line: bytes) -> None:
        limit = self._settings.write_seconds
        try:
            async with asyncio.timeout(limit):
                await self._transport.write(line)
        except TimeoutError:
            error = AgentTimeout(f"the Claude process did not read its input for {limit:g} s")
            self._break(error)
            raise error from None

    async def _watch(self) -> None:
        """The end of the process, however it comes, ends everything that hangs on it."""
        exited = asyncio.create_task(self._transport.exited(), name=f"agent-{self.pid}-exit")
        try:
            await asyncio.wait({exited, self._reader}, return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():  # stdout ended, or cannot be read any more: it exits now, or never will
                await asyncio.wait({exited}, timeout=_LAST_WORDS_SECONDS)
            if self._state in USABLE:
                if exited.done():
                    self._take(Event.EXITED)
                else:
                    self._break(AgentProtocolError(self._why_unread()))
            self.exit = await self._transport.stop(grace=0, term_grace=0)  # joins a stop that is under way
            await asyncio.wait({self._reader}, timeout=_LAST_WORDS_SECONDS)
            await self._let_go()
        except asyncio.CancelledError:  # the loop is being torn down
            self._transport.abort()
            raise
        finally:
            exited.cancel()

    async def _let_go(self) -> None:
        """Nothing more will come: tell everybody who waits."""
        self._reader.cancel()
        await asyncio.wait({self._reader})
        self._failure = self._failure or self._gone()
        self._take(Event.EXITED)
        if self._running is not None:
            self._end(self._running, TurnEvent.LOST, self._failure)
        self._controls.fail(self._failure)
        await self._controls.settled()
        self.closed.set()

    def _why_unread(self) -> str:
        fault = None if not self._reader.done() or self._reader.cancelled() else self._reader.exception()
        if fault is not None:
            return f"what the Claude process wrote could not be handled: {fault!r}"
        return "the Claude process closed its output and went on running"

    def condemn(self, error: WrapperError) -> None:
        """End the process now; whoever waits for it gets this error."""
        self._break(error)

    def _break(self, error: WrapperError) -> None:
        """It did what it must not do: no more turns, and the end, now."""
        if self._state not in USABLE:
            return
        self._failure = error
        self._take(Event.BREAK)
        if self._running is not None:
            self._end(self._running, TurnEvent.LOST, error)
        self._controls.fail(error)
        if self._stopper is None:
            self._stopper = asyncio.create_task(self._shut_down(0), name=f"agent-{self.pid}-kill")

    async def _shut_down(self, grace: float) -> ExitReport:
        report = await self._transport.stop(grace=grace, term_grace=self._settings.term_grace if grace > 0 else 0)
        await asyncio.wait({self._watcher})
        return report

    def _check_usable(self) -> None:
        if self._state not in USABLE:
            raise self._failure or self._gone()

    def _gone(self) -> WrapperError:
        if self._state in {State.CLOSING, State.CLOSED}:
            return AgentCrashed("the Claude process was stopped before the turn ended")
        return crashed(self.returncode, self.stderr_tail)

    def _take(self, event: Event) -> None:
        self._state = advance(self._state, event)

    def _spawn_task(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        task = asyncio.create_task(work, name=f"agent-{self.pid}-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
