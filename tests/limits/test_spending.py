"""Budgets at work: reserve, settle, alert; raced, interrupted and cut off."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits_world import Answered, Bound, World, budget, gone

from claude_wrapper.errors import BudgetExceeded, StorageUnavailable
from claude_wrapper.limits import LimitReached, LimitSettings, Period, Scope, Stores, Subjects, memory_stores
from claude_wrapper.limits.stores import Balance
from claude_wrapper.testing.clock import ManualClock
from claude_wrapper.wire.usage import Usage

pytestmark = pytest.mark.anyio

KEY = "cw:{org_1}:b:spl_1:20260101"
SUBJECTS = Subjects("org_1", "wrkspc_1", "apikey_1", "user_1", "sesn_1")


@pytest.fixture
def world(clock: ManualClock, stores: Stores) -> World:
    return World(clock, stores)


async def spend(world: World, estimate: int, actual: int, bound: Bound | None = None) -> bool:
    """One upstream call through the gate; whether it was let in."""
    try:
        reservation = await world.admission.gate.reserve(
            bound or Bound(), None, "claude", Usage(output_tokens=estimate)
        )
    except BudgetExceeded:
        return False
    await asyncio.sleep(0)
    await reservation.settle(Answered(Usage(output_tokens=actual)))
    return True


async def test_a_hundred_calls_at_once_never_overshoot_a_budget_that_estimates_right(world: World) -> None:
    world.rulebook.budget(budget(1000))
    let_in = await asyncio.gather(*(spend(world, 30, 30) for _ in range(100)))
    (balance,) = await world.stores.spend.balances([KEY])
    assert balance == Balance(30 * sum(let_in), 0)
    assert balance.spent <= 1000 + 30


@given(
    cap=st.integers(0, 500),
    calls=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=100),
)
@settings(max_examples=60)
def test_overshoot_is_at_most_what_calls_in_flight_cost_above_their_estimates(
    cap: int, calls: list[tuple[int, int]]
) -> None:
    async def run() -> None:
        clock = ManualClock()
        world = World(clock, memory_stores(clock))
        world.rulebook.budget(budget(cap))
        let_in = await asyncio.gather(*(spend(world, estimate, actual) for estimate, actual in calls))
        (balance,) = await world.stores.spend.balances([KEY])
        assert balance is not None
        assert balance.reserved == 0
        assert balance.spent == sum(actual for (_, actual), passed in zip(calls, let_in, strict=True) if passed)
        above = sum(
            max(0, actual - estimate) for (estimate, actual), passed in zip(calls, let_in, strict=True) if passed
        )
        assert balance.spent <= cap + above + 60, "one call may be let in for what is left of the budget"

    asyncio.run(run())


async def test_every_budget_of_a_call_is_charged_or_none(world: World) -> None:
    world.rulebook.budget(
        budget(1000),
        budget(50, id="spl_2", scope=Scope.SESSION, subject="sesn_1", period=Period.TOTAL),
        budget(1000, id="spl_3", scope=Scope.KEY, subject="apikey_1", period=Period.DAY),
        budget(1000, id="spl_4", scope=Scope.KEY, subject="apikey_2", period=Period.DAY),
    )
    assert await spend(world, 40, 45)
    first = await world.admission.gate.reserve(Bound(), None, "claude", Usage(output_tokens=1))
    with pytest.raises(BudgetExceeded) as caught:
        await world.admission.gate.reserve(Bound(), None, "claude", Usage(output_tokens=40))
    assert caught.value.details["budget_id"] == "spl_2"
    await first.cancel()
    keys = [KEY, "cw:{org_1}:b:spl_2:19700101", "cw:{org_1}:b:spl_3:20260101", "cw:{org_1}:b:spl_4:20260101"]
    assert await world.stores.spend.balances(keys) == (Balance(45, 0), Balance(45, 0), Balance(45, 0), None)


async def test_settling_and_cancelling_count_once_whatever_the_order(world: World) -> None:
    world.rulebook.budget(budget(1000))
    world.rulebook.limit(Scope.KEY, "apikey_1", "output_tokens=100")
    reservation = await world.admission.gate.reserve(Bound(), None, "claude", Usage(output_tokens=50))
    for _ in range(3):
        await reservation.settle(Answered(Usage(output_tokens=60)))
        await reservation.cancel()
    assert await world.stores.spend.balances([KEY]) == (Balance(60, 0),)
    await world.admission.gate.reserve(Bound(), None, "claude", Usage(output_tokens=40))
    with pytest.raises(LimitReached):
        await world.admission.gate.reserve(Bound(), None, "claude", Usage(output_tokens=1))


async def test_tokens_are_given_back_when_the_budget_refuses(world: World) -> None:
    world.rulebook.budget(budget(0))
    world.rulebook.limit(Scope.KEY, "apikey_1", "output_tokens=100")
    for _ in range(5):
        assert not await spend(world, 90, 0)


async def test_cached_prompts_do_not_count_against_input_tokens(world: World) -> None:
    world.rulebook.limit(Scope.KEY, "apikey_1", "input_tokens=100")
    used = Usage(input_tokens=10, cache_read_tokens=10_000, cache_write_5m_tokens=20, cache_write_1h_tokens=30)
    reservation = await world.admission.gate.reserve(Bound(), None, "claude", Usage(input_tokens=100))
    await reservation.settle(Answered(used))
    await world.admission.gate.reserve(Bound(), None, "claude", Usage(input_tokens=40))
    with pytest.raises(LimitReached):
        await world.admission.gate.reserve(Bound(), None, "claude", Usage(input_tokens=1))


async def test_a_new_month_begins_with_the_whole_budget_and_late_calls_count_for_the_old(world: World) -> None:
    world.rulebook.budget(budget(100))
    world.clock.jump((datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC) - world.clock.now()).total_seconds())
    late = await world.admission.gate.reserve(Bound(), None, "claude", Usage(output_tokens=90))
    world.clock.jump(2)
    assert await spend(world, 100, 100)
    await late.settle(Answered(Usage(output_tokens=95)))
    assert await world.stores.spend.balances([KEY, "cw:{org_1}:b:spl_1:20260201"]) == (Balance(95, 0), Balance(100, 0))


async def test_counters_begin_with_what_the_ledger_says(world: World) -> None:
    world.rulebook.budget(budget(100))
    world.ledger.amounts["org_1"] = 95
    assert await spend(world, 5, 5)
    assert not await spend(world, 1, 1)
    assert len(world.ledger.asked) == 1
    assert world.alerts.moves == [("spl_1", 0, 95), ("spl_1", 95, 100)]


async def test_counters_that_lost_data_are_raised_to_the_ledgers_closed_past(world: World) -> None:
    world.rulebook.budget(budget(1000))
    assert await spend(world, 10, 10)
    world.ledger.amounts["org_1"] = 700
    await world.clock.advance(7200)
    await world.admission.spending.reconcile()
    assert (await world.stores.spend.balances([KEY]))[0] == Balance(700, 0)
    assert world.ledger.asked[-1][2] == datetime(2026, 1, 1, 1, tzinfo=UTC), "whole hours, older than any open call"
    world.ledger.amounts["org_1"] = 5
    await world.admission.spending.reconcile()
    assert (await world.stores.spend.balances([KEY]))[0] == Balance(700, 0)


async def test_a_settlement_that_the_store_missed_is_made_up_later(clock: ManualClock, stores: Stores) -> None:
    away, switches = gone(stores)
    for switch in switches:
        switch.away = False
    world = World(clock, away)
    world.rulebook.budget(budget(1000))
    reservation = await world.admission.gate.reserve(Bound(), None, "claude", Usage(output_tokens=50))
    switches[2].away = True
    await reservation.settle(Answered(Usage(output_tokens=60)))
    assert await stores.spend.balances([KEY]) == (Balance(0, 50),)
    switches[2].away = False
    await clock.advance(2)
    await world.admission.spending.reconcile()
    assert await stores.spend.balances([KEY]) == (Balance(60, 0),)
    assert ("spl_1", 0, 60) in world.alerts.moves


async def test_a_reservation_whose_answer_was_lost_is_given_back(clock: ManualClock, stores: Stores) -> None:
    world = World(clock, stores)
    world.rulebook.budget(budget(1000))
    assert await spend(world, 10, 10)
    reserve = stores.spend.reserve

    async def lost_answer(*args: object) -> object:
        await reserve(*args)  # type: ignore[arg-type]
        raise asyncio.CancelledError

    stores.spend.reserve = lost_answer  # type: ignore[method-assign, assignment]
    with pytest.raises(asyncio.CancelledError):
        await world.admission.gate.reserve(Bound(), None, "claude", Usage(output_tokens=500))
    stores.spend.reserve = reserve  # type: ignore[method-assign]
    assert await stores.spend.balances([KEY]) == (Balance(10, 500),)
    assert await spend(world, 10, 10)
    assert await stores.spend.balances([KEY]) == (Balance(20, 0),)


async def test_a_store_that_forgets_at_once_does_not_loop_for_ever(clock: ManualClock, stores: Stores) -> None:
    world = World(clock, stores)
    world.rulebook.budget(budget(1000))

    async def forget(*args: object) -> None: ...

    stores.spend.open = forget  # type: ignore[method-assign, assignment]
    with pytest.raises(StorageUnavailable, match="memory full"):
        await spend(world, 10, 10)


async def test_clock_going_backwards_keeps_what_was_spent(world: World) -> None:
    world.rulebook.budget(budget(100, period=Period.DAY))
    world.clock.jump(86_400)
    assert await spend(world, 100, 100)
    world.clock.jump(-3_600)
    assert await spend(world, 100, 100), "the day before has its own budget"
    world.clock.jump(3_600)
    assert not await spend(world, 1, 1)


async def test_windows_that_are_long_over_are_no_longer_reconciled(clock: ManualClock, stores: Stores) -> None:
    world = World(clock, stores, LimitSettings(reconcile_seconds=60))
    world.rulebook.budget(budget(100, period=Period.DAY))
    assert await spend(world, 1, 1)
    keeper = asyncio.create_task(world.admission.spending.keep())
    async with asyncio.timeout(10):
        await clock.wait_for_sleepers(1)
    clock.jump(3 * 86_400)
    await clock.advance(61)
    async with asyncio.timeout(10):
        await clock.wait_for_sleepers(1)
    keeper.cancel()
    assert world.admission.spending._seen == {}
