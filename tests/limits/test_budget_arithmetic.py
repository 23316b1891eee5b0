"""Windows, caps and shares, without any store."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.limits import Budget, Period, Scope, budgets

MOMENTS = st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


@pytest.mark.parametrize(
    ("period", "now", "start", "end"),
    [
        (Period.DAY, "2026-03-01T00:00:00+00:00", "2026-03-01T00:00:00+00:00", "2026-03-02T00:00:00+00:00"),
        (Period.DAY, "2026-02-28T23:59:59.999999+00:00", "2026-02-28T00:00:00+00:00", "2026-03-01T00:00:00+00:00"),
        (Period.MONTH, "2026-12-31T23:59:59+00:00", "2026-12-01T00:00:00+00:00", "2027-01-01T00:00:00+00:00"),
        (Period.MONTH, "2028-02-29T12:00:00+00:00", "2028-02-01T00:00:00+00:00", "2028-03-01T00:00:00+00:00"),
        (Period.WEEK, "2026-11-22T23:00:00+00:00", "2026-11-16T00:00:00+00:00", "2026-11-23T00:00:00+00:00"),
        # Midnight in Paris is still the day before in UTC: windows are UTC's.
        (Period.DAY, "2026-03-02T00:30:00+01:00", "2026-03-01T00:00:00+00:00", "2026-03-02T00:00:00+00:00"),
        (Period.MONTH, "2026-03-01T00:30:00+01:00", "2026-02-01T00:00:00+00:00", "2026-03-01T00:00:00+00:00"),
    ],
)
def test_windows_begin_at_midnight_utc(period: Period, now: str, start: str, end: str) -> None:
    assert budgets.window(period, at(now)) == budgets.Window(at(start), at(end))


def test_a_total_budget_never_starts_again() -> None:
    assert budgets.window(Period.TOTAL, at("2026-03-01T00:00:00+00:00")).end is None


@given(MOMENTS, st.sampled_from([Period.DAY, Period.WEEK, Period.MONTH]), st.integers(-12, 14))
def test_every_moment_is_in_exactly_one_window(now: datetime, period: Period, zone: int) -> None:
    window = budgets.window(period, now.astimezone(timezone(timedelta(hours=zone))))
    assert window.end is not None
    assert window.start <= now < window.end
    following = budgets.window(period, window.end)
    assert following.start == window.end


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 10**12))
def test_a_call_is_let_in_only_within_the_cap_or_alone(spent: int, reserved: int, amount: int, cap: int) -> None:
    if budgets.admits(spent, reserved, amount, cap):
        assert spent + reserved + amount <= cap or (reserved == 0 and spent < cap)


def test_the_rest_of_a_budget_can_be_spent_by_one_call_at_a_time() -> None:
    assert budgets.admits(spent=90, reserved=0, amount=50, cap=100)
    assert not budgets.admits(spent=90, reserved=1, amount=50, cap=100)
    assert not budgets.admits(spent=100, reserved=0, amount=1, cap=100)


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 10_000), st.lists(st.integers(1, 200), max_size=6))
def test_however_spending_is_split_each_share_is_crossed_once(costs: list[int], cap: int, percents: list[int]) -> None:
    seen, spent = [], 0
    for cost in costs:
        seen += budgets.crossed(percents, cap, spent, spent + cost)
        spent += cost
    assert seen == [percent for percent in sorted(set(percents)) if percent * cap <= spent * 100]


def test_a_cap_of_zero_raises_no_alert() -> None:
    assert budgets.crossed((50, 100), 0, 0, 0) == ()


@pytest.mark.parametrize(
    "bad", [{"cap_micros": -1}, {"cap_micros": 10**16}, {"alert_percents": (0,)}, {"alert_percents": (1,) * 17}]
)
def test_a_budget_that_makes_no_sense_is_refused(bad: dict[str, object]) -> None:
    good: dict[str, object] = {
        "id": "b",
        "org": "o",
        "scope": Scope.KEY,
        "subject": "k",
        "period": Period.DAY,
        "cap_micros": 1,
    }
    with pytest.raises(InvalidRequest):
        Budget(**{**good, **bad})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("micros", "text"), [(50_000_000, "$50.00"), (12_500_000, "$12.50"), (1, "$0.000001"), (0, "$0.00")]
)
def test_money_is_written_in_dollars(micros: int, text: str) -> None:
    assert budgets.dollars(micros) == text
