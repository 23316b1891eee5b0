"""Who is served next: fair between organisations, in order within one.

Each organisation has a lane. Lanes are walked by *load* (what the organisation holds divided by its weight), the least
loaded first; ties go to the lane that was served longest ago. An organisation that asks for much therefore waits
behind one that holds little, whoever came first.

Load alone could starve an organisation that holds a few long turns behind others that come and go. So a lane that was
passed over `patience` times goes before all others, longest wait first: the number of grants that others get while a
lane waits is at most `patience` plus the number of lanes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_BASE_PATIENCE = 8


@dataclass(slots=True)
class Lane(Generic[T]):
    """The waiting claims of one organisation, first in, first out."""

    org: str
    weight: int
    since: int
    """Count of grants when this lane was last served, or began to wait, or was blocked by its own limits."""
    items: dict[str, T] = field(default_factory=dict)


class FairQueue(Generic[T]):
    """Lanes by organisation. Decides an order; holds no process and knows no time."""

    __slots__ = ("_lane_of", "grants", "lanes")

    def __init__(self) -> None:
        self.lanes: dict[str, Lane[T]] = {}
        self.grants = 0
        """Grants so far, to anybody."""
        self._lane_of: dict[str, Lane[T]] = {}

    def __len__(self) -> int:
        return len(self._lane_of)

    def __contains__(self, key: str) -> bool:
        return key in self._lane_of

    @property
    def patience(self) -> int:
        """Grants to others after which a lane goes first. More lanes need more patience, else all are impatient."""
        return _BASE_PATIENCE + 2 * len(self.lanes)

    def push(self, org: str, key: str, item: T, *, weight: int = 1, front: bool = False) -> None:
        """Let `item` wait, at the end of its lane or (it had been served in vain) at the front."""
        lane = self.lanes.get(org)
        if lane is None:
            lane = self.lanes[org] = Lane(org, weight, self.grants)
        lane.weight = max(1, weight)
        if front:
            lane.items = {key: item, **lane.items}
        else:
            lane.items[key] = item
        self._lane_of[key] = lane

    def remove(self, key: str) -> None:
        """Take an item out, wherever it stands; nothing happens if it does not wait."""
        lane = self._lane_of.pop(key, None)
        if lane is None:
            return
        del lane.items[key]
        if not lane.items:
            del self.lanes[lane.org]

    def note_grant(self, org: str) -> None:
        """A grant to `org` that others may have waited for."""
        self.grants += 1
        lane = self.lanes.get(org)
        if lane is not None:
            lane.since = self.grants

    def note_blocked(self, org: str) -> None:
        """The lane waits for its own organisation's limits, not for others: its patience starts anew."""
        lane = self.lanes.get(org)
        if lane is not None:
            lane.since = self.grants

    def impatient(self, lane: Lane[T]) -> bool:
        return self.grants - lane.since >= self.patience

    def starving(self) -> bool:
        """Whether any lane was passed over too often."""
        return any(self.impatient(lane) for lane in self.lanes.values())

    def walk(
        self, load: Callable[[str], float], served: Container[str], *, impatient_only: bool = False
    ) -> Iterator[T]:
        """Items in fair order. `load(org)` and `served` are read again after each item, so what the caller does counts.

        `served` holds the organisations that already got something in this round: their impatience is spent.
        The caller may remove items while it walks.
        """
        heap: list[tuple[int, float, int, str]] = []
        rest: dict[str, Iterator[T]] = {}

        def enter(lane: Lane[T], since: int) -> None:
            if lane.org not in served and self.impatient(lane):
                heapq.heappush(heap, (0, float(since), since, lane.org))
            elif not impatient_only:
                heapq.heappush(heap, (1, load(lane.org) / lane.weight, since, lane.org))

        for lane in list(self.lanes.values()):
            rest[lane.org] = iter(list(lane.items.values()))
            enter(lane, lane.since)
        while heap:
            _, _, _, org = heapq.heappop(heap)
            item = next(rest[org], None)
            if item is None:
                continue
            yield item
            again = self.lanes.get(org)
            if again is not None:
                enter(again, again.since)
