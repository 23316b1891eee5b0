"""Injected time: nothing else in the server reads a clock or sleeps.

`Clock` is the port. `SystemClock` is the real one; `claude_wrapper.testing.ManualClock` is moved by hand in tests.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What the server needs to know about time."""

    def now(self) -> datetime:
        """The wall-clock time, aware, in UTC. May jump: never subtract two of these to measure a duration."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes backwards."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after at least `seconds` of monotonic time."""
        ...


class SystemClock:
    """The machine's clocks and the event loop's timer."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
