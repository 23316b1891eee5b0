"""What hot counters promise, in memory and in Redis alike."""

from __future__ import annotations

import asyncio
import random

import pytest

from claude_wrapper.limits import Rate, Stores, memory_stores, open_client, redis_stores
from claude_wrapper.limits.stores import Balance, Cap, Charge, Hold, StoreGone
from claude_wrapper.testing.clock import ManualClock
from databases import RedisServer

pytestmark = pytest.mark.anyio

RATE = Rate(10, 60.0)


# Rates ----------------------------------------------------------------------------------------------------------------


async def test_of_two_hundred_requests_at_once_exactly_the_limit_passes(stores: Stores) -> None:
    taken = await asyncio.gather(*(stores.rates.take([Charge("{o}:r", RATE, 1.0)]) for _ in range(200)))
    assert sum(answer.refused is None for answer in taken) == 10


async def test_one_refusing_key_charges_none_and_is_named(stores: Stores) -> None:
    wide, narrow = Charge("{o}:wide", Rate(100), 3.0), Charge("{o}:narrow", Rate(5), 3.0)
    assert (await stores.rates.take([wide, narrow])).refused is None
    refused = await stores.rates.take([wide, narrow])
    assert refused.refused == 1
    assert refused.used == (3.0, 3.0)
    assert (await stores.rates.take([Charge("{o}:wide", Rate(100), 0.0, commit=False)])).used == (3.0,)


async def test_looking_charges_nothing(stores: Stores) -> None:
    for _ in range(50):
        assert (await stores.rates.take([Charge("{o}:r", RATE, 1.0, commit=False)])).refused is None
    assert (await stores.rates.take([Charge("{o}:r", RATE, 10.0)])).refused is None
    assert (await stores.rates.take([Charge("{o}:r", RATE, 1.0, commit=False)])).refused == 0


async def test_what_was_reserved_too_much_comes_back_and_too_little_is_taken(stores: Stores) -> None:
    await stores.rates.take([Charge("{o}:r", RATE, 8.0)])
    await stores.rates.settle([Charge("{o}:r", RATE, -6.0)])
    assert (await stores.rates.take([Charge("{o}:r", RATE, 8.0)])).refused is None
    await stores.rates.settle([Charge("{o}:r", RATE, 20.0)])
    assert (await stores.rates.take([Charge("{o}:r", RATE, 0.0)])).refused == 0


async def test_time_drains(stores: Stores, clock: ManualClock) -> None:
    await stores.rates.take([Charge("{o}:r", RATE, 10.0)])
    await clock.advance(30)
    assert (await stores.rates.take([Charge("{o}:r", RATE, 5.0)])).refused is None
    assert (await stores.rates.take([Charge("{o}:r", RATE, 1.0)])).refused == 0


async def test_nothing_to_ask_passes(stores: Stores) -> None:
    assert (await stores.rates.take([])).refused is None
    await stores.rates.settle([])
    assert await stores.leases.acquire([], "l", 60) is None
    assert (await stores.spend.reserve([], "r", 5, 60)).refused is None
    assert await stores.spend.settle([], "r", 5) == ()


async def test_memory_and_redis_give_the_same_answers_to_the_same_questions(redis_url: str, clock: ManualClock) -> None:
    random.seed(7)
    memory, client = memory_stores(clock), open_client(redis_url)
    shared = redis_stores(client, timeout=10, now=clock.monotonic)
    rates = [Rate(7, 1.0), Rate(100, 60.0, 20), Rate(1000, 3600.0)]
    for _ in range(400):
        await clock.advance(random.choice([0, 0, 0.01, 0.3, 2.5]))
        charges = [
            Charge(f"{{o}}:{index}", rate, float(random.randint(0, 9)), commit=random.random() < 0.8)
            for index, rate in enumerate(rates)
        ]
        if random.random() < 0.3:
            corrections = [Charge(charge.key, charge.rate, charge.cost - 4) for charge in charges]
            await memory.rates.settle(corrections)
            await shared.rates.settle(corrections)
        ours, theirs = await memory.rates.take(charges), await shared.rates.take(charges)
        assert ours.refused == theirs.refused
        assert theirs.used == pytest.approx(ours.used, abs=1e-9)
    await client.aclose()


async def test_the_redis_servers_own_clock_is_used_when_none_is_given(redis_url: str) -> None:
    client = open_client(redis_url)
    stores = redis_stores(client, timeout=10)
    assert (await stores.rates.take([Charge("{o}:r", Rate(2, 86400.0), 2.0)])).refused is None
    assert (await stores.rates.take([Charge("{o}:r", Rate(2, 86400.0), 1.0)])).refused == 0
    assert 0 < await client.ttl("{o}:r") <= 86402
    await client.aclose()


# Leases ---------------------------------------------------------------------------------------------------------------


async def test_only_as_many_as_the_capacity_hold_a_place(stores: Stores) -> None:
    answers = await asyncio.gather(*(stores.leases.acquire([Hold("{o}:c", 4)], f"l{n}", 60) for n in range(50)))
    assert answers.count(None) == 4
    assert await stores.leases.held("{o}:c") == 4


async def test_a_full_key_takes_no_place_under_the_others(stores: Stores) -> None:
    assert await stores.leases.acquire([Hold("{o}:user", 1), Hold("{o}:org", 9)], "a", 60) is None
    assert await stores.leases.acquire([Hold("{o}:org", 9), Hold("{o}:user", 1)], "b", 60) == 1
    assert await stores.leases.held("{o}:org") == 1


async def test_a_place_given_back_is_free_and_giving_back_twice_does_nothing(stores: Stores) -> None:
    await stores.leases.acquire([Hold("{o}:c", 1)], "a", 60)
    await stores.leases.release(["{o}:c"], "a")
    await stores.leases.release(["{o}:c", "{o}:unknown"], "a")
    assert await stores.leases.acquire([Hold("{o}:c", 1)], "b", 60) is None


async def test_a_dead_replicas_places_come_free_and_a_living_ones_do_not(stores: Stores, clock: ManualClock) -> None:
    await stores.leases.acquire([Hold("{o}:c", 2)], "dead", 60)
    await stores.leases.acquire([Hold("{o}:c", 2)], "alive", 60)
    await clock.advance(40)
    await stores.leases.renew([("alive", ["{o}:c"])], 60)
    await clock.advance(30)
    assert await stores.leases.held("{o}:c") == 1
    assert await stores.leases.acquire([Hold("{o}:c", 2)], "new", 60) is None
    assert await stores.leases.acquire([Hold("{o}:c", 2)], "another", 60) == 0


async def test_asking_again_for_a_place_that_one_has_renews_it(stores: Stores, clock: ManualClock) -> None:
    await stores.leases.acquire([Hold("{o}:c", 1)], "a", 60)
    await clock.advance(50)
    assert await stores.leases.acquire([Hold("{o}:c", 1)], "a", 60) is None
    await clock.advance(50)
    assert await stores.leases.held("{o}:c") == 1


# Money ----------------------------------------------------------------------------------------------------------------


async def test_a_hundred_reservations_at_once_never_pass_the_cap(stores: Stores) -> None:
    await stores.spend.open("{o}:b", 0, 3600)
    cap = Cap("{o}:b", 1000, enforce=True)
    answers = await asyncio.gather(*(stores.spend.reserve([cap], f"r{n}", 30, 60) for n in range(100)))
    let_in = [f"r{n}" for n, answer in enumerate(answers) if answer.refused is None]
    assert len(let_in) == 33
    await asyncio.gather(*(stores.spend.settle(["{o}:b"], reservation, 30) for reservation in let_in))
    assert await stores.spend.balances(["{o}:b"]) == (Balance(990, 0),)


async def test_a_counter_that_is_not_known_is_reported_and_nothing_is_reserved(stores: Stores) -> None:
    await stores.spend.open("{o}:a", 5, 3600)
    caps = [Cap("{o}:a", 100, enforce=True), Cap("{o}:b", 100, enforce=True)]
    assert (await stores.spend.reserve(caps, "r", 10, 60)).missing == (1,)
    assert await stores.spend.balances(["{o}:a", "{o}:b"]) == (Balance(5, 0), None)


async def test_a_budget_that_refuses_keeps_the_others_untouched_and_is_named(stores: Stores) -> None:
    for key in ("{o}:a", "{o}:b"):
        await stores.spend.open(key, 0, 3600)
    await stores.spend.reserve([Cap("{o}:b", 100, enforce=True)], "first", 95, 60)
    refused = await stores.spend.reserve(
        [Cap("{o}:a", 100, enforce=True), Cap("{o}:b", 100, enforce=True)], "r", 10, 60
    )
    assert refused.refused == 1
    assert await stores.spend.balances(["{o}:a", "{o}:b"]) == (Balance(0, 0), Balance(0, 95))


async def test_a_budget_that_only_warns_counts_beyond_its_cap(stores: Stores) -> None:
    await stores.spend.open("{o}:b", 100, 3600)
    assert (await stores.spend.reserve([Cap("{o}:b", 50, enforce=False)], "r", 10, 60)).refused is None
    assert (await stores.spend.settle(["{o}:b"], "r", 10))[0].after == 110


async def test_settling_twice_or_reserving_twice_counts_once(stores: Stores) -> None:
    await stores.spend.open("{o}:b", 0, 3600)
    cap = Cap("{o}:b", 100, enforce=True)
    for _ in range(3):
        assert (await stores.spend.reserve([cap], "r", 90, 60)).refused is None
    assert await stores.spend.balances(["{o}:b"]) == (Balance(0, 90),)
    moves = [(await stores.spend.settle(["{o}:b"], "r", 40))[0] for _ in range(3)]
    assert [(move.before, move.after) for move in moves] == [(0, 40), (40, 40), (40, 40)]
    assert await stores.spend.balances(["{o}:b"]) == (Balance(40, 0),)


async def test_a_dead_replicas_reservation_is_given_back_but_its_cost_still_counts(
    stores: Stores, clock: ManualClock
) -> None:
    await stores.spend.open("{o}:b", 0, 3600)
    cap = Cap("{o}:b", 100, enforce=True)
    await stores.spend.reserve([cap], "slow", 60, 60)
    await stores.spend.reserve([cap], "free", 0, 60)
    await clock.advance(61)
    assert await stores.spend.balances(["{o}:b"]) == (Balance(0, 0),)
    assert (await stores.spend.reserve([cap], "next", 60, 60)).refused is None
    assert (await stores.spend.settle(["{o}:b"], "slow", 50))[0].after == 50
    assert (await stores.spend.settle(["{o}:b"], "slow", 50))[0].after == 50
    assert (await stores.spend.settle(["{o}:b"], "free", 3))[0].after == 53
    assert await stores.spend.balances(["{o}:b"]) == (Balance(53, 60),)


async def test_a_counter_is_begun_once_and_then_only_raised(stores: Stores) -> None:
    await stores.spend.raise_to("{o}:b", 10, 3600)
    assert await stores.spend.balances(["{o}:b"]) == (None,)
    await stores.spend.open("{o}:b", 20, 3600)
    await stores.spend.open("{o}:b", 99, 3600)
    await stores.spend.raise_to("{o}:b", 15, 3600)
    assert await stores.spend.balances(["{o}:b"]) == (Balance(20, 0),)
    await stores.spend.raise_to("{o}:b", 25, 3600)
    assert await stores.spend.balances(["{o}:b"]) == (Balance(25, 0),)


async def test_settling_an_account_that_is_gone_moves_nothing(stores: Stores) -> None:
    assert [(move.before, move.after) for move in await stores.spend.settle(["{o}:b"], "r", 40)] == [(0, 0)]


async def test_memory_forgets_accounts_and_levels_that_are_over(clock: ManualClock) -> None:
    stores = memory_stores(clock)
    for n in range(5000):
        await stores.rates.take([Charge(f"{n}", RATE, 1.0)])
        await stores.spend.open(f"{n}", 0, 60)
        if n == 4000:
            await clock.advance(120)
    assert len(stores.rates._levels) <= 1100  # type: ignore[attr-defined]
    assert len(stores.spend._accounts) <= 1100  # type: ignore[attr-defined]
    assert await stores.spend.balances(["0"]) == (None,)


async def test_a_server_that_is_gone_is_one_kind_of_error(clock: ManualClock) -> None:
    client = open_client("redis://127.0.0.1:1/0")
    stores = redis_stores(client)
    with pytest.raises(StoreGone):
        await stores.rates.take([Charge("{o}:r", RATE, 1.0)])
    with pytest.raises(StoreGone):
        await stores.leases.release(["{o}:r"], "l")
    with pytest.raises(StoreGone):
        await stores.spend.open("{o}:r", 0, 60)
    await client.aclose()


@pytest.mark.process
async def test_a_redis_that_dies_and_comes_back_empty_is_used_again(own_redis: RedisServer) -> None:
    client = open_client(own_redis.url)
    stores = redis_stores(client, timeout=5)
    charge = Charge("{o}:r", Rate(1, 86400.0), 1.0)
    assert (await stores.rates.take([charge])).refused is None
    await asyncio.to_thread(own_redis.kill)
    with pytest.raises(StoreGone):
        await stores.rates.take([charge])
    await asyncio.to_thread(own_redis.start)
    assert (await stores.rates.take([charge])).refused is None, "its scripts are gone too: they are sent again"
    assert (await stores.rates.take([charge])).refused == 0
    await client.aclose()
