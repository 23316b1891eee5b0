"""The ports of shared state, and the values that cross them.

Two adapters: `MemoryState` for one process, `RedisState` for many. One contract suite runs on both. Values are lost when
the memory process or the Redis server is; nothing here is the only copy of anything. Every method of the Redis adapter
raises StorageUnavailable when the server cannot be reached; what to do then (let through, refuse) is the caller's policy.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol


class Cells(Protocol):
    """What a script may do, on the memory adapter: strings under keys, with a time to live in milliseconds."""

    def get(self, key: str) -> str | None:
        """The value, or None."""
        ...

    def set(self, key: str, value: str, ttl_ms: int | None) -> None:
        """Store; without a time to live it stays."""
        ...

    def delete(self, key: str) -> None:
        """Forget."""
        ...


Local = Callable[[Cells, Sequence[str], Sequence[str], int], list[str | int]]


@dataclass(frozen=True, slots=True)
class Script:
    """One atomic operation, written twice: Lua for Redis, the same arithmetic in Python for memory.

    Lua gets KEYS and ARGV, with the present time in microseconds (of the Redis server) as the last ARGV, and returns a
    list of strings and integers. `local` gets (cells, keys, args, now in microseconds). Neither may touch other keys.
    """

    name: str
    lua: str
    local: Local


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to be the only one, until `ttl` seconds after the last renewal."""

    name: str
    holder: str
    token: int
    """Grows with every grant, of whatever name: whoever writes with a smaller one than the newest is out of date."""
    ttl: float


class Ended(enum.StrEnum):
    """Why a subscription gave no more messages."""

    CLOSED = "closed"
    """By the subscriber or the server's end."""
    LAGGED = "lagged"
    """The subscriber was too slow and its buffer is full: messages were lost, subscribe again and catch up."""
    DISCONNECTED = "disconnected"
    """The link to Redis broke: messages may have been lost, subscribe again and catch up."""


class Subscription(Protocol):
    """Messages of one channel, from the moment of subscribing."""

    ended: Ended | None

    def __aiter__(self) -> Subscription: ...

    def offer(self, message: bytes) -> None:
        """Put a message into this one subscriber's own buffer."""
        ...

    async def __anext__(self) -> bytes:
        """The next message; StopAsyncIteration once `ended` is set and the buffer is empty."""
        ...


class Counters(Protocol):
    """Integers that start at 0 and vanish after a time."""

    async def increment(self, key: str, by: int = 1, *, ttl: float) -> int:
        """Add; the value after. `ttl` (seconds) counts from the counter's creation."""
        ...

    async def count(self, key: str) -> int:
        """The present value, 0 if there is none."""
        ...


class Values(Protocol):
    """Small values with an optional time to live in seconds."""

    async def get(self, key: str) -> bytes | None: ...

    async def set(self, key: str, value: bytes, *, ttl: float | None = None) -> None: ...

    async def compare_and_set(
        self, key: str, expected: bytes | None, value: bytes | None, *, ttl: float | None = None
    ) -> bool:
        """Set only if the present value is `expected` (None: absent); `value` None deletes. Whether it was done."""
        ...

    async def delete(self, key: str) -> bool:
        """Whether there was something."""
        ...


class Leases(Protocol):
    """At most one holder per name."""

    async def acquire(self, name: str, holder: str, *, ttl: float) -> Lease | None:
        """A lease, or None while another holder has it. The same holder gets a new lease with a higher token."""
        ...

    async def renew(self, lease: Lease) -> bool:
        """Extend by `lease.ttl` from now; False: it is lost, stop writing."""
        ...

    async def release(self, lease: Lease) -> bool:
        """Give up; False if it was lost already."""
        ...

    async def holder(self, name: str) -> Lease | None:
        """Who holds it now; `ttl` is what is left, in seconds."""
        ...


class Channels(Protocol):
    """Messages to whoever listens now; nothing is kept for later listeners."""

    async def publish(self, channel: str, message: bytes) -> None: ...

    def subscribe(self, channel: str, *, buffer: int = 1000) -> AbstractAsyncContextManager[Subscription]:
        """Listen from the moment the block is entered; at most `buffer` unread messages, then LAGGED."""
        ...


class Scripts(Protocol):
    """Atomic operations that limits and pools define themselves."""

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[str | int | float]) -> list[str | int]: ...


class SharedState(Counters, Values, Leases, Channels, Scripts, Protocol):
    """All of it, from one adapter."""

    async def ping(self) -> None:
        """Raise StorageUnavailable unless it answers."""
        ...

    async def close(self) -> None:
        """End all subscriptions and connections. Idempotent."""
        ...
