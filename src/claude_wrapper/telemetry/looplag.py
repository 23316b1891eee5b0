"""How late the event loop is: the first number to look at when everything is slow at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from claude_wrapper.clock import Clock


class LoopLag:
    """Sleeps `interval` seconds again and again, and measures by how much each sleep was too long.

    `run` is for the owner of the process's tasks; it ends only by cancellation. `observe` gets each lag in seconds.
    """

    def __init__(
        self, clock: Clock, observe: Callable[[float], None], *, interval: float = 0.5, window: float = 60.0
    ) -> None:
        self._clock = clock
        self._observe = observe
        self._interval = interval
        self._recent: deque[float] = deque([0.0], maxlen=max(1, round(window / interval)))

    @property
    def last(self) -> float:
        """The last lag, in seconds."""
        return self._recent[-1]

    @property
    def worst(self) -> float:
        """The longest lag of the window, in seconds."""
        return max(self._recent)

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            start = self._clock.monotonic()
            await self._clock.sleep(self._interval)
            lag = max(0.0, self._clock.monotonic() - start - self._interval)
            self._recent.append(lag)
            self._observe(lag)
