"""What becomes of a work item, whatever workers and operators do with it: pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_wrapper.errors import Conflict, PreconditionFailed
from claude_wrapper.sessions.selfhosted import work as states
from claude_wrapper.sessions.selfhosted.work import (
    ACTIVE,
    NO_HEARTBEAT,
    QUEUED,
    STARTING,
    STOPPED,
    STOPPING,
    Work,
    acknowledged,
    beaten,
    claimable,
    handed_out,
    settled,
    stop_asked,
    ttl_of,
)
from claude_wrapper.tenancy.workerring import good, holds

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TTL = 60


def item() -> Work:
    fields: dict[str, Any] = dict.fromkeys(Work.__dataclass_fields__)
    fields |= {"id": "work_1", "environment_id": "env_1", "session_id": "sesn_1", "state": QUEUED, "metadata": {}}
    fields |= {"created_at": T0, "queued_at": T0, "ttl_seconds": 0, "generation": 0, "floor": 0, "attempts": 0}
    return Work(**fields | {"version": 1})


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


ALLOWED = {
    (QUEUED, STARTING), (STARTING, ACTIVE), (STARTING, STOPPING), (ACTIVE, STOPPING), (STOPPING, STOPPED),
    (QUEUED, STOPPED), (STARTING, STOPPED), (ACTIVE, STOPPED), (STARTING, QUEUED), (ACTIVE, QUEUED),
}  # fmt: skip
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["poll", "ack", "beat", "stop", "force", "wait"]),
        st.integers(0, 3),  # which worker
        st.sampled_from([0, 1, 6, 61]),  # seconds that pass before
    ),
    max_size=30,
)


@given(STEPS)
@settings(max_examples=300, deadline=None)
def test_at_most_one_worker_holds_an_item_and_it_only_goes_where_it_may(steps: list[tuple[str, int, int]]) -> None:
    work, now = item(), T0
    tokens: dict[int, int] = {}  # worker -> generation
    echoes: dict[int, str] = {}
    beats: list[str] = []
    for what, worker, passed in steps:
        now += timedelta(seconds=passed)
        before = work
        work = settled(work, now)
        assert work.state == before.state or (before.state, work.state) in ALLOWED
        present = work
        try:
            if what == "poll" and claimable(work, now, states.RECLAIM_MS):
                work = handed_out(work, now)
                tokens[worker], echoes[worker] = work.generation, NO_HEARTBEAT
            elif what == "ack":
                work = acknowledged(work, now, TTL)
            elif what == "beat" and worker in tokens:
                beat = beaten(work, now, TTL, expected=echoes[worker], generation=tokens[worker])
                work = beat.work
                if beat.extended:
                    echoes[worker] = str(work.last_heartbeat)
                    beats.append(echoes[worker])
                    assert good(work, tokens[worker], now)
            elif what in {"stop", "force"}:
                work = stop_asked(work, now, force=what == "force", generation=tokens.get(worker))
        except (Conflict, PreconditionFailed):
            assert work == present, "a refusal changes nothing"
        assert present.state == work.state or (present.state, work.state) in ALLOWED
        assert work.state == STOPPED or present.state != STOPPED, "stopped is for good"
        if work.holder is not None:
            assert [one for one in range(work.generation + 1) if holds(work, one)] == [work.holder]
        if work.state in {QUEUED, STOPPED}:
            assert not any(good(work, one, now) for one in range(work.generation + 1))
    assert beats == sorted(set(beats)), "no heartbeat is like another, and each is later"


def test_a_worker_that_lost_its_lease_is_told_and_cannot_harm_the_next() -> None:
    first = acknowledged(handed_out(item(), T0), T0, TTL)
    beat = beaten(first, at(1), TTL, expected=NO_HEARTBEAT, generation=1)
    late = settled(beat.work, at(62))
    assert late.state == QUEUED
    with pytest.raises(PreconditionFailed) as refused:
        beaten(late, at(62), TTL, expected=beat.work.last_heartbeat, generation=1)
    assert refused.value.details == {
        "error_code": "heartbeat_precondition_failed",
        "current_state": {"state": QUEUED, "ttl_seconds": TTL, "last_heartbeat": None, "lease_extended": False},
    }
    second = acknowledged(handed_out(late, at(63)), at(63), TTL)
    with pytest.raises(PreconditionFailed):
        beaten(second, at(64), TTL, expected=NO_HEARTBEAT, generation=1)
    with pytest.raises(Conflict):
        stop_asked(second, at(64), force=True, generation=1)
    assert beaten(second, at(64), TTL, expected=NO_HEARTBEAT, generation=2).work.state == ACTIVE


def test_the_echo_is_compared_byte_for_byte_but_not_while_it_stops() -> None:
    active = beaten(acknowledged(handed_out(item(), T0), T0, TTL), T0, TTL, expected=NO_HEARTBEAT, generation=1).work
    echo = str(active.last_heartbeat)
    for wrong in (NO_HEARTBEAT, echo.replace("Z", "+00:00"), echo + " ", ""):
        with pytest.raises(PreconditionFailed):
            beaten(active, at(1), TTL, expected=wrong, generation=1)
    same_instant = beaten(active, T0, TTL, expected=echo, generation=1).work
    assert str(same_instant.last_heartbeat) > echo
    stopping = stop_asked(active, at(2), force=False, generation=None)
    seen = beaten(stopping, at(3), TTL, expected="anything", generation=1)
    assert (seen.work.state, seen.extended) == (STOPPING, True)
    stopped = stop_asked(seen.work, at(4), force=True, generation=1)
    last = beaten(stopped, at(5), TTL, expected="anything", generation=1)
    assert (last.work, last.extended) == (stopped, False)
    with pytest.raises(Conflict):
        stop_asked(stopped, at(6), force=False, generation=None)


def test_what_nobody_acknowledges_is_handed_out_again() -> None:
    given_out = handed_out(item(), T0)
    assert not claimable(given_out, at(4.9), 5000)
    assert claimable(given_out, at(5), 5000)
    with pytest.raises(Conflict):
        acknowledged(item(), T0, TTL)
    with pytest.raises(Conflict):
        beaten(given_out, T0, TTL, expected=NO_HEARTBEAT, generation=1)


def test_a_worker_may_ask_for_a_time_within_bounds() -> None:
    assert [ttl_of(one, 120) for one in (None, 0, 10, 300, 10**6)] == [120, 10, 10, 300, 600]
