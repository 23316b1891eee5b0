"""A cache of bytes: what may be asked again is kept for a while, and nothing ever depends on it.

`Cache` is what other rooms use; it looks in a `CacheStore`: `MemoryStore` for one process, `RedisStore`
(`storage.cacheredis`) for many replicas. One contract suite runs on both. A store that fails is a miss: counted, logged
once, and left alone for a while, so that a dead Redis does not cost every request its time-out.

Values are stored as they are given. What belongs to a tenant goes through `vault.sealedcache`, which seals them.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import structlog

from claude_wrapper.clock import Clock
from claude_wrapper.errors import StorageUnavailable

log = structlog.get_logger(__name__)

T = TypeVar("T")

ENTRY_BYTES: Final = 200
"""What an entry costs beside its key and its value, about (measured for the dictionary of the memory store)."""
_POLL_SECONDS: Final = 0.05


class Outcome(enum.StrEnum):
    """What a look-up gave."""

    HIT = "hit"
    MISS = "miss"
    JOINED = "joined"
    """It was being computed for somebody else, whose value this is."""
    SHARED = "shared"
    """It came from another organisation, which shares with this one (`vault.sealedcache`)."""
    ERROR = "error"
    """The store failed: a miss."""


class CacheStore(Protocol):
    """Where values lie. Raises StorageUnavailable when it cannot be reached."""

    async def get(self, key: str) -> bytes | None:
        """The value, which is now the most recently used one; None when it is not there or too old."""
        ...

    async def put(self, key: str, value: bytes, *, ttl: float) -> bool:
        """Keep for `ttl` seconds; the least recently used values make room. False: too large for one entry, or no ttl."""
        ...

    async def delete(self, key: str) -> bool:
        """Whether there was something."""
        ...

    async def claim(self, key: str, holder: str, *, ttl: float) -> bool:
        """Whether `holder` is the one to compute this key, for `ttl` seconds."""
        ...

    async def unclaim(self, key: str, holder: str) -> None:
        """Give a claim back."""
        ...

    async def size(self) -> int:
        """Bytes that keys and values take, and what their entries cost."""
        ...

    async def close(self) -> None:
        """Let connections go. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a store may hold, in bytes."""

    total: int = 64 * 2**20
    entry: int = 2 * 2**20


def cache_key(*parts: str | bytes) -> str:
    """One key for what is asked: the same parts in the same order, and nothing else, give the same key."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        digest.update(struct.pack(">Q", len(encoded)))  # so that ("ab", "c") and ("a", "bc") differ
        digest.update(encoded)
    return digest.hexdigest()


def entry_cost(key: str, value: bytes) -> int:
    """What an entry counts, in bytes."""
    return len(key) + len(value) + ENTRY_BYTES


class MemoryStore:
    """A store in this process. No awaits inside, so every operation is atomic."""

    def __init__(self, clock: Clock, bounds: Bounds) -> None:
        self._clock, self._bounds = clock, bounds
        self._entries: OrderedDict[str, tuple[bytes, float]] = OrderedDict()  # the least recently used first
        self._claims: dict[str, tuple[str, float]] = {}
        self._size = 0

    @property
    def held(self) -> int:
        """`size`, for metrics, without waiting."""
        return self._size

    async def get(self, key: str) -> bytes | None:
        found = self._entries.get(key)
        if found is None:
            return None
        value, ends = found
        if ends <= self._clock.monotonic():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return value

    async def put(self, key: str, value: bytes, *, ttl: float) -> bool:
        cost = entry_cost(key, value)
        if key in self._entries:
            self._drop(key)
        if ttl <= 0 or cost > min(self._bounds.entry, self._bounds.total):
            return False
        while self._size + cost > self._bounds.total:
            self._drop(next(iter(self._entries)))
        self._entries[key] = (value, self._clock.monotonic() + ttl)
        self._size += cost
        return True

    async def delete(self, key: str) -> bool:
        present = await self.get(key) is not None
        if present:
            self._drop(key)
        return present

    async def claim(self, key: str, holder: str, *, ttl: float) -> bool:
        now = self._clock.monotonic()
        other = self._claims.get(key)
        if other is not None and other[0] != holder and other[1] > now:
            return False
        self._claims[key] = (holder, now + ttl)
        return True

    async def unclaim(self, key: str, holder: str) -> None:
        if self._claims.get(key, ("", 0.0))[0] == holder:
            del self._claims[key]

    async def size(self) -> int:
        return self._size

    async def close(self) -> None:
        self._entries.clear()
        self._size = 0

    def _drop(self, key: str) -> None:
        value, _ = self._entries.pop(key)
        self._size -= entry_cost(key, value)


@dataclass(frozen=True, slots=True)
class Computed:
    """What was computed, and whether it may be kept (an error that is told to the caller is not)."""

    value: bytes = field(repr=False)
    keep: bool = True
    shared: bool = False
    """It was not computed at all: another organisation had it."""


@dataclass(frozen=True, slots=True)
class Found:
    """A value and where it came from."""

    value: bytes = field(repr=False)
    outcome: Outcome


class _Flight(asyncio.Future[Found | None]):
    """Somebody computes a key; the others wait. None: whoever computed was cancelled, somebody else has to."""


class Cache:
    """One named cache over a store, which several caches may share."""

    def __init__(
        self,
        name: str,
        store: CacheStore,
        clock: Clock,
        *,
        watch: Callable[[str, Outcome], None] = lambda name, outcome: None,
        holder: str = "",
        lease_seconds: float = 0.0,
        rest_seconds: float = 5.0,
    ) -> None:
        """`watch` gets the name and the outcome of every look-up, and an `error` for every failure of the store.

        With `lease_seconds` above 0 other replicas (this one is `holder`) wait at most so long for what one of them
        computes; that costs two round trips per miss. A store that failed is not asked for `rest_seconds`.
        """
        self.name = name
        self._store, self._clock, self._watch = store, clock, watch
        self._holder, self._lease_seconds, self._rest_seconds = holder, lease_seconds, rest_seconds
        self._flights: dict[str, _Flight] = {}
        self._resting_until: float | None = None

    async def get(self, key: str) -> bytes | None:
        """The value, or None. Counted as a hit, a miss or an error."""
        found = await self._look(key)
        self._watch(self.name, found.outcome)
        return found.value if found.outcome is Outcome.HIT else None

    async def peek(self, key: str) -> bytes | None:
        """As `get`, uncounted: a part of another look-up."""
        found = await self._look(key)
        return found.value if found.outcome is Outcome.HIT else None

    async def put(self, key: str, value: bytes, ttl: float) -> bool:
        """Keep for `ttl` seconds; False when it is not kept (too large, no ttl, the store failed)."""
        return bool(await self._tried(self._store.put, self._place(key), value, ttl=ttl))

    async def delete(self, key: str) -> bool:
        """Forget; whether there was something (False as well when the store failed: it is then there until its end)."""
        return bool(await self._tried(self._store.delete, self._place(key)))

    async def get_or_compute(
        self, key: str, ttl: float, compute: Callable[[], Awaitable[Computed]], *, refresh: bool = False
    ) -> Found:
        """The value of `key`; if it is not there, what `compute` gives, which is then kept for `ttl` seconds.

        Of those who ask for one key at once, one computes and the others get its value, or the error that it met; if
        it is cancelled, another takes over. `refresh` computes although there is a value. A caller that asks while a
        value is computed takes that one, `refresh` or not.
        """
        while (flight := self._flights.get(key)) is not None:
            found = await asyncio.shield(flight)
            if found is not None:
                outcome = Outcome.HIT if found.outcome is Outcome.HIT else Outcome.JOINED
                self._watch(self.name, outcome)
                return Found(found.value, outcome)
        flight = self._flights[key] = _Flight()
        try:
            found = await self._look_or_compute(key, ttl, compute, refresh=refresh)
        except asyncio.CancelledError:
            self._land(key).set_result(None)
            raise
        except BaseException as error:
            self._land(key).set_exception(error)
            flight.exception()  # nobody may be waiting
            raise
        self._land(key).set_result(found)
        self._watch(self.name, found.outcome)
        return found

    def _land(self, key: str) -> _Flight:
        return self._flights.pop(key)

    async def _look_or_compute(
        self, key: str, ttl: float, compute: Callable[[], Awaitable[Computed]], *, refresh: bool
    ) -> Found:
        looked = Found(b"", Outcome.MISS) if refresh else await self._look(key)
        if looked.outcome is Outcome.HIT:
            return looked
        leased = self._lease_seconds > 0 and looked.outcome is Outcome.MISS
        if leased and (theirs := await self._theirs(key, refresh=refresh)) is not None:
            return theirs
        try:
            computed = await compute()
            if computed.keep:
                await self.put(key, computed.value, ttl)
        finally:
            if leased:
                await self._tried(self._store.unclaim, self._place(key), self._holder)
        return Found(computed.value, Outcome.SHARED if computed.shared else looked.outcome)

    async def _theirs(self, key: str, *, refresh: bool) -> Found | None:
        """What another replica computes meanwhile; None: we have the claim, or have waited long enough."""
        ends = self._clock.monotonic() + self._lease_seconds
        while True:
            mine = await self._tried(self._store.claim, self._place(key), self._holder, ttl=self._lease_seconds)
            if mine is None or mine or self._clock.monotonic() >= ends:
                return None
            await self._clock.sleep(_POLL_SECONDS)
            found = None if refresh else await self._look(key)
            if found is not None and found.outcome is Outcome.HIT:
                return Found(found.value, Outcome.JOINED)

    async def _look(self, key: str) -> Found:
        if self._resting():
            return Found(b"", Outcome.ERROR)
        try:
            value = await self._store.get(self._place(key))
        except StorageUnavailable as error:
            self._failed(error)
            return Found(b"", Outcome.ERROR)
        self._recovered()
        return Found(b"", Outcome.MISS) if value is None else Found(value, Outcome.HIT)

    async def _tried(self, ask: Callable[..., Awaitable[T]], *args: object, **kw: object) -> T | None:
        """The store's answer; None when it fails or rests."""
        if self._resting():
            return None
        try:
            answer = await ask(*args, **kw)
        except StorageUnavailable as error:
            self._failed(error)
            self._watch(self.name, Outcome.ERROR)
            return None
        self._recovered()
        return answer

    def _place(self, key: str) -> str:
        return f"{self.name}:{key}"

    def _resting(self) -> bool:
        return self._resting_until is not None and self._clock.monotonic() < self._resting_until

    def _failed(self, error: StorageUnavailable) -> None:
        if self._resting_until is None:
            log.warning("cache.store_failed", cache=self.name, reason=error.message, effect="all look-ups miss")
        self._resting_until = self._clock.monotonic() + self._rest_seconds

    def _recovered(self) -> None:
        if self._resting_until is not None:
            self._resting_until = None
            log.warning("cache.store_answers_again", cache=self.name)
