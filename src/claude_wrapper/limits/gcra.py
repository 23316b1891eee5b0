"""The rate limit as arithmetic: GCRA with variable cost, reserve then settle.

This is the continuous-state form of the generic cell rate algorithm (ITU-T I.371, annex A, which shows that it and the
virtual-scheduling form admit the same cells). A `Level` says how much of a rate is used and when that was true; it
drains by `limit / period` per second. Two numbers instead of one theoretical arrival time, because then
* a clock that goes backwards only stops the draining until it has caught up: nobody is locked out for the size of the jump;
* a limit that an admin changes applies at once, with what is used kept.

`take` reserves an estimate before the work, `settle` corrects it after: back if less was used, more if more was used.
More may leave a debt (used > capacity), which only time pays. Nothing here does I/O or reads a clock; the Lua script in
`redis.py` repeats `drain` and the test in `take`, and a test runs both against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ROUNDING: Final = 1e-6
"""Cost units by which floating point may be wrong: a bucket that is full but for this is full."""


@dataclass(frozen=True, slots=True)
class Rate:
    """`limit` units per `period` seconds, of which `burst` may come at once (None: all of `limit`)."""

    limit: int
    period: float = 60.0
    burst: int | None = None

    @property
    def capacity(self) -> int:
        """Units that may come at once after a long rest."""
        return self.limit if self.burst is None else self.burst

    @property
    def per_second(self) -> float:
        """Units that drain each second."""
        return self.limit / self.period


@dataclass(frozen=True, slots=True)
class Level:
    """How much of a rate is used, and at what time (seconds of the clock that the store uses) that was so."""

    used: float
    at: float


@dataclass(frozen=True, slots=True)
class Standing:
    """What a caller may be told about one rate. Seconds are counted from the moment of the answer."""

    allowed: bool
    remaining: int
    """Whole units left now; never negative."""
    reset_after: float
    """Seconds until nothing is used any more."""
    retry_after: float
    """Seconds until the same cost would pass; 0 when it passed."""


def drain(level: Level | None, rate: Rate, now: float) -> float:
    """What is still used at `now`. A `now` before `level.at` (the clock went back) drains nothing."""
    if level is None:
        return 0.0
    return max(0.0, level.used - max(0.0, now - level.at) * rate.per_second)


def admits(used: float, rate: Rate, cost: float) -> bool:
    """Whether `cost` fits on top of `used`.

    A cost above the whole capacity passes only when nothing is used, and leaves a debt: else a call whose estimate is
    larger than the limit could never be made. A cost of 0 asks whether there is any debt.
    """
    return used + min(cost, rate.capacity) <= rate.capacity + ROUNDING


def standing(used: float, rate: Rate, cost: float, *, allowed: bool) -> Standing:
    """What to tell about a rate of which `used` is used after `cost` was let in or refused."""
    excess = 0.0 if allowed else used + min(cost, rate.capacity) - rate.capacity
    return Standing(
        allowed=allowed,
        remaining=max(0, int(rate.capacity - used + ROUNDING)),
        reset_after=used / rate.per_second,
        retry_after=max(0.0, excess / rate.per_second),
    )


def take(level: Level | None, rate: Rate, cost: float, now: float) -> tuple[Level, Standing]:
    """Let `cost` in if it fits. The level changes only if it was let in."""
    used = drain(level, rate, now)
    allowed = admits(used, rate, cost)
    if allowed:
        used += cost
    return Level(used, now), standing(used, rate, cost, allowed=allowed)


def settle(level: Level | None, rate: Rate, difference: float, now: float) -> Level:
    """Correct an earlier `take` by `difference` = real cost minus reserved cost. Never refuses, never falls below 0."""
    return Level(max(0.0, drain(level, rate, now) + difference), now)
