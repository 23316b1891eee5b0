"""Fair order between organisations, first in first out within one, and a bound on being passed over."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from claude_wrapper.pool.fairqueue import FairQueue

NOBODY: set[str] = set()


def queue_of(*items: tuple[str, str], weights: dict[str, int] | None = None) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for org, key in items:
        queue.push(org, key, key, weight=(weights or {}).get(org, 1))
    return queue


def test_the_organisation_that_holds_least_goes_first_whoever_came_first() -> None:
    queue = queue_of(("hog", "h1"), ("hog", "h2"), ("small", "s1"))
    held = {"hog": 5, "small": 0}
    assert list(queue.walk(lambda org: held[org], NOBODY)) == ["s1", "h1", "h2"]


def test_within_an_organisation_order_is_kept() -> None:
    queue = queue_of(*(("a", f"a{n}") for n in range(5)))
    assert list(queue.walk(lambda _: 0, NOBODY)) == [f"a{n}" for n in range(5)]


def test_what_is_given_during_the_walk_counts_at_once() -> None:
    queue = queue_of(("a", "a1"), ("a", "a2"), ("b", "b1"), ("b", "b2"))
    held: Counter[str] = Counter()
    order = []
    for item in queue.walk(lambda org: held[org], NOBODY):
        order.append(item)
        held[item[0]] += 1
    assert order == ["a1", "b1", "a2", "b2"]


def test_weight_divides_what_an_organisation_holds() -> None:
    queue = queue_of(*((org, f"{org}{n}") for org in "ab" for n in range(6)), weights={"a": 3, "b": 1})
    held: Counter[str] = Counter()
    first = []
    for item in queue.walk(lambda org: held[org], NOBODY):
        first.append(item[0])
        held[item[0]] += 1
        if len(first) == 8:
            break
    assert Counter(first) == {"a": 6, "b": 2}


def test_a_lane_that_was_passed_over_too_often_goes_before_all_others() -> None:
    queue = queue_of(("busy", "x"))
    for _ in range(queue.patience + 2):
        queue.note_grant("other")
    queue.push("fresh", "y", "y")
    assert queue.starving()
    assert list(queue.walk({"busy": 9, "fresh": 0}.__getitem__, NOBODY)) == ["x", "y"]
    assert list(queue.walk({"busy": 9, "fresh": 0}.__getitem__, {"busy"})) == ["y", "x"]
    assert list(queue.walk({"busy": 9, "fresh": 0}.__getitem__, NOBODY, impatient_only=True)) == ["x"]


def test_waiting_for_its_own_limits_costs_a_lane_its_impatience() -> None:
    queue = queue_of(("busy", "x"))
    for _ in range(queue.patience):
        queue.note_grant("other")
    queue.note_blocked("busy")
    assert not queue.starving()


def test_an_item_that_was_served_in_vain_returns_to_the_front() -> None:
    queue = queue_of(("a", "a1"), ("a", "a2"))
    queue.remove("a1")
    queue.push("a", "a1", "a1", front=True)
    assert list(queue.walk(lambda _: 0, NOBODY)) == ["a1", "a2"]
    queue.remove("unknown")
    queue.remove("a1")
    queue.remove("a2")
    assert len(queue) == 0
    assert not queue.lanes
    queue.note_blocked("a")


@settings(max_examples=200, deadline=None)
@given(
    waiting=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 6), min_size=1),
    held=st.fixed_dictionaries({org: st.integers(0, 20) for org in "abcdefgh"}),
)
def test_no_lane_is_passed_over_more_often_than_the_bound_says(waiting: dict[str, int], held: dict[str, int]) -> None:
    """The worst case: loads never change, whatever is granted, and every lane is refilled at once."""
    queue = queue_of(*((org, f"{org}{n}") for org, count in waiting.items() for n in range(count)))
    serial = 100
    passed: Counter[str] = Counter()
    for _ in range(300):
        item = next(queue.walk(held.__getitem__, NOBODY))
        org = item[0]
        queue.push(org, f"{org}{serial}", f"{org}{serial}")
        serial += 1
        queue.remove(item)
        queue.note_grant(org)
        for other in waiting:
            passed[other] = 0 if other == org else passed[other] + 1
            assert passed[other] <= queue.patience + len(waiting)
