"""What a cache store promises, on memory and on Redis alike, and what the cache over it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage.cache import (
    Bounds,
    Cache,
    CacheStore,
    Computed,
    MemoryStore,
    Outcome,
    cache_key,
    entry_cost,
)
from claude_wrapper.storage.cacheredis import RedisStore
from claude_wrapper.testing.clock import ManualClock
from databases import RedisServer, SteppedClock

pytestmark = pytest.mark.anyio

ENTRY = 100
COST = entry_cost("a", b"x" * ENTRY)
BOUNDS = Bounds(total=3 * COST, entry=COST)


@dataclass
class Under:
    store: CacheStore
    advance: Callable[[float], Awaitable[None]]


@pytest.fixture
async def under(state_kind: str | None, anyio_backend: str) -> AsyncIterator[Under]:
    """A store with room for three entries of one letter and 100 bytes, and a way to let time pass."""
    if state_kind is None:
        clock = SteppedClock()

        async def move(seconds: float) -> None:
            clock.seconds += seconds

        yield Under(MemoryStore(clock, BOUNDS), move)
        return
    store, raw = RedisStore(state_kind, BOUNDS, timeout=5.0), redis.asyncio.Redis.from_url(state_kind)

    async def age(seconds: float) -> None:
        async for key in raw.scan_iter():
            left = await raw.pttl(key)
            if left >= 0:
                await raw.pexpire(key, max(0, left - round(seconds * 1000)))
        for member, ends in await raw.zrange("cw:cache:ends", 0, -1, withscores=True):
            await raw.zadd("cw:cache:ends", {member: ends - seconds * 1000})

    yield Under(store, age)
    await store.close()
    await raw.aclose()


async def test_a_value_is_there_until_its_end_and_the_least_recently_used_make_room(under: Under) -> None:
    store = under.store
    values = {name: bytes([index]) * ENTRY for index, name in enumerate("abc")}
    for name, value in values.items():
        assert await store.put(name, value, ttl=60)
    assert await store.size() == BOUNDS.total
    assert await store.get("a") == values["a"]  # now b is the one that was used longest ago
    assert await store.put("d", b"\x00\xff" * (ENTRY // 2), ttl=60)
    assert await store.get("b") is None
    assert [await store.get(name) for name in "acd"] == [values["a"], values["c"], b"\x00\xff" * (ENTRY // 2)]
    assert await store.size() == BOUNDS.total
    await under.advance(61)
    assert [await store.get(name) for name in "acd"] == [None, None, None]
    assert await store.put("e", b"e", ttl=60)
    assert await store.get("e") == b"e"


async def test_a_value_replaces_the_one_before_and_one_that_is_too_large_removes_it(under: Under) -> None:
    store = under.store
    assert await store.put("a", b"1" * ENTRY, ttl=60)
    assert await store.put("a", b"2", ttl=60)
    assert await store.get("a") == b"2"
    assert await store.size() == entry_cost("a", b"2")
    assert not await store.put("a", b"3" * (ENTRY + 1), ttl=60)
    assert await store.get("a") is None  # never the old value for the new question
    assert not await store.put("a", b"4", ttl=0)
    assert await store.get("a") is None
    assert await store.put("a", b"5", ttl=60)
    assert await store.delete("a")
    assert not await store.delete("a")
    assert await store.size() == 0


async def test_a_claim_is_one_holders_until_it_ends_or_is_given_back(under: Under) -> None:
    store = under.store
    assert await store.claim("a", "one", ttl=10)
    assert await store.claim("a", "one", ttl=10)
    assert not await store.claim("a", "two", ttl=10)
    await store.unclaim("a", "two")
    assert not await store.claim("a", "two", ttl=10)
    await store.unclaim("a", "one")
    assert await store.claim("a", "two", ttl=10)
    await under.advance(11)
    assert await store.claim("a", "one", ttl=10)


async def test_those_who_ask_at_once_share_one_computation(under: Under) -> None:
    cache, seen = Cache("t", under.store, SteppedClock(), watch=lambda _, outcome: seen.append(outcome)), []
    gate, calls = asyncio.Event(), 0

    async def compute() -> Computed:
        nonlocal calls
        calls += 1
        await gate.wait()
        return Computed(b"v")

    asking = [asyncio.create_task(cache.get_or_compute("k", 60, compute)) for _ in range(5)]
    while calls == 0:
        await asyncio.sleep(0)
    gate.set()
    found = await asyncio.gather(*asking)
    assert [one.value for one in found] == [b"v"] * 5
    assert sorted(seen) == [Outcome.JOINED] * 4 + [Outcome.MISS]
    assert (await cache.get_or_compute("k", 60, compute)).outcome is Outcome.HIT
    assert (await cache.get_or_compute("k", 60, compute, refresh=True)).outcome is Outcome.MISS
    assert calls == 2


async def test_another_takes_over_from_one_that_is_cancelled_and_errors_are_not_kept(under: Under) -> None:
    cache = Cache("t", under.store, SteppedClock())
    started, never = asyncio.Event(), asyncio.Event()

    async def hangs() -> Computed:
        started.set()
        await never.wait()
        raise NotImplementedError

    async def answers() -> Computed:
        return Computed(b"v", keep=False)

    async def fails() -> Computed:
        raise ValueError("no")

    first = asyncio.create_task(cache.get_or_compute("k", 60, hangs))
    await started.wait()
    second = asyncio.create_task(cache.get_or_compute("k", 60, answers))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).value == b"v"
    with pytest.raises(ValueError, match="no"):
        await cache.get_or_compute("k", 60, fails)
    assert await cache.get("k") is None


async def test_replicas_wait_for_the_one_that_computes(redis_url: str) -> None:
    stores = [RedisStore(redis_url, Bounds(), timeout=5.0) for _ in range(2)]
    clock = ManualClock()
    ours, theirs = (Cache("t", store, clock, holder=f"r{n}", lease_seconds=10) for n, store in enumerate(stores))
    started, gate = asyncio.Event(), asyncio.Event()

    async def slow() -> Computed:
        started.set()
        await gate.wait()
        return Computed(b"v")

    async def never() -> Computed:
        raise NotImplementedError

    first = asyncio.create_task(ours.get_or_compute("k", 60, slow))
    await started.wait()
    second = asyncio.create_task(theirs.get_or_compute("k", 60, never))
    async with asyncio.timeout(20):
        await clock.wait_for_sleepers()
        gate.set()
        await first
        await clock.advance(0.1)
        found = await second
    assert (found.value, found.outcome) == (b"v", Outcome.JOINED)
    for store in stores:
        await store.close()


async def test_a_store_that_fails_is_a_miss_that_is_counted_and_left_alone_for_a_while(own_redis: RedisServer) -> None:
    clock, seen = ManualClock(), []
    store = RedisStore(own_redis.url, Bounds(), timeout=5.0)
    cache = Cache("t", store, clock, watch=lambda _, outcome: seen.append(outcome), rest_seconds=5)

    async def compute() -> Computed:
        return Computed(b"v")

    own_redis.kill()
    assert (await cache.get_or_compute("k", 60, compute)).value == b"v"
    assert seen == [Outcome.ERROR]
    own_redis.start()
    assert (await cache.get_or_compute("k", 60, compute)).outcome is Outcome.ERROR  # it still rests
    await clock.advance(6)
    assert (await cache.get_or_compute("k", 60, compute)).outcome is Outcome.MISS
    assert (await cache.get_or_compute("k", 60, compute)).outcome is Outcome.HIT
    own_redis.kill()
    with pytest.raises(StorageUnavailable):
        await store.get("k")
    await store.close()


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(0, 150), st.sampled_from([0.0, 5.0, 50.0]), st.booleans()),
        max_size=60,
    )
)
async def test_the_memory_store_never_holds_more_than_it_may_and_never_gives_a_wrong_value(
    steps: list[tuple[str, int, float, bool]],
) -> None:
    clock = SteppedClock()
    store, last = MemoryStore(clock, BOUNDS), dict[str, tuple[bytes, float]]()
    for number, (name, size, ttl, move) in enumerate(steps):
        value = bytes([number]) * size
        kept = await store.put(name, value, ttl=ttl)
        assert kept == (size <= ENTRY and ttl > 0)
        last[name] = (value if kept else b"", clock.seconds + ttl if kept else 0.0)
        assert not kept or await store.get(name) == value
        clock.seconds += 10 * move
        for other, (expected, ends) in last.items():
            found = await store.get(other)
            assert found is None or (found == expected and ends > clock.seconds)
        assert 0 <= await store.size() <= BOUNDS.total


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_only_the_same_parts_have_the_same_key(one: list[bytes], other: list[bytes]) -> None:
    assert (cache_key(*one) == cache_key(*other)) == (one == other)
