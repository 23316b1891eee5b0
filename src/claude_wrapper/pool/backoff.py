"""How long to leave a launch profile alone after its process failed to start."""

from __future__ import annotations

from dataclasses import dataclass

_FIRST = 0.1
_DEMAND_CAP = 1.0
"""A caller waits: it should learn of a broken CLI within its attempts, not after minutes."""
_REFILL_CAP = 60.0
"""Nobody waits: a broken CLI must not burn a core with starts."""


@dataclass(slots=True)
class Backoff:
    """Failures in a row of one profile; doubling delays, shorter where somebody waits."""

    failures: int = 0
    failed_at: float = 0.0

    def fail(self, now: float) -> None:
        self.failures += 1
        self.failed_at = now

    def succeed(self) -> None:
        self.failures = 0

    def ready_at(self, *, somebody_waits: bool) -> float:
        """The earliest time of the next start; minus infinity when the last one did not fail."""
        if not self.failures:
            return float("-inf")
        cap = _DEMAND_CAP if somebody_waits else _REFILL_CAP
        return self.failed_at + min(cap, _FIRST * 2.0 ** min(self.failures - 1, 16))
