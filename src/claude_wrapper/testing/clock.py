"""Time and identifiers that a test moves by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import Counter
from datetime import UTC, datetime, timedelta

_START = datetime(2026, 1, 1, tzinfo=UTC)
_SETTLE_ROUNDS = 10  # turns of the event loop that a woken sleeper gets to reach its next await


class ManualClock:
    """A `clock.Clock` that stands still until `advance` is called.

    Sleepers wake in the order of their wake-up times, each at exactly its own time: while one runs, `now()` and
    `monotonic()` say its wake-up time, so that a chain of sleeps inside one `advance` keeps its order.
    """

    def __init__(self, now: datetime = _START, monotonic: float = 1000.0) -> None:
        """`now` must be aware. The monotonic clock starts apart from it, so that mixing them up shows."""
        if now.tzinfo is None:
            raise ValueError("now: must have a time zone")
        self._now = now.astimezone(UTC)
        self._monotonic = monotonic
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._slept = asyncio.Event()

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._monotonic + seconds, next(self._order), woken))
        self._slept.set()
        await woken

    @property
    def sleepers(self) -> int:
        """How many tasks sleep now."""
        return sum(not woken.done() for _, _, woken in self._sleepers)

    async def wait_for_sleepers(self, count: int = 1) -> None:
        """Return once at least `count` tasks sleep. Bound it with `asyncio.timeout`."""
        while self.sleepers < count:
            self._slept.clear()
            await self._slept.wait()

    async def advance(self, seconds: float) -> None:
        """Move time forward and let everything that is due run, in order."""
        if seconds < 0:
            raise ValueError("seconds: time does not go backwards")
        target = self._monotonic + seconds
        await self._settle()
        while self._sleepers and self._sleepers[0][0] <= target:
            due, _, woken = heapq.heappop(self._sleepers)
            if woken.done():  # its task was cancelled
                continue
            self._move(due)
            woken.set_result(None)
            await self._settle()
        self._move(target)

    def jump(self, seconds: float) -> None:
        """Move only the wall clock, as an administrator or a time server may; sleepers do not notice."""
        self._now += timedelta(seconds=seconds)

    def _move(self, to: float) -> None:
        self._now += timedelta(seconds=to - self._monotonic)
        self._monotonic = to

    async def _settle(self) -> None:
        for _ in range(_SETTLE_ROUNDS):
            await asyncio.sleep(0)


class SequentialIds:
    """An `ids.Ids` that counts per prefix: `turn_00000000000000000000000001`, `…2`; UUIDs count too."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def new(self, prefix: str) -> str:
        self._counts[prefix] += 1
        return f"{prefix}_{self._counts[prefix]:026d}"

    def uuid(self) -> str:
        self._counts["uuid"] += 1
        return f"00000000-0000-4000-8000-{self._counts['uuid']:012d}"
