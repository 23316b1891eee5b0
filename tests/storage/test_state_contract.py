"""What shared state promises, on memory and on Redis alike."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from claude_wrapper.clock import SystemClock
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage import Announcement
from claude_wrapper.storage.announcer import Announcer
from claude_wrapper.storage.state import Cells, Ended, MemoryState, Script, SharedState
from claude_wrapper.storage.state.heartbeat import holding
from claude_wrapper.storage.state.redis import RedisState
from databases import RedisServer, StateUnderTest, SteppedClock

pytestmark = pytest.mark.anyio


# Counters -------------------------------------------------------------------------------------------------------------


async def test_a_counter_counts_every_one_of_many_increments_at_once(shared_state: SharedState) -> None:
    found = await asyncio.gather(*(shared_state.increment("n", ttl=60) for _ in range(100)))
    assert sorted(found) == list(range(1, 101))
    assert await shared_state.count("n") == 100


async def test_a_counter_ends_its_time_after_its_creation_not_after_its_last_use(
    state_under_test: StateUnderTest,
) -> None:
    state = state_under_test.state
    await state.increment("n", ttl=60)
    await state_under_test.advance(50)
    assert await state.increment("n", by=4, ttl=60) == 5
    await state_under_test.advance(11)
    assert await state.count("n") == 0


async def test_counters_values_and_leases_of_one_name_are_apart(shared_state: SharedState) -> None:
    await shared_state.increment("x", ttl=60)
    await shared_state.set("x", b"v")
    assert await shared_state.acquire("x", "me", ttl=60)
    assert await shared_state.count("x") == 1
    assert await shared_state.get("x") == b"v"


# Values ---------------------------------------------------------------------------------------------------------------


async def test_a_value_is_kept_until_its_time_is_over(state_under_test: StateUnderTest) -> None:
    state = state_under_test.state
    await state.set("k", b"\x00\xff", ttl=10)
    await state.set("forever", b"1")
    assert await state.get("k") == b"\x00\xff"
    await state_under_test.advance(11)
    assert await state.get("k") is None
    assert await state.get("forever") == b"1"


async def test_deleting_tells_whether_there_was_something(shared_state: SharedState) -> None:
    await shared_state.set("k", b"v")
    assert await shared_state.delete("k")
    assert not await shared_state.delete("k")


async def test_compare_and_set_needs_exactly_the_expected_value(shared_state: SharedState) -> None:
    assert not await shared_state.compare_and_set("k", b"", b"new")
    assert await shared_state.compare_and_set("k", None, b"")
    assert not await shared_state.compare_and_set("k", None, b"other")
    assert await shared_state.compare_and_set("k", b"", b"b", ttl=60)
    assert await shared_state.compare_and_set("k", b"b", None)
    assert await shared_state.get("k") is None


async def test_of_many_that_create_one_value_exactly_one_wins(shared_state: SharedState) -> None:
    won = await asyncio.gather(*(shared_state.compare_and_set("k", None, b"%d" % n) for n in range(50)))
    assert sum(won) == 1
    assert await shared_state.get("k") == b"%d" % won.index(True)


# Leases ---------------------------------------------------------------------------------------------------------------


async def test_a_lease_has_one_holder_until_it_ends_or_is_released(state_under_test: StateUnderTest) -> None:
    state = state_under_test.state
    mine = await state.acquire("s", "me", ttl=10)
    assert mine is not None
    assert await state.acquire("s", "you", ttl=10) is None
    assert (await state.holder("s")) is not None
    await state_under_test.advance(11)
    yours = await state.acquire("s", "you", ttl=10)
    assert yours is not None
    assert yours.token > mine.token
    assert not await state.renew(mine)
    assert not await state.release(mine)
    assert await state.release(yours)
    assert await state.holder("s") is None


async def test_renewing_extends_a_lease(state_under_test: StateUnderTest) -> None:
    state = state_under_test.state
    lease = await state.acquire("s", "me", ttl=10)
    assert lease is not None
    await state_under_test.advance(8)
    assert await state.renew(lease)
    await state_under_test.advance(8)
    assert await state.acquire("s", "you", ttl=10) is None


async def test_the_same_holder_gets_a_higher_token_and_the_old_one_is_spent(shared_state: SharedState) -> None:
    first = await shared_state.acquire("s", "me", ttl=10)
    second = await shared_state.acquire("s", "me", ttl=10)
    assert first is not None
    assert second is not None
    assert second.token > first.token
    assert not await shared_state.renew(first)
    assert await shared_state.renew(second)


async def test_tokens_grow_over_all_names(shared_state: SharedState) -> None:
    leases = [await shared_state.acquire(f"s{n}", "me", ttl=10) for n in range(50)]
    tokens = [lease.token for lease in leases if lease is not None]
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 50


async def test_of_many_that_race_for_a_lease_exactly_one_gets_it(shared_state: SharedState) -> None:
    found = await asyncio.gather(*(shared_state.acquire("s", f"h{n}", ttl=10) for n in range(50)))
    winners = [lease for lease in found if lease is not None]
    assert len(winners) == 1
    held = await shared_state.holder("s")
    assert held is not None
    assert (held.holder, held.token) == (winners[0].holder, winners[0].token)
    assert 0 < held.ttl <= 10


# Messages -------------------------------------------------------------------------------------------------------------


async def test_every_subscriber_gets_every_message_from_its_subscription_on(shared_state: SharedState) -> None:
    await shared_state.publish("c", b"early")
    async with asyncio.timeout(20), shared_state.subscribe("c") as one, shared_state.subscribe("c") as two:
        await shared_state.publish("other", b"elsewhere")
        for n in range(3):
            await shared_state.publish("c", b"%d" % n)
        assert [await anext(one) for _ in range(3)] == [b"0", b"1", b"2"]
        assert [await anext(two) for _ in range(3)] == [b"0", b"1", b"2"]


async def test_a_subscriber_that_is_too_slow_is_cut_off_and_told(shared_state: SharedState) -> None:
    async with asyncio.timeout(20), shared_state.subscribe("c", buffer=2) as slow, shared_state.subscribe("c") as quick:
        for n in range(5):
            await shared_state.publish("c", b"%d" % n)
        assert [await anext(quick) for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        assert [message async for message in slow] == [b"0", b"1"]
        assert slow.ended is Ended.LAGGED


async def test_a_channel_can_be_left_and_joined_again(shared_state: SharedState) -> None:
    async with asyncio.timeout(20):
        for n in range(3):
            async with shared_state.subscribe("c") as subscription:
                await shared_state.publish("c", b"%d" % n)
                assert await anext(subscription) == b"%d" % n
            assert subscription.ended is Ended.CLOSED


async def test_closing_ends_subscriptions(shared_state: SharedState) -> None:
    async with asyncio.timeout(20), shared_state.subscribe("c") as subscription:
        await shared_state.close()
        assert [message async for message in subscription] == []
        assert subscription.ended is Ended.CLOSED


# Scripts --------------------------------------------------------------------------------------------------------------


def take(cells: Cells, keys: Sequence[str], args: Sequence[str], now: int) -> list[str | int]:
    left = int(cells.get(keys[0]) or args[0])
    if left <= 0:
        return [0, str(left)]
    cells.set(keys[0], str(left - 1), int(args[1]))
    return [1, str(left - 1)]


TAKE = Script(
    "take",
    """
    local left = tonumber(redis.call('GET', KEYS[1]) or ARGV[1])
    if left <= 0 then return {0, tostring(left)} end
    redis.call('SET', KEYS[1], left - 1, 'PX', ARGV[2])
    return {1, tostring(left - 1)}
    """,
    take,
)

NOW = Script("now", "return {ARGV[#ARGV]}", lambda cells, keys, args, now: [str(now)])


async def test_a_script_is_atomic(shared_state: SharedState) -> None:
    found = await asyncio.gather(*(shared_state.run(TAKE, ["stock"], [10, 60_000]) for _ in range(50)))
    assert sum(int(taken) for taken, _ in found) == 10
    assert [0, "0"] in found


async def test_a_script_knows_the_time_in_microseconds_and_it_never_goes_back(shared_state: SharedState) -> None:
    first = int((await shared_state.run(NOW, [], []))[0])
    second = int((await shared_state.run(NOW, [], []))[0])
    assert 0 < first <= second


async def test_a_script_may_not_touch_a_key_that_it_was_not_given() -> None:
    state = MemoryState(SteppedClock())
    with pytest.raises(KeyError, match="not given"):
        await state.run(Script("x", "", lambda cells, keys, args, now: [cells.get("other") or ""]), ["mine"], [])


# Heartbeats -----------------------------------------------------------------------------------------------------------


async def test_a_held_lease_outlives_its_time_and_is_free_after_the_block(shared_state: SharedState) -> None:
    clock = SteppedClock()
    async with holding(shared_state, clock, "s", "me", ttl=30) as held:
        assert held is not None
        async with holding(shared_state, clock, "s", "you", ttl=30) as refused:
            assert refused is None
        assert not held.lost.is_set()
    assert await shared_state.holder("s") is None


async def test_a_holder_that_lost_its_lease_is_told(state_under_test: StateUnderTest) -> None:
    state = state_under_test.state
    async with asyncio.timeout(20), holding(state, SteppedClock(), "s", "me", ttl=30) as held:
        assert held is not None
        await state.release(held.lease)
        await state.acquire("s", "you", ttl=30)
        await held.lost.wait()
    present = await state.holder("s")
    assert present is not None
    assert present.holder == "you"


async def test_a_cancellation_that_arrives_together_with_an_answer_is_not_lost(redis_url: str) -> None:
    state = RedisState(redis_url)
    await state.ping()

    async def ask_forever() -> None:
        while True:
            await state.count("n")

    try:
        for steps in range(150):  # a command takes about ten steps of the loop: every one of them is hit
            asking = asyncio.create_task(ask_forever())
            for _ in range(steps % 30):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait([asking], timeout=1)
            assert asking.cancelled()
    finally:
        await state.close()


# Redis going away -----------------------------------------------------------------------------------------------------


async def test_while_redis_is_away_every_operation_says_so_and_it_recovers_by_itself(own_redis: RedisServer) -> None:
    state = RedisState(own_redis.url)
    try:
        async with asyncio.timeout(30), state.subscribe("c") as subscription:
            own_redis.kill()
            assert [message async for message in subscription] == []
            assert subscription.ended is Ended.DISCONNECTED
            for attempt in (
                state.ping(),
                state.increment("n", ttl=1),
                state.get("k"),
                state.acquire("s", "me", ttl=1),
                state.publish("c", b""),
                state.run(TAKE, ["stock"], [1, 1]),
            ):
                with pytest.raises(StorageUnavailable, match="Redis"):
                    await attempt
            await asyncio.to_thread(own_redis.start)
            assert await state.run(TAKE, ["stock"], [1, 60_000]) == [1, "0"]
            async with state.subscribe("c") as again:
                await state.publish("c", b"back")
                assert await anext(again) == b"back"
    finally:
        await state.close()


async def test_two_replicas_hear_each_others_commits(redis_url: str) -> None:
    ours, theirs = RedisState(redis_url), RedisState(redis_url)
    heard: asyncio.Queue[bytes | None] = asyncio.Queue()
    here, there = Announcer(ours, SystemClock()), Announcer(theirs, SystemClock())
    there.on("tenancy", heard.put_nowait)
    there.start()
    try:
        async with asyncio.timeout(20):
            assert await heard.get() is None  # from the moment it listens it knows nothing for certain
            await here([Announcement("tenancy", b"changed")])
            assert await heard.get() == b"changed"
    finally:
        await there.close()
        await ours.close()
        await theirs.close()


async def test_a_commit_stands_when_the_shared_state_is_away_and_local_hearers_still_hear(
    own_redis: RedisServer,
) -> None:
    state = RedisState(own_redis.url, timeout=0.5)
    announcer, heard = Announcer(state, SystemClock()), list[bytes | None]()
    announcer.on("tenancy", heard.append)
    own_redis.kill()
    await announcer([Announcement("tenancy", b"changed")])
    assert (heard, announcer.undelivered) == ([b"changed"], 1)
    await state.close()
