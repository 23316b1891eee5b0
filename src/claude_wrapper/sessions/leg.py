"""What one request sees of a turn.

A turn of the CLI runs from a user line to its `result`. When the caller's own tools are called on the way, one turn
answers several requests: each request is a *leg*, which ends with `stop_reason: "tool_use"` and is continued by the next
request's tool results. A leg is a bounded stream: a caller that reads slowly slows the process down through the pipe;
one that has gone is not waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

from claude_wrapper.errors import WrapperError
from claude_wrapper.wire.merge import MessageMerger
from claude_wrapper.wire.streamjson import Frame

_ROOM: Final = 256
"""Frames that may wait for the caller: about one second of fast streaming."""
_STALL_SECONDS: Final = 60.0
"""A caller that has not read for this long, with its buffer full, is taken for gone."""


@dataclass(frozen=True, slots=True)
class Started:
    """Said once a process has begun to answer the turn."""

    session: str
    turn: str
    pid: int
    kind: str
    """`warm`, `reused`, `spare` or `cold`."""
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class Item:
    """One frame of the CLI and what it means as Messages server-sent events (possibly nothing)."""

    frame: Frame
    events: list[bytes]


class Leg:
    """One request's view of a turn. Written by the conversation, read by the request."""

    def __init__(self, merger: MessageMerger, on_hang_up: Callable[[Leg], None]) -> None:
        self.merger = merger
        self.started: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        self.gone = False
        self.finished = False
        self.done = asyncio.Event()
        """Set when the conversation is finished with this request."""
        self.error: WrapperError | None = None
        self.notes: dict[str, str] = {}
        """Response headers about what was not done as it was asked; complete once the answer has begun."""
        self._items: asyncio.Queue[Item | None] = asyncio.Queue(_ROOM)
        self._room = asyncio.Event()
        self._on_hang_up = on_hang_up

    # Written by the conversation ------------------------------------------------------------------------------------

    def start(self, started: Started) -> None:
        if not self.started.done():
            self.started.set_result(started)

    async def put(self, item: Item) -> None:
        """Hand over one frame; waits for room, but never for a caller that has gone."""
        while not self.gone:
            try:
                self._items.put_nowait(item)
            except asyncio.QueueFull:
                self._room.clear()
                try:
                    async with asyncio.timeout(_STALL_SECONDS):
                        await self._room.wait()
                except TimeoutError:
                    self.hang_up()
            else:
                return

    def finish(self, error: WrapperError | None = None) -> None:
        """No more items; with `error`, the request is answered with it."""
        if self.finished:
            return
        self.finished = True
        self.error = error
        self.done.set()
        if not self.started.done():
            self.started.set_exception(error or WrapperError("the turn ended before it started"))
            self.started.exception()  # a caller that has gone never asks: not an unhandled error
        if self._items.full():
            # The reader empties the queue, then finds `finished`.
            return
        self._items.put_nowait(None)

    # Read by the request --------------------------------------------------------------------------------------------

    async def items(self) -> AsyncIterator[Item]:
        """Frames in order until the leg ends; raises the turn's error, if there is one, after the last frame."""
        while True:
            if self.finished and self._items.empty():
                break
            item = await self._items.get()
            self._room.set()
            if item is None:
                break
            yield item
        if self.error is not None:
            raise self.error

    def ready(self) -> list[Item]:
        """What waits already. A system call per write costs more than everything else about an event (measured)."""
        found: list[Item] = []
        while not self._items.empty():
            item = self._items.get_nowait()
            if item is not None:  # None says what `finished` says too
                found.append(item)
        if found:
            self._room.set()
        return found

    async def message(self) -> dict[str, Any]:
        """Wait for the end and return the whole Message."""
        async for _ in self.items():
            pass
        return self.merger.message()

    def hang_up(self) -> None:
        """The caller has gone. What happens to the turn is the conversation's choice."""
        if self.gone or self.finished:
            self.gone = True
            return
        self.gone = True
        self._room.set()
        self._on_hang_up(self)
