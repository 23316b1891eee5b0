"""A turn: what the caller holds, and the record of it that the connection keeps.

The two are apart because they end at different times. The handle ends when its caller leaves; the record ends with the
`result` of the process, or with the process, and only then may the next turn begin.
"""

from __future__ import annotations

import asyncio
import weakref
from types import TracebackType
from typing import Protocol, Self

from claude_wrapper.agent.inbox import Inbox
from claude_wrapper.errors import WrapperError
from claude_wrapper.wire.streamjson import Frame
from claude_wrapper.wire.turn import ENDED, LISTENING, TurnEvent, TurnState, advance


class Record:
    """One turn from the connection's side. Its state is written only here."""

    __slots__ = (
        "acknowledged",
        "answered",
        "ended",
        "error",
        "inbox",
        "interrupted",
        "line",
        "output",
        "owns_lane",
        "result",
        "state",
        "timer",
        "uuid",
    )

    def __init__(self, uuid: str, line: bytes, inbox: Inbox) -> None:
        """`line` is what will be written to the process; `uuid` names it in the frames that answer it."""
        self.uuid = uuid
        self.line = line
        self.inbox = inbox
        self.state = TurnState.QUEUED
        self.result: Frame | None = None
        self.error: WrapperError | None = None
        self.ended = asyncio.Event()
        self.acknowledged = asyncio.Event()
        """The process has begun to work on it: frames from now on are its own."""
        self.answered = False
        """The process has shown that it read the line."""
        self.interrupted = False
        self.output = 0
        self.owns_lane = True
        """Whether the lane is free for the next turn when this one ends."""
        self.timer: asyncio.TimerHandle | None = None

    @property
    def over(self) -> bool:
        """Whether the process owes nothing more for this turn."""
        return self.state in ENDED

    @property
    def listening(self) -> bool:
        """Whether frames go to the caller."""
        return self.state in LISTENING

    def take(self, event: TurnEvent) -> None:
        """Advance; raises IllegalTransition."""
        self.state = advance(self.state, event)

    def arm(self, timer: asyncio.TimerHandle | None) -> None:
        """Replace the running time limit."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = timer

    def finish(self, event: TurnEvent, error: WrapperError | None = None) -> None:
        """The end: RESULT, LOST, EXPIRE, or ABANDON of a turn that was never sent."""
        self.take(event)
        self.arm(None)
        self.error = error
        self.line = b""
        self.inbox.close(error)
        self.ended.set()


class Running(Protocol):
    """What a turn asks of the connection that runs it."""

    async def begin(self, record: Record) -> None:
        """Wait for the turns before, then send the line."""
        ...

    async def interrupt_record(self, record: Record) -> None:
        """Ask the process to stop this turn; the caller goes on listening."""
        ...

    def abandon_record(self, record: Record) -> None:
        """The caller is gone: interrupt, drop frames until the result, else kill."""
        ...


class Turn:
    """One question and the frames of its answer, ending with `result`.

        async with agent.turn("hello") as turn:
            async for frame in turn: ...

    The turn takes its place in the queue when it is entered or first awaited. Leaving the block early, being cancelled
    while waiting for a frame, or dropping the object abandons it: the process is interrupted and drained so that the
    next turn gets its own answer. Errors of the process (AgentCrashed, AgentTimeout, AgentProtocolError,
    OutputLimitExceeded) are raised after the frames that came before them.
    """

    __slots__ = ("__weakref__", "_entered", "_forgotten", "_record", "_running")

    def __init__(self, running: Running, record: Record) -> None:
        """Made by `Agent.turn`."""
        self._running = running
        self._record = record
        self._entered = False
        self._forgotten = weakref.finalize(self, _forgotten, asyncio.get_running_loop(), running, record)
        self._forgotten.atexit = False

    @property
    def uuid(self) -> str:
        """The uuid of the user line."""
        return self._record.uuid

    @property
    def state(self) -> TurnState:
        """Where it is."""
        return self._record.state

    @property
    def result(self) -> Frame | None:
        """The `result` frame, once it has come."""
        return self._record.result

    async def __aenter__(self) -> Self:
        if not self._entered:
            self._entered = True
            await self._running.begin(self._record)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.abandon()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Frame:
        if not self._entered:
            await self.__aenter__()
        try:
            frame = await self._record.inbox.get()
        except asyncio.CancelledError:
            self._running.abandon_record(self._record)
            raise
        if frame is None:
            raise StopAsyncIteration
        return frame

    async def interrupt(self) -> None:
        """Stop the turn; its partial answer and its `result` still come. Harmless when it is over."""
        await self._running.interrupt_record(self._record)

    async def abandon(self) -> None:
        """Leave the turn; returns when the process is free for the next one, or was killed. Harmless when over."""
        self._running.abandon_record(self._record)
        if not self._record.over:
            await self._record.ended.wait()


def _forgotten(loop: asyncio.AbstractEventLoop, running: Running, record: Record) -> None:
    """The handle was garbage collected. Any thread may run this."""
    if not record.over and not loop.is_closed():
        loop.call_soon_threadsafe(running.abandon_record, record)
