"""What a measurement says: samples of ours beside samples of the floor, and the target that they are held against."""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class Compare(enum.StrEnum):
    """How ours stands against the floor."""

    RATIO = "ratio"
    """Ours over the floor's: less is better."""
    RATE = "rate"
    """Ours over the floor's: more is better."""
    ADDED = "added"
    """Ours minus the floor's, pair by pair: less is better."""
    NONE = "none"
    """A number that stands by itself; less is better if it has a target."""


def quantile(values: Sequence[float], q: float) -> float:
    """By linear interpolation; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a table. `unit` is that of the samples."""

    name: str
    unit: str
    ours: Sequence[float]
    floor: Sequence[float] = ()
    compare: Compare = Compare.NONE
    target: float | None = None
    note: str = ""

    @property
    def compared(self) -> float | None:
        """The number that the target is about."""
        if self.compare is Compare.NONE:
            return quantile(self.ours, 0.5) if self.target is not None else None
        if not self.ours or not self.floor:
            return None
        if self.compare is Compare.ADDED:
            return statistics.median(mine - its for mine, its in zip(self.ours, self.floor, strict=True))
        return quantile(self.ours, 0.5) / quantile(self.floor, 0.5)

    @property
    def met(self) -> bool | None:
        """None without a target."""
        value = self.compared
        if self.target is None or value is None:
            return None
        return value >= self.target if self.compare is Compare.RATE else value <= self.target

    def to_json(self) -> dict[str, Any]:
        def side(values: Sequence[float]) -> dict[str, Any] | None:
            if not values:
                return None
            return {
                "median": round(quantile(values, 0.5), 4),
                "p95": round(quantile(values, 0.95), 4),
                "best": round(min(values), 4),
                "samples": [round(value, 4) for value in values],
            }

        value = self.compared
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": side(self.ours),
            "floor": side(self.floor),
            "compare": self.compare.value,
            "compared": None if value is None else round(value, 4),
            "target": self.target,
            "met": self.met,
            "note": self.note,
        }


@dataclass(slots=True)
class Findings:
    """What a suite found: figures for the table, and whatever else is worth keeping in the JSON."""

    figures: list[Figure] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)


def ms(seconds: Sequence[float]) -> list[float]:
    """Milliseconds."""
    return [value * 1000 for value in seconds]
