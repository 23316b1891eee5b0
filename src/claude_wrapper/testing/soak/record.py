"""What is written down during a soak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from claude_wrapper.testing.soak import plan
from claude_wrapper.testing.soak.outcomes import CanaryLook, Down, Followed, Loss, Outcome

_RECENT_SECONDS: Final = 20.0


@dataclass(slots=True)
class Record:
    """Everything that was seen. Times are monotonic seconds, in `samples` and `faults` seconds since the start."""

    began: float
    clock: Callable[[], float]
    outcomes: list[Outcome] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    """What was done to processes, stores, streams and the server."""
    outages: list[tuple[float, float, str]] = field(default_factory=list)
    """From when to when what was away: for the plots."""
    kills: list[float] = field(default_factory=list)
    """Moments of SIGKILL of a replica."""
    downs: list[Down] = field(default_factory=list)
    """When which replica was killed or ended, until it was back."""
    pauses: list[Down] = field(default_factory=list)
    """When which replica was stopped for longer than its lease."""
    losses: list[Loss] = field(default_factory=list)
    """Connections that broke."""
    canary: list[CanaryLook] = field(default_factory=list)
    """What the replicas said of the new version of the CLI, in order."""
    said: Counter[str] = field(default_factory=Counter)
    """How often each turn of a session was answered in its log, by nonce."""
    followed: list[Followed] = field(default_factory=list)
    files: int = 0
    files_lost: list[str] = field(default_factory=list)
    conversations: Counter[str] = field(default_factory=Counter)
    """By door."""
    skipped: list[str] = field(default_factory=list)
    """What could not be done here, and why."""
    callers: int = 0
    """Allowed at present."""

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.began

    def fault(self, kind: str) -> None:
        """Something was broken."""
        self.faults.append((self.now, kind))

    @property
    def fault_count(self) -> int:
        """Faults so far: those done to something, and those that a request brought with it."""
        return len(self.faults) + sum(one.kind in plan.FAULTY for one in self.outcomes)

    def recent_waits(self) -> list[float]:
        """What the untouched answers of the last moments waited."""
        since = self.clock() - _RECENT_SECONDS
        recent: list[float] = []
        for one in reversed(self.outcomes):
            if one.began + one.seconds < since:
                break
            if one.how == "answered" and one.kind in plan.CALM:
                recent.append(one.seconds)
        return recent
