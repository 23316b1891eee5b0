"""Shared state of one process: dictionaries and the injected clock. No awaits inside, so every operation is atomic."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from claude_wrapper.clock import Clock
from claude_wrapper.storage.state.fanout import BufferedSubscription, Fanout
from claude_wrapper.storage.state.ports import Ended, Lease, Script

_SWEEP_EVERY = 4096  # writes between two removals of what has expired


@dataclass(slots=True)
class _Entry:
    value: bytes
    expires_at: float | None


class _Store:
    """Keys with expiry on the monotonic clock: a wall clock that jumps frees or keeps nothing."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._writes = 0

    def get(self, key: str) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires_at is not None and entry.expires_at <= self._clock.monotonic():
            del self._entries[key]
            return None
        return entry.value

    def put(self, key: str, value: bytes, ttl: float | None) -> None:
        self._sweep()
        self._entries[key] = _Entry(value, None if ttl is None else self._clock.monotonic() + ttl)

    def keep_expiry(self, key: str, value: bytes) -> None:
        self._entries[key].value = value

    def delete(self, key: str) -> bool:
        present = self.get(key) is not None
        self._entries.pop(key, None)
        return present

    def left(self, key: str) -> float:
        entry = self._entries[key]
        return (entry.expires_at or 0.0) - self._clock.monotonic()

    def _sweep(self) -> None:
        self._writes += 1
        if self._writes % _SWEEP_EVERY:
            return
        now = self._clock.monotonic()
        gone = [key for key, entry in self._entries.items() if entry.expires_at is not None and entry.expires_at <= now]
        for key in gone:
            del self._entries[key]


class _ScriptCells:
    """The store as scripts see it: strings, milliseconds, and only the keys that the script was given."""

    def __init__(self, store: _Store, keys: Sequence[str]) -> None:
        self._store, self._keys = store, frozenset(keys)

    def get(self, key: str) -> str | None:
        value = self._store.get(self._own(key))
        return None if value is None else value.decode()

    def set(self, key: str, value: str, ttl_ms: int | None) -> None:
        self._store.put(self._own(key), value.encode(), None if ttl_ms is None else ttl_ms / 1000)

    def delete(self, key: str) -> None:
        self._store.delete(self._own(key))

    def _own(self, key: str) -> str:
        if key not in self._keys:
            raise KeyError(f"the script was not given the key {key!r}")
        return f"s:{key}"


class MemoryState:
    """`SharedState` of a server that has no other replicas."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._store = _Store(clock)
        self._leases: dict[str, tuple[Lease, float]] = {}
        self._token = 0
        self._fanout = Fanout()

    async def increment(self, key: str, by: int = 1, *, ttl: float) -> int:
        value = self._store.get(f"c:{key}")
        after = (0 if value is None else int(value)) + by
        if value is None:
            self._store.put(f"c:{key}", str(after).encode(), ttl)
        else:
            self._store.keep_expiry(f"c:{key}", str(after).encode())
        return after

    async def count(self, key: str) -> int:
        value = self._store.get(f"c:{key}")
        return 0 if value is None else int(value)

    async def get(self, key: str) -> bytes | None:
        return self._store.get(f"v:{key}")

    async def set(self, key: str, value: bytes, *, ttl: float | None = None) -> None:
        self._store.put(f"v:{key}", value, ttl)

    async def compare_and_set(
        self, key: str, expected: bytes | None, value: bytes | None, *, ttl: float | None = None
    ) -> bool:
        if self._store.get(f"v:{key}") != expected:
            return False
        if value is None:
            self._store.delete(f"v:{key}")
        else:
            self._store.put(f"v:{key}", value, ttl)
        return True

    async def delete(self, key: str) -> bool:
        return self._store.delete(f"v:{key}")

    async def acquire(self, name: str, holder: str, *, ttl: float) -> Lease | None:
        present = await self.holder(name)
        if present is not None and present.holder != holder:
            return None
        self._token += 1
        lease = Lease(name, holder, self._token, ttl)
        self._leases[name] = (lease, self._clock.monotonic() + ttl)
        return lease

    async def renew(self, lease: Lease) -> bool:
        if not await self._holds(lease):
            return False
        self._leases[lease.name] = (lease, self._clock.monotonic() + lease.ttl)
        return True

    async def release(self, lease: Lease) -> bool:
        if not await self._holds(lease):
            return False
        del self._leases[lease.name]
        return True

    async def holder(self, name: str) -> Lease | None:
        found = self._leases.get(name)
        if found is None:
            return None
        lease, ends = found
        left = ends - self._clock.monotonic()
        if left <= 0:
            del self._leases[name]
            return None
        return replace(lease, ttl=left)

    async def _holds(self, lease: Lease) -> bool:
        present = await self.holder(lease.name)
        return present is not None and present.token == lease.token

    async def publish(self, channel: str, message: bytes) -> None:
        self._fanout.offer(channel, message)

    @asynccontextmanager
    async def subscribe(self, channel: str, *, buffer: int = 1000) -> AsyncIterator[BufferedSubscription]:
        subscription = self._fanout.add(channel, buffer)
        try:
            yield subscription
        finally:
            self._fanout.remove(channel, subscription)

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[str | int | float]) -> list[str | int]:
        now = int(self._clock.monotonic() * 1_000_000)
        return script.local(_ScriptCells(self._store, keys), keys, [str(arg) for arg in args], now)

    async def ping(self) -> None:
        return None

    async def close(self) -> None:
        self._fanout.end_all(Ended.CLOSED)
