"""One message to many local subscribers, each with a bounded buffer."""

from __future__ import annotations

import asyncio
from collections import deque

from claude_wrapper.storage.state.ports import Ended


class BufferedSubscription:
    """A subscriber's own buffer. A full one ends the subscription: nobody waits for a slow reader."""

    def __init__(self, buffer: int) -> None:
        self.ended: Ended | None = None
        self._messages: deque[bytes] = deque()
        self._buffer = buffer
        self._ready = asyncio.Event()

    def __aiter__(self) -> BufferedSubscription:
        return self

    async def __anext__(self) -> bytes:
        while not self._messages:
            if self.ended is not None:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        return self._messages.popleft()

    def offer(self, message: bytes) -> None:
        """Give a message; never waits."""
        if self.ended is not None:
            return
        if len(self._messages) >= self._buffer:
            self.end(Ended.LAGGED)
            return
        self._messages.append(message)
        self._ready.set()

    def end(self, why: Ended) -> None:
        """No more messages; what is buffered can still be read."""
        if self.ended is None:
            self.ended = why
            self._ready.set()


class Fanout:
    """Local subscribers by channel."""

    def __init__(self) -> None:
        self._subscribers: dict[str, set[BufferedSubscription]] = {}

    def add(self, channel: str, buffer: int) -> BufferedSubscription:
        """A new subscriber."""
        subscription = BufferedSubscription(buffer)
        self._subscribers.setdefault(channel, set()).add(subscription)
        return subscription

    def remove(self, channel: str, subscription: BufferedSubscription) -> bool:
        """Take a subscriber away; whether it was the channel's last."""
        subscription.end(Ended.CLOSED)
        subscribers = self._subscribers.get(channel, set())
        subscribers.discard(subscription)
        if subscribers:
            return False
        self._subscribers.pop(channel, None)
        return True

    def offer(self, channel: str, message: bytes) -> None:
        """Give a message to all subscribers of a channel."""
        for subscription in self._subscribers.get(channel, ()):
            subscription.offer(message)

    def has(self, channel: str) -> bool:
        """Whether anybody listens."""
        return channel in self._subscribers

    def end_all(self, why: Ended) -> None:
        """End every subscription."""
        for subscribers in self._subscribers.values():
            for subscription in subscribers:
                subscription.end(why)
        self._subscribers.clear()
