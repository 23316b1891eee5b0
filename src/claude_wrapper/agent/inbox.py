"""The frames of one turn, between the process's reader and the turn's consumer.

Bounded in frames and bytes: when it is full the reader waits, the pipe fills, and the process waits. One producer, one
consumer, one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque

from claude_wrapper.wire.streamjson import Frame


class Inbox:
    """A bounded queue that can be closed (with or without an error) and turned into a drain."""

    __slots__ = (
        "_bytes",
        "_closed",
        "_discarding",
        "_error",
        "_frames",
        "_getter",
        "_max_bytes",
        "_max_frames",
        "_putter",
    )

    def __init__(self, max_frames: int, max_bytes: int) -> None:
        """Full means either bound reached; one frame beyond is possible, because a frame is not split."""
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._frames: deque[Frame] = deque()
        self._bytes = 0
        self._getter: asyncio.Future[None] | None = None
        self._putter: asyncio.Future[None] | None = None
        self._closed = False
        self._discarding = False
        self._error: BaseException | None = None

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def full(self) -> bool:
        """Whether the producer should wait for `room`."""
        return len(self._frames) >= self._max_frames or self._bytes >= self._max_bytes

    def put(self, frame: Frame) -> None:
        """Add a frame; without effect after `close` or `discard`."""
        if self._discarding or self._closed:
            return
        self._frames.append(frame)
        self._bytes += len(frame.raw)
        if self._getter is not None:
            _wake(self._getter)

    async def room(self) -> None:
        """Return when the inbox is not full, or nobody will read it any more."""
        while self.full and not (self._closed or self._discarding):
            self._putter = asyncio.get_running_loop().create_future()
            try:
                await self._putter
            finally:
                self._putter = None

    async def get(self) -> Frame | None:
        """The next frame; None at the end. Raises what `close` was given, after the frames before it."""
        while not self._frames:
            if self._closed:
                if self._error is not None:
                    raise self._error
                return None
            self._getter = asyncio.get_running_loop().create_future()
            try:
                await self._getter
            finally:
                self._getter = None
        frame = self._frames.popleft()
        self._bytes -= len(frame.raw)
        if self._putter is not None and not self.full:
            _wake(self._putter)
        return frame

    def close(self, error: BaseException | None = None) -> None:
        """No more frames will come. The first call decides."""
        if not self._closed:
            self._closed = True
            self._error = error
            self._wake_both()

    def discard(self) -> None:
        """Drop what is there and what will come; the producer never waits again."""
        self._discarding = True
        self._frames.clear()
        self._bytes = 0
        self._wake_both()

    def _wake_both(self) -> None:
        for waiter in (self._getter, self._putter):
            if waiter is not None:
                _wake(waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
