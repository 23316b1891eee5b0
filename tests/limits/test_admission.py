"""May this request begin? Through the one door, on memory and on Redis."""

from __future__ import annotations

import asyncio

import pytest
from limits_world import Answered, Bound, Who, World, budget, gone

from claude_wrapper.errors import BudgetExceeded, RateLimited, StorageUnavailable
from claude_wrapper.limits import (
    Action,
    BudgetReached,
    Facts,
    LimitReached,
    Limits,
    LimitSettings,
    Resource,
    Scope,
    Stores,
    Subjects,
    WithoutStore,
)
from claude_wrapper.testing.clock import ManualClock
from claude_wrapper.wire.usage import Usage

pytestmark = pytest.mark.anyio


@pytest.fixture
def world(clock: ManualClock, stores: Stores) -> World:
    return World(clock, stores)


async def test_without_any_limit_everything_passes_and_no_counter_is_asked(clock: ManualClock, stores: Stores) -> None:
    away, switches = gone(stores)
    world = World(clock, away)
    async with world.admission.admit(Who()) as admitted:
        assert admitted.headers == {}
    assert [switch.asked for switch in switches] == [0, 0, 0]
    assert world.counts.admitted == 1


async def test_a_default_of_a_hundred_requests_an_hour_holds_for_each_user(clock: ManualClock, stores: Stores) -> None:
    world = World(clock, stores, LimitSettings(default_user=Limits.parse("requests=100/hour")))
    for _ in range(100):
        async with world.admission.admit(Who()):
            pass
    with pytest.raises(LimitReached) as caught:
        await world.admission.admit(Who()).__aenter__()
    error = caught.value
    assert "this user's limit of 100/hour requests" in error.message
    assert error.details == {"limit": "requests", "scope": "user", "value": 100, "period_seconds": 3600.0}
    assert error.retry_after == pytest.approx(36.0)
    assert error.headers["retry-after"] == "36"
    assert error.headers["anthropic-ratelimit-requests-remaining"] == "0"
    async with world.admission.admit(Who(user_id="user_2")):
        pass
    await clock.advance(36)
    async with world.admission.admit(Who()):
        pass


async def test_headers_tell_the_tightest_limit_of_each_kind(world: World) -> None:
    world.rulebook.limit(Scope.KEY, "apikey_1", "requests=50,input_tokens=1000")
    world.rulebook.limit(Scope.ORGANIZATION, "org_1", "requests=2,output_tokens=100")
    async with world.admission.admit(Who()) as admitted:
        headers = admitted.headers
    assert headers == {
        "anthropic-ratelimit-requests-limit": "2",
        "anthropic-ratelimit-requests-remaining": "1",
        "anthropic-ratelimit-requests-reset": "2026-01-01T00:00:30Z",
        "anthropic-ratelimit-input-tokens-limit": "1000",
        "anthropic-ratelimit-input-tokens-remaining": "1000",
        "anthropic-ratelimit-input-tokens-reset": "2026-01-01T00:00:00Z",
        "anthropic-ratelimit-tokens-limit": "1000",
        "anthropic-ratelimit-tokens-remaining": "1000",
        "anthropic-ratelimit-tokens-reset": "2026-01-01T00:00:00Z",
        "anthropic-ratelimit-output-tokens-limit": "100",
        "anthropic-ratelimit-output-tokens-remaining": "100",
        "anthropic-ratelimit-output-tokens-reset": "2026-01-01T00:00:00Z",
    }


async def test_the_narrowest_limit_that_refuses_is_named_and_the_others_are_not_charged(world: World) -> None:
    world.rulebook.limit(Scope.KEY, "apikey_1", "requests=1")
    world.rulebook.limit(Scope.ORGANIZATION, "org_1", "requests=2")
    async with world.admission.admit(Who()):
        pass
    for _ in range(5):
        with pytest.raises(RateLimited) as caught:
            await world.admission.admit(Who()).__aenter__()
        assert caught.value.details["scope"] == "key"
    async with world.admission.admit(Who(key_id="apikey_2")):
        pass


async def test_concurrent_turns_are_held_until_the_block_ends(world: World) -> None:
    world.rulebook.limit(Scope.USER, "user_1", "concurrent_turns=2,requests=3")
    async with world.admission.admit(Who()), world.admission.admit(Who()):
        for _ in range(5):
            with pytest.raises(LimitReached) as caught:
                await world.admission.admit(Who()).__aenter__()
            assert caught.value.details == {"limit": "concurrent_turns", "scope": "user", "value": 2}
            assert caught.value.headers["retry-after"] == "1"
        async with world.admission.admit(Who(), Facts(turn=False)):
            pass
    assert world.admission.concurrency.held == 0
    await world.clock.advance(60)
    async with world.admission.admit(Who()):
        pass


async def test_a_request_that_fails_gives_its_place_back(world: World) -> None:
    world.rulebook.limit(Scope.USER, "user_1", "concurrent_turns=1")
    for _ in range(3):
        with pytest.raises(ValueError, match="boom"):
            async with world.admission.admit(Who()):
                raise ValueError("boom")


async def test_a_request_that_a_budget_refuses_costs_neither_a_request_nor_a_place(world: World) -> None:
    world.rulebook.limit(Scope.USER, "user_1", "requests=5,concurrent_turns=1")
    world.rulebook.budget(budget(100))
    world.ledger.amounts["org_1"] = 100
    for _ in range(10):
        with pytest.raises(BudgetReached) as caught:
            await world.admission.admit(Who()).__aenter__()
    assert "this organization's budget of $0.0001 per month is spent" in caught.value.message
    assert caught.value.details["action"] == "block"
    assert caught.value.details["resets_at"] == "2026-02-01T00:00:00+00:00"
    assert caught.value.headers == {"x-should-retry": "false"}
    world.rulebook.budget(budget(200))
    async with world.admission.admit(Who()) as admitted:
        assert admitted.headers["anthropic-ratelimit-requests-remaining"] == "4"


@pytest.mark.parametrize("action", [Action.BLOCK, Action.PAUSE])
async def test_a_refusal_says_whether_the_session_keeps_its_state(world: World, action: Action) -> None:
    world.rulebook.budget(budget(0, action=action))
    with pytest.raises(BudgetExceeded) as caught:
        await world.admission.admit(Who()).__aenter__()
    assert caught.value.details["action"] == action.value


async def test_a_budget_that_warns_lets_through_and_says_so(world: World) -> None:
    world.rulebook.budget(budget(100, action=Action.WARN))
    world.ledger.amounts["org_1"] = 150
    async with world.admission.admit(Who()) as admitted:
        assert admitted.warnings[0].spent_micros == 150
        assert admitted.headers == {"x-budget-warning": "organization budget per month passed"}


async def test_tokens_in_debt_refuse_the_next_request_before_it_claims_a_process(world: World) -> None:
    world.rulebook.limit(Scope.WORKSPACE, "wrkspc_1", "output_tokens=600")
    reservation = await world.admission.gate.reserve(Bound(), None, "claude", Usage(output_tokens=10))
    await reservation.settle(Answered(Usage(output_tokens=900)))
    with pytest.raises(LimitReached) as caught:
        await world.admission.admit(Who()).__aenter__()
    assert caught.value.details["limit"] == "output_tokens"
    assert caught.value.retry_after == pytest.approx(30.1)
    await world.clock.advance(31)
    async with world.admission.admit(Who()):
        pass


async def test_a_long_wait_tells_clients_not_to_retry_by_themselves(world: World) -> None:
    world.rulebook.limit(Scope.USER, "user_1", "requests=1/day")
    async with world.admission.admit(Who()):
        pass
    with pytest.raises(LimitReached) as caught:
        await world.admission.admit(Who()).__aenter__()
    assert caught.value.headers["x-should-retry"] == "false"


# The shared counters are gone -----------------------------------------------------------------------------------------


async def test_without_the_counters_rates_and_places_are_open_and_budgets_closed(
    clock: ManualClock, stores: Stores
) -> None:
    away, switches = gone(stores)
    world = World(clock, away)
    world.rulebook.limit(Scope.USER, "user_1", "requests=1,concurrent_turns=1")
    for _ in range(3):
        async with world.admission.admit(Who()):
            pass
    assert world.counts.let_through == {"rates": 3, "concurrency": 3}
    world.rulebook.budget(budget(100))
    with pytest.raises(StorageUnavailable) as caught:
        await world.admission.admit(Who()).__aenter__()
    assert caught.value.retry_after == 1.0
    assert world.counts.turned_away == {"budgets": 1}
    asked = sum(switch.asked for switch in switches)
    for _ in range(20):
        with pytest.raises(StorageUnavailable):
            await world.admission.admit(Who()).__aenter__()
    assert sum(switch.asked for switch in switches) == asked, "no request waits for a store that has just failed"
    for switch in switches:
        switch.away = False
    await clock.advance(1.5)
    async with world.admission.admit(Who()):
        pass
    with pytest.raises(LimitReached):
        await world.admission.admit(Who()).__aenter__()


async def test_each_policy_can_be_turned_round(clock: ManualClock, stores: Stores) -> None:
    away, _ = gone(stores)
    turned = LimitSettings(rates_without_store=WithoutStore.CLOSED, budgets_without_store=WithoutStore.OPEN)
    world = World(clock, away, turned)
    world.rulebook.budget(budget(100))
    async with world.admission.admit(Who()):
        pass
    assert world.counts.let_through == {"budgets": 1}
    world.rulebook.limit(Scope.USER, "user_1", "requests=1")
    with pytest.raises(StorageUnavailable):
        await world.admission.admit(Who()).__aenter__()
    assert world.counts.turned_away == {"rates": 1}


async def test_a_ledger_that_cannot_be_read_counts_as_the_counters_being_away(world: World) -> None:
    world.rulebook.budget(budget(100))
    world.ledger.away = True
    with pytest.raises(StorageUnavailable):
        await world.admission.admit(Who()).__aenter__()
    assert world.counts.turned_away == {"budgets": 1}
    world.ledger.away = False
    async with world.admission.admit(Who()):
        pass
    world.ledger.away = True  # the counter is known by now: the database is not needed any more
    async with world.admission.admit(Who()):
        pass


# Places outlive their taker only as long as their lease -----------------------------------------------------------------


async def test_places_are_renewed_while_held_and_expire_with_their_replica(clock: ManualClock, stores: Stores) -> None:
    alive, dead = World(clock, stores), World(clock, stores)
    for world in (alive, dead):
        world.ids = alive.ids
        world.admission.concurrency._ids = alive.ids
        world.rulebook.limit(Scope.ORGANIZATION, "org_1", "sessions=2")
    subjects = Subjects(org="org_1")
    mine = await alive.admission.concurrency.acquire(alive.rulebook.current, subjects, Resource.SESSIONS)
    await dead.admission.concurrency.acquire(dead.rulebook.current, subjects, Resource.SESSIONS)
    keeper = asyncio.create_task(alive.admission.concurrency.keep())
    for _ in range(5):
        async with asyncio.timeout(10):
            await clock.wait_for_sleepers(1)
        await clock.advance(21)
        await asyncio.sleep(0.01)  # Redis answers in real time
    keeper.cancel()
    await alive.admission.concurrency.acquire(alive.rulebook.current, subjects, Resource.SESSIONS)
    with pytest.raises(LimitReached):
        await alive.admission.concurrency.acquire(alive.rulebook.current, subjects, Resource.SESSIONS)
    await alive.admission.concurrency.release(mine)
    await alive.admission.concurrency.release(mine)
    await alive.admission.concurrency.acquire(alive.rulebook.current, subjects, Resource.SESSIONS)


async def test_a_place_given_back_during_a_renewal_stays_given_back(clock: ManualClock, stores: Stores) -> None:
    world = World(clock, stores)
    world.rulebook.limit(Scope.ORGANIZATION, "org_1", "processes=1")
    concurrency = world.admission.concurrency
    place = await concurrency.acquire(world.rulebook.current, Subjects(org="org_1"), Resource.PROCESSES)
    renew = stores.leases.renew

    async def slow_renew(*args: object) -> None:
        await concurrency.release(place)
        await renew(*args)  # type: ignore[arg-type]

    stores.leases.renew = slow_renew  # type: ignore[method-assign]
    await concurrency.renew()
    assert await stores.leases.held(place.keys[0]) == 0
