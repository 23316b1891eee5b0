"""When a new version of the CLI gets conversations, and when it is taken back. Pure.

A small, stable share of the new conversations goes to the canary. It is taken back as soon as it is *credibly* worse:
when the lower end of the interval of its error rate lies above the main version's rate by more than a margin, or when
its median turn is slower by more than a factor. Few turns make wide intervals, so that two failures out of two do not
condemn it and ten out of ten do.
"""

from __future__ import annotations

import enum
import hashlib
import math
from dataclasses import dataclass
from typing import Final

MAIN: Final = ""
CANARY: Final = "canary"
"""The names by which launch profiles know the two."""
_SURE: Final = 1.96
"""Standard deviations: of a hundred good canaries two or three would be taken back for their errors."""


class State(enum.StrEnum):
    """What has become of the canary."""

    RUNNING = "running"
    ROLLED_BACK = "rolled_back"
    PROMOTED = "promoted"


@dataclass(frozen=True, slots=True)
class Rules:
    """How it is judged."""

    share: float = 0.05
    """Of the new conversations, 0 to 1."""
    min_turns: int = 20
    """Fewer turns of the canary say nothing."""
    window_seconds: float = 3600.0
    """Older turns do not count."""
    worse_errors: float = 0.02
    """How much higher its error rate may be than the main version's."""
    slower: float = 1.5
    """How many times as long its median turn may take."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the turns of one version in the window came to."""

    turns: int
    failures: int
    median_seconds: float | None
    """Of those that did not fail; None: there is none."""

    @property
    def rate(self) -> float:
        """Failures per turn."""
        return self.failures / self.turns if self.turns else 0.0


def chosen(conversation: str, share: float) -> bool:
    """Whether a conversation is among the canary's share: always the same for the same one, and kept when the share grows."""
    digest = hashlib.sha256(b"canary\0" + conversation.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def objection(main: Sample, canary: Sample, rules: Rules) -> str | None:
    """Why the canary is to be taken back; None: nothing speaks against it yet."""
    if canary.turns < rules.min_turns:
        return None
    least = least_rate(canary.failures, canary.turns)
    if least > main.rate + rules.worse_errors:
        return (
            f"{canary.failures} of {canary.turns} turns failed: at least {least:.1%}, "
            f"against {main.rate:.1%} of the main version ({main.failures} of {main.turns})"
        )
    enough = main.turns - main.failures >= rules.min_turns and canary.turns - canary.failures >= rules.min_turns
    if enough and canary.median_seconds is not None and main.median_seconds:
        times = canary.median_seconds / main.median_seconds
        if times > rules.slower:
            return (
                f"its median turn takes {canary.median_seconds:.2f} s, {times:.1f} times the main version's "
                f"{main.median_seconds:.2f} s"
            )
    return None


def least_rate(failures: int, turns: int) -> float:
    """The lower end of Wilson's interval: the rate is hardly lower than this."""
    if turns == 0:
        return 0.0
    square = _SURE * _SURE
    rate = failures / turns
    middle = rate + square / (2 * turns)
    spread = _SURE * math.sqrt(rate * (1 - rate) / turns + square / (4 * turns * turns))
    return max(0.0, (middle - spread) / (1 + square / turns))
