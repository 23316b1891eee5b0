"""When a failed attempt is repeated, and when an upstream is left in peace."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from claude_wrapper.broker import BrokerSettings, retry
from claude_wrapper.broker.breaker import Breaker, Permit, State, Verdict, verdict
from claude_wrapper.broker.retry import Failure, RetryBudget

SETTINGS = BrokerSettings()
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413])
def test_what_would_fail_again_is_not_repeated_whatever_the_upstream_says(status: int) -> None:
    assert retry.delay(Failure(status, should_retry=True), 1, 0, SETTINGS, random.Random(1)) is None


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 529])
def test_passing_trouble_is_repeated(status: int) -> None:
    assert retry.delay(Failure(status), 1, 0, SETTINGS, random.Random(1)) is not None
    assert retry.delay(Failure(status, should_retry=False), 1, 0, SETTINGS, random.Random(1)) is None


@given(st.integers(1, 10), st.floats(0, 100), st.none() | st.floats(0, 100), st.integers())
def test_a_retry_keeps_all_bounds(attempt: int, elapsed: float, after: float | None, seed: int) -> None:
    pause = retry.delay(Failure(529, after), attempt, elapsed, SETTINGS, random.Random(seed))
    if pause is None:
        assert attempt >= SETTINGS.retry_attempts or elapsed + max(8.0, after or 0) > SETTINGS.retry_seconds
    else:
        assert attempt < SETTINGS.retry_attempts
        assert elapsed + pause <= SETTINGS.retry_seconds
        assert pause >= (after or 0)
        assert pause >= SETTINGS.retry_base_seconds / 2


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:30 GMT"}, 30),
        ({"retry-after": "Thu, 01 Jan 2025 00:00:30 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
    ],
)
def test_retry_after_is_read_in_every_form(headers: dict[str, str], seconds: float | None) -> None:
    assert retry.retry_after(headers, NOW) == seconds


def test_a_retry_budget_is_a_reserve_and_a_share_of_the_calls() -> None:
    budget = RetryBudget(ratio=0.5, reserve=2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    budget.called()
    assert not budget.spend()
    budget.called()
    assert budget.spend()
    for _ in range(100):
        budget.called()
    assert [budget.spend() for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (200, "success"),
        (400, "success"),
        (401, "success"),
        (429, "none"),
        (499, "none"),
        (500, "failure"),
        (529, "failure"),
    ],
)
def test_only_the_upstream_s_own_trouble_counts_against_it(status: int, said: str) -> None:
    assert verdict(status) == said


def test_five_failures_in_a_row_open_and_one_probe_after_the_pause_closes() -> None:
    breaker = Breaker(5, 60)
    for _ in range(4):
        breaker.report(asked(breaker, 0), Verdict.FAILURE, 0)
    breaker.report(asked(breaker, 0), Verdict.SUCCESS, 0)
    for _ in range(5):
        assert breaker.state is State.CLOSED
        breaker.report(asked(breaker, 0), Verdict.FAILURE, 0)
    assert breaker.state is State.OPEN
    assert breaker.ask(59.9) is None
    assert breaker.retry_after(20) == 40
    probe = asked(breaker, 60)
    assert probe.probe
    assert breaker.ask(61) is None
    breaker.report(probe, Verdict.SUCCESS, 62)
    assert breaker.state is State.CLOSED
    assert not asked(breaker, 62).probe


def asked(breaker: Breaker, now: float) -> Permit:
    permit = breaker.ask(now)
    assert permit is not None
    return permit


class Breaking(RuleBasedStateMachine):
    """Calls begin and end in any order while time passes: never more than one probe, never stuck."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(3, 60)
        self.now = 0.0
        self.out: list[Permit] = []

    @rule(seconds=st.sampled_from([0.0, 1.0, 59.0, 60.0, 200.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def a_call_begins(self) -> None:
        before = self.breaker.state
        permit = self.breaker.ask(self.now)
        if permit is not None:
            assert permit.probe == (before is not State.CLOSED)
            self.out.append(permit)
        else:
            assert before is not State.CLOSED

    @precondition(lambda self: self.out)
    @rule(data=st.data(), said=st.sampled_from(list(Verdict)))
    def a_call_ends(self, data: st.DataObject, said: Verdict) -> None:
        permit = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        before = self.breaker.state
        self.breaker.report(permit, said, self.now)
        if before is State.OPEN:
            assert self.breaker.state is State.OPEN, "a straggler changes nothing"

    @invariant()
    def there_is_exactly_one_probe_while_half_open(self) -> None:
        probes = [permit for permit in self.out if permit.probe and permit.epoch == self.breaker._epoch]
        assert len(probes) == (self.breaker.state is State.HALF_OPEN)

    @invariant()
    def it_is_never_stuck(self) -> None:
        if self.breaker.state is State.OPEN:
            assert self.breaker.retry_after(self.now) <= 60


Breaking.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_a_breaker_lets_exactly_one_probe_through = Breaking.TestCase
