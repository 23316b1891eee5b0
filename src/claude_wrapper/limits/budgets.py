"""Budgets as arithmetic: whose, per what window, how much, and what happens at the cap. No I/O.

Money is whole micro-dollars everywhere (1 dollar = 1 000 000). Windows begin at midnight UTC of the day, Monday or the
first of the month; `total` never ends.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.limits.values import Scope

DOLLAR: Final = 1_000_000
MOST: Final = 10**15
"""A billion dollars; far below what a 64-bit integer and a Lua number hold exactly."""
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Period(enum.StrEnum):
    """How often a budget starts again."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    TOTAL = "total"


class Action(enum.StrEnum):
    """What happens at the cap."""

    WARN = "warn"
    """Calls go on; answers say that the cap is passed."""
    BLOCK = "block"
    """Calls are refused; a running agent stops."""
    PAUSE = "pause"
    """As block, and sessions keep their state until the cap is raised."""


@dataclass(frozen=True, slots=True)
class Window:
    """From `start` until before `end` (None: never)."""

    start: datetime
    end: datetime | None

    def holds(self, now: datetime) -> bool:
        return self.start <= now and (self.end is None or now < self.end)

    def seconds_left(self, now: datetime) -> float | None:
        return None if self.end is None else max(0.0, (self.end - now).total_seconds())


@dataclass(frozen=True, slots=True)
class Budget:
    """A cap on what one subject may spend per window. `version` counts its changes."""

    id: str
    org: str
    scope: Scope
    subject: str
    period: Period
    cap_micros: int
    action: Action = Action.BLOCK
    alert_percents: tuple[int, ...] = (80, 100)
    version: int = 1
    created_at: datetime | None = field(default=None, compare=False)
    updated_at: datetime | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.cap_micros <= MOST:
            raise InvalidRequest(f"expected whole micro-dollars from 0 to {MOST}", field="cap_micros")
        if not all(1 <= percent <= 1000 for percent in self.alert_percents) or len(self.alert_percents) > 16:
            raise InvalidRequest("expected at most 16 whole percents from 1 to 1000", field="alert_percents")

    @property
    def enforced(self) -> bool:
        return self.action is not Action.WARN


@dataclass(frozen=True, slots=True)
class Alert:
    """A share of a budget was reached."""

    budget: Budget
    window: Window
    percent: int
    spent_micros: int


def window(period: Period, now: datetime) -> Window:
    """The window of `period` that holds `now`, in UTC whatever the zone of `now`."""
    now = now.astimezone(UTC)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    match period:
        case Period.DAY:
            return Window(midnight, midnight + timedelta(days=1))
        case Period.WEEK:
            monday = midnight - timedelta(days=midnight.weekday())
            return Window(monday, monday + timedelta(days=7))
        case Period.MONTH:
            first = midnight.replace(day=1)
            return Window(first, (first + timedelta(days=32)).replace(day=1))
        case Period.TOTAL:
            return Window(EPOCH, None)


def admits(spent: int, reserved: int, amount: int, cap: int) -> bool:
    """Whether a call that may cost `amount` fits.

    It fits within the cap, or it is the only call in flight and something is left. So the cap can be passed by one call
    at most, and only by what that call costs above its estimate or above what was left.
    """
    return spent + reserved + amount <= cap or (reserved == 0 and spent < cap)


def crossed(percents: Sequence[int], cap: int, before: int, after: int) -> tuple[int, ...]:
    """Which shares of `cap` lie in (before, after]. Shares are compared in whole numbers: no rounding."""
    return tuple(percent for percent in sorted(set(percents)) if before * 100 < percent * cap <= after * 100)


def dollars(micros: int) -> str:
    """`$12.50`; more digits only where they matter."""
    text = f"{micros / DOLLAR:.6f}".rstrip("0")
    whole, _, cents = text.partition(".")
    return f"${whole}.{cents.ljust(2, '0')}"
