"""The arithmetic of rates, against the other form of the same algorithm in exact fractions."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.limits import gcra
from claude_wrapper.limits.gcra import Level, Rate

RATES = st.builds(
    Rate,
    limit=st.integers(1, 10**6),
    period=st.sampled_from([1.0, 60.0, 3600.0, 86400.0]),
    burst=st.none() | st.integers(1, 10**6),
)
STEPS = st.lists(
    st.tuples(st.sampled_from(["take", "settle"]), st.integers(0, 5000), st.integers(-5000, 5000)), max_size=40
)


@dataclass
class VirtualScheduling:
    """GCRA by theoretical arrival time (I.371, the other form), in exact numbers: slow and obviously right."""

    rate: Rate
    arrival: Fraction = field(default_factory=lambda: Fraction(0))

    @property
    def interval(self) -> Fraction:
        return Fraction(self.rate.period) / self.rate.limit

    def used(self, now: Fraction) -> Fraction:
        return max(Fraction(0), self.arrival - now) / self.interval

    def take(self, cost: int, now: Fraction) -> bool:
        if self.used(now) + min(cost, self.rate.capacity) > self.rate.capacity:
            return False
        self.arrival = max(self.arrival, now) + cost * self.interval
        return True

    def settle(self, difference: int, now: Fraction) -> None:
        self.arrival = max(now, max(self.arrival, now) + difference * self.interval)


@given(rate=RATES, steps=STEPS)
def test_reserving_and_settling_agrees_with_the_exact_model(rate: Rate, steps: list[tuple[str, int, int]]) -> None:
    model, level, now = VirtualScheduling(rate), None, Fraction(0)
    for what, wait, difference in steps:
        now += Fraction(wait, 10)
        if what == "take":
            cost = abs(difference)
            margin = model.used(now) + min(cost, rate.capacity) - rate.capacity
            expected = model.take(cost, now)
            level, standing = gcra.take(level, rate, cost, float(now))
            if abs(margin) > 1e-5:  # nearer than that, floating point may round either way
                assert standing.allowed == expected
            if standing.allowed != expected:
                return
        else:
            model.settle(difference, now)
            level = gcra.settle(level, rate, difference, float(now))
        assert level.used == pytest.approx(float(model.used(now)), abs=1e-3)


@given(rate=RATES, costs=st.lists(st.integers(1, 1000), min_size=1, max_size=50), waits=st.lists(st.integers(0, 50)))
def test_no_period_admits_more_than_the_burst_and_what_drained(rate: Rate, costs: list[int], waits: list[int]) -> None:
    level, now, admitted = None, 0.0, 0
    for asked, wait in zip(costs, waits, strict=False):
        now += wait
        cost = min(asked, rate.capacity)
        level, standing = gcra.take(level, rate, cost, now)
        admitted += cost if standing.allowed else 0
    assert admitted <= rate.capacity + now * rate.per_second + 1e-3


@given(rate=RATES, used=st.integers(0, 10**6), cost=st.integers(1, 10**6))
def test_after_retry_after_the_same_cost_passes(rate: Rate, used: int, cost: int) -> None:
    level, standing = gcra.take(Level(float(used), 0.0), rate, cost, 0.0)
    _, later = gcra.take(level, rate, cost, standing.retry_after)
    assert later.allowed or standing.allowed


@given(rate=RATES, cost=st.integers(1, 10**6))
def test_giving_a_reservation_back_leaves_nothing_used(rate: Rate, cost: int) -> None:
    level, standing = gcra.take(None, rate, cost, 5.0)
    assert standing.allowed
    assert gcra.settle(level, rate, -cost, 5.0).used == 0


def test_a_refusal_says_when_to_come_back_and_changes_nothing() -> None:
    rate = Rate(60, 60.0)
    level, _ = gcra.take(None, rate, 60, 0.0)
    level, standing = gcra.take(level, rate, 10, 4.0)
    assert standing == gcra.Standing(allowed=False, remaining=4, reset_after=56.0, retry_after=6.0)
    assert level.used == 56


def test_a_call_that_used_more_than_reserved_leaves_a_debt_that_time_pays() -> None:
    rate = Rate(60, 60.0)
    level, _ = gcra.take(None, rate, 10, 0.0)
    level = gcra.settle(level, rate, 110, 0.0)
    level, standing = gcra.take(level, rate, 1, 0.0)
    assert (standing.allowed, standing.remaining, standing.retry_after) == (False, 0, 61.0)
    assert gcra.take(level, rate, 1, 61.0)[1].allowed


def test_a_cost_above_the_whole_limit_passes_when_nothing_is_used() -> None:
    rate = Rate(100, 60.0)
    level, standing = gcra.take(None, rate, 250, 0.0)
    assert standing.allowed
    assert level.used == 250
    assert not gcra.take(level, rate, 250, 60.0)[1].allowed
    assert gcra.take(level, rate, 250, 150.0)[1].allowed


def test_a_clock_that_goes_back_an_hour_locks_nobody_out() -> None:
    rate = Rate(60, 60.0)
    level, _ = gcra.take(None, rate, 30, 3600.0)
    level, standing = gcra.take(level, rate, 30, 0.0)
    assert standing.allowed, "the jump must not count as use"
    level, standing = gcra.take(level, rate, 30, 30.0)
    assert standing.allowed, "and draining goes on from the new time"


def test_a_changed_limit_applies_at_once_with_what_is_used_kept() -> None:
    level, _ = gcra.take(None, Rate(100), 80, 0.0)
    assert not gcra.take(level, Rate(50), 1, 0.0)[1].allowed
    assert gcra.take(level, Rate(200), 120, 0.0)[1].allowed
