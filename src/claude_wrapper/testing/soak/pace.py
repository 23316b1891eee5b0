"""How many callers a machine bears: fewer when answers are slow, more when they are fast. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LEAST: Final = 2
SLOW_SECONDS: Final = 4.0
FAST_SECONDS: Final = 1.5


@dataclass(slots=True)
class Pace:
    """`allowed` callers may hold conversations now, of `most` that there are."""

    most: int
    allowed: int

    def after(self, waits: Sequence[float]) -> int:
        """What the answers of the last moments waited decides how many callers there are next."""
        median = statistics.median(waits) if waits else SLOW_SECONDS + 1
        if median > SLOW_SECONDS:
            self.allowed = max(min(LEAST, self.most), self.allowed - 1)
        elif median < FAST_SECONDS:
            self.allowed = min(self.most, self.allowed + 1)
        return self.allowed
