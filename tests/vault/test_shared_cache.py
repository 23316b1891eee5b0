"""What organisations share with each other: only what both want, only while both want it, and nothing by accident."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vault_doubles import Vault

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage.cache import Bounds, Cache, CacheStore, Computed, MemoryStore, Outcome, cache_key
from claude_wrapper.storage.cacheredis import RedisStore
from claude_wrapper.storage.tables.vault import vault_org_keys
from claude_wrapper.tenancy.deletion import delete_organization, purge_organization, restore_organization
from claude_wrapper.tenancy.orgs import create_organization
from claude_wrapper.tenancy.partners import Partners
from claude_wrapper.tenancy.policybook import PolicyBook, set_policies
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.vault.envelope import DataKeys
from claude_wrapper.vault.erasure import erase_vault
from claude_wrapper.vault.sealedcache import NoPartners, SealedCache
from tenants import HandClock, World, owner

pytestmark = pytest.mark.anyio

KEY = cache_key("POST", b"what was asked")


# Every order of events, against what the rules say ----------------------------------------------------------------------


@dataclass
class Keys:
    """Data keys; an erased organisation's are gone, and one that is used again gets others."""

    made: dict[str, int] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    async def present(self, org: str, *, opening: bytes | None = None) -> DataKeys | None:
        if org in self.gone:
            return None
        number = self.made.setdefault(org, 1)
        return DataKeys(org, {1: hashlib.sha256(f"{org} {number}".encode()).digest()})

    async def of(self, org: str, *, opening: bytes | None = None) -> DataKeys:
        self.gone.discard(org)
        keys = await self.present(org)
        assert keys is not None
        return keys

    def erase(self, org: str) -> None:
        self.made[org] = self.made.get(org, 1) + 1
        self.gone.add(org)


class Named(dict[str, tuple[str, ...]]):
    """Who names whom, at this moment."""

    async def named(self, org: str) -> tuple[str, ...]:
        return self.get(org, ())

    async def mutual(self, org: str) -> tuple[str, ...]:
        return tuple(one for one in self.get(org, ()) if org in self.get(one, ()))


@dataclass(frozen=True)
class Kept:
    """What the rules say of a kept value."""

    value: bytes
    at: float
    partners: tuple[str, ...]
    key: int


ORGS = ("A", "B", "C")
TTL = 60.0
_ORG = st.sampled_from(ORGS)
_STEP = st.one_of(
    st.tuples(st.just("name"), _ORG, st.lists(_ORG, unique=True, max_size=2)),
    st.tuples(st.just("erase"), _ORG),
    st.tuples(st.just("wait"), st.sampled_from([20.0, 50.0])),
    st.tuples(st.just("ask"), _ORG, st.booleans(), st.sampled_from([False, False, True])),
    st.tuples(st.just("ask"), _ORG, st.just(True), st.just(False)),
)


@settings(max_examples=300)
@given(st.lists(_STEP, max_size=30))
async def test_what_anybody_is_given_is_what_the_rules_say(steps: list[Any]) -> None:
    clock, keys, named = HandClock(), Keys(), Named()
    cache = SealedCache(Cache("t", MemoryStore(clock, Bounds()), clock), keys, clock, named)  # type: ignore[arg-type]
    kept: dict[str, Kept] = {}

    def alive(org: str) -> Kept | None:
        one = kept.get(org)
        valid = one is not None and clock.seconds - one.at < TTL and one.key == keys.made.get(org, 1)
        return one if valid and org not in keys.gone else None

    for number, step in enumerate(steps):
        match step:
            case ("name", org, others):
                named[org] = tuple(one for one in others if one != org)
            case ("erase", org):
                keys.erase(org)
            case ("wait", seconds):
                clock.advance(seconds)
            case ("ask", org, share, refresh):
                fresh = f"{org}#{number}".encode()

                async def compute(value: bytes = fresh) -> Computed:
                    return Computed(value)

                expected, outcome = fresh, Outcome.MISS
                keys.gone.discard(org)  # asking makes a key
                if (own := alive(org)) is not None and not refresh:
                    expected, outcome = own.value, Outcome.HIT
                elif share and not refresh:
                    for other in named.get(org, ()):
                        theirs = alive(other)
                        if org in named.get(other, ()) and theirs is not None and org in theirs.partners:
                            expected, outcome = theirs.value, Outcome.SHARED
                            break
                found = await cache.get_or_compute(org, KEY, TTL, compute, refresh=refresh, share=share)
                assert (found.value, found.outcome) == (expected, outcome)
                if (whose := expected.decode().partition("#")[0]) != org:
                    assert whose in named[org]
                    assert org in named[whose]
                if outcome is Outcome.MISS:
                    kept[org] = Kept(fresh, clock.seconds, named.get(org, ()) if share else (), keys.made.get(org, 1))


# Both databases, both stores --------------------------------------------------------------------------------------------


@dataclass
class Replica:
    """One server's cache: it hears of no change of another one, so that only what it reads counts."""

    cache: SealedCache
    policies: PolicyBook

    async def ask(self, who: Principal, value: bytes, **how: Any) -> tuple[bytes, Outcome]:
        async def compute() -> Computed:
            return Computed(value)

        found = await self.cache.get_or_compute(who.org, KEY, TTL, compute, **{"share": True} | how)
        return found.value, found.outcome


@dataclass
class Two:
    """Two organisations that share, and a replica for each."""

    vault: Vault
    store: CacheStore
    ours: Replica
    theirs: Replica

    def replica(self, store: CacheStore) -> Replica:
        clock, db = self.vault.clock, self.vault.db
        policies = PolicyBook(db, clock)
        cache = SealedCache(Cache("t", store, clock), self.vault.new_keys(), clock, Partners(db, policies))
        return Replica(cache, policies)

    @property
    def world(self) -> World:
        return self.vault.world

    async def share(self, who: Principal, *others: str, **policies: Any) -> None:
        await self.world.do(set_policies, who, {"cache_share_with": list(others), **policies})


@pytest.fixture
async def two(vault: Vault, state_kind: str | None) -> AsyncIterator[Two]:
    store: CacheStore = MemoryStore(vault.clock, Bounds()) if state_kind is None else RedisStore(state_kind, Bounds())
    made = Two(vault, store, None, None)  # type: ignore[arg-type]
    made.ours, made.theirs = made.replica(store), made.replica(store)
    world = vault.world
    await made.share(world.ours, world.theirs.org)
    await made.share(world.theirs, world.ours.org)
    yield made
    await store.close()


async def test_a_partners_answer_will_do_after_ones_own_and_no_copy_of_it_is_made(two: Two) -> None:
    world = two.world
    assert await two.theirs.ask(world.theirs, b"theirs") == (b"theirs", Outcome.MISS)
    size = await two.store.size()
    for _ in range(2):
        assert await two.ours.ask(world.ours, b"ours") == (b"theirs", Outcome.SHARED)
    assert await two.store.size() == size
    assert await two.ours.ask(world.ours, b"other", share=False) == (b"other", Outcome.MISS)
    assert await two.ours.ask(world.ours, b"x") == (b"other", Outcome.HIT)
    assert await two.ours.ask(world.ours, b"new", refresh=True) == (b"new", Outcome.MISS)


async def _revoked_by_us(two: Two) -> None:
    await two.share(two.world.ours)


async def _revoked_by_them(two: Two) -> None:
    await two.share(two.world.theirs)


async def _named_another(two: Two) -> None:
    await two.share(two.world.theirs, "org_another")


async def _off(two: Two) -> None:
    await two.share(two.world.theirs, two.world.ours.org, cache_answers="off")


async def _off_here(two: Two) -> None:
    await two.share(two.world.ours, two.world.theirs.org, cache_answers="off")


async def _deleted(two: Two) -> None:
    await two.world.do(delete_organization, two.world.theirs)


async def _erased_keys(two: Two) -> None:
    async with two.world.db.transaction() as tx:
        await erase_vault(tx, two.world.theirs)
    two.ours.cache._keys.forget(two.world.theirs.org)


async def _purged(two: Two) -> None:
    await _deleted(two)
    inside = two.world.operator.acting_in(two.world.theirs.org)
    await purge_organization(two.world.db, inside, two.world.scribe, [])


async def _older_than_the_asker_wants(two: Two) -> None:
    two.vault.clock.advance(TTL)


@pytest.mark.parametrize(
    "end",
    [
        *(_revoked_by_us, _revoked_by_them, _named_another, _off, _off_here, _deleted, _erased_keys, _purged),
        _older_than_the_asker_wants,
    ],
)
async def test_the_end_of_a_consent_holds_at_once_on_a_replica_that_was_told_nothing(
    two: Two, end: Callable[[Two], Awaitable[None]]
) -> None:
    world = two.world
    await two.theirs.ask(world.theirs, b"theirs")
    assert await two.ours.ask(world.ours, b"ours") == (b"theirs", Outcome.SHARED)
    remembered = await two.ours.policies.of(world.ours)
    await end(two)
    assert await two.ours.policies.of(world.ours) is remembered  # nobody told it
    assert await two.ours.ask(world.ours, b"ours") == (b"ours", Outcome.MISS)


async def test_a_deleted_organisation_that_is_opened_again_shares_again(two: Two) -> None:
    world = two.world
    await two.theirs.ask(world.theirs, b"theirs")
    await _deleted(two)
    await world.do(restore_organization, world.operator.acting_in(world.theirs.org))
    assert await two.ours.ask(world.ours, b"ours") == (b"theirs", Outcome.SHARED)


async def test_an_erased_partner_gets_no_new_key_by_being_asked(two: Two) -> None:
    await two.theirs.ask(two.world.theirs, b"theirs")
    await _erased_keys(two)
    await two.ours.ask(two.world.ours, b"ours")
    async with two.world.db.read() as tx:
        mine = vault_org_keys.c.org_id == two.world.theirs.org
        assert (await tx.execute(sa.select(vault_org_keys).where(mine))).all() == []


@pytest.mark.parametrize("by_whom", ["ours", "theirs"])
async def test_one_side_alone_shares_nothing(two: Two, by_whom: str) -> None:
    world = two.world
    await two.share(world.theirs if by_whom == "ours" else world.ours)
    for replica, who, value in ((two.theirs, world.theirs, b"theirs"), (two.ours, world.ours, b"ours")):
        assert await replica.ask(who, value) == (value, Outcome.MISS)


async def test_what_was_kept_before_a_consent_is_not_given_by_it(two: Two) -> None:
    world = two.world
    await two.share(world.theirs)
    await two.theirs.ask(world.theirs, b"before")
    await two.share(world.theirs, world.ours.org)
    two.theirs.policies.heard(None)
    assert await two.ours.ask(world.ours, b"ours") == (b"ours", Outcome.MISS)


async def test_what_may_not_be_shared_is_not_whatever_its_asker_wants(two: Two) -> None:
    await two.theirs.ask(two.world.theirs, b"with a credential", share=False)
    assert await two.ours.ask(two.world.ours, b"ours") == (b"ours", Outcome.MISS)


async def test_sharing_is_not_passed_on(two: Two) -> None:
    """A partner's partner is given nothing: what came from a partner is never kept."""
    world = two.world
    third = owner((await world.do(create_organization, world.operator, "Third")).id)
    await two.share(third, world.ours.org)
    await two.share(world.ours, world.theirs.org, third.org)
    two.ours.policies.heard(None)
    await two.theirs.ask(world.theirs, b"theirs")
    assert await two.ours.ask(world.ours, b"ours") == (b"theirs", Outcome.SHARED)
    assert await two.theirs.ask(third, b"third") == (b"third", Outcome.MISS)
    # The first that is named is asked first.
    assert await two.ours.ask(world.ours, b"ours") == (b"theirs", Outcome.SHARED)
    await two.share(world.ours, third.org, world.theirs.org)
    assert await two.ours.ask(world.ours, b"ours") == (b"third", Outcome.SHARED)


@pytest.mark.parametrize("state_kind", [None])
async def test_a_value_that_was_moved_into_a_partners_place_is_not_given(two: Two) -> None:
    assert isinstance(two.store, MemoryStore)
    world = two.world
    third = owner((await world.do(create_organization, world.operator, "Third")).id)
    await two.theirs.ask(world.theirs, b"theirs")
    await two.ours.ask(third, b"of somebody else")
    (their_place, _), (_, (strange, _)) = two.store._entries.items()
    await two.store.put(their_place, strange, ttl=60)
    assert await two.ours.ask(world.ours, b"ours") == (b"ours", Outcome.MISS)


async def test_without_the_database_nothing_is_shared(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    await two.theirs.ask(two.world.theirs, b"theirs")
    assert await two.ours.ask(two.world.ours, b"ours") == (b"theirs", Outcome.SHARED)

    def away() -> Any:
        raise StorageUnavailable("away")

    monkeypatch.setattr(two.world.db, "read", away)
    assert await two.ours.ask(two.world.ours, b"ours") == (b"ours", Outcome.MISS)


async def test_of_those_who_ask_at_once_one_looks_at_the_partners_and_one_asks_when_they_have_nothing() -> None:
    class Counted(Named):
        reads = 0

        async def mutual(self, org: str) -> tuple[str, ...]:
            self.reads += 1
            await asyncio.sleep(0)
            return await super().mutual(org)

    clock, named, seen = HandClock(), Counted(A=("B",), B=("A",)), list[Outcome]()
    store = MemoryStore(clock, Bounds())
    inner = Cache("t", store, clock, watch=lambda _, outcome: seen.append(outcome), holder="r", lease_seconds=5)
    cache = SealedCache(inner, Keys(), clock, named)  # type: ignore[arg-type]

    async def together(org: str, value: bytes) -> set[bytes]:
        async def compute() -> Computed:
            return Computed(value)

        asking = (cache.get_or_compute(org, KEY, TTL, compute, share=True) for _ in range(4))
        return {found.value for found in await asyncio.gather(*asking)}

    assert await together("B", b"theirs") == {b"theirs"}
    assert await together("A", b"ours") == {b"theirs"}
    assert named.reads == 2
    assert seen == [Outcome.MISS, *[Outcome.JOINED] * 3, Outcome.SHARED, *[Outcome.JOINED] * 3]
    assert not store._claims


# What it costs others ---------------------------------------------------------------------------------------------------


class Counting(MemoryStore):
    asked = 0

    async def get(self, key: str) -> bytes | None:
        self.asked += 1
        return await super().get(key)


async def test_who_names_nobody_asks_the_store_once_and_the_database_never() -> None:
    class Nobody(NoPartners):
        async def mutual(self, org: str) -> tuple[str, ...]:
            raise AssertionError("there is nobody to ask")

    clock = HandClock()
    store = Counting(clock, Bounds())
    replica = Replica(
        SealedCache(Cache("t", store, clock), Keys(), clock, Nobody()),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
    )
    assert await replica.ask(owner("org_1"), b"v") == (b"v", Outcome.MISS)
    assert await replica.ask(owner("org_1"), b"w") == (b"v", Outcome.HIT)
    assert store.asked == 2


# The consent itself ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.fixed_dictionaries({name: st.permutations(range(4)) for name in range(4)}),
    st.fixed_dictionaries({name: st.integers(0, 4) for name in range(4)}),
    st.sets(st.integers(0, 3), max_size=1),
)
async def test_partners_are_those_who_name_each_other_in_the_order_of_who_asks(
    world: World, order: dict[int, list[int]], most: dict[int, int], without: set[int]
) -> None:
    more = [owner((await world.do(create_organization, world.operator, name)).id) for name in ("Third", "Fourth")]
    everybody = [world.ours, world.theirs, *more]
    naming = {who: [other for other in order[who] if other != who][: most[who]] for who in order}
    for who, others in naming.items():
        change = {
            "cache_share_with": [everybody[other].org for other in others],
            "cache_answers": "off" if who in without else None,
        }
        await world.do(set_policies, everybody[who], change)
    partners = Partners(world.db, PolicyBook(world.db, world.clock))
    for who, others in naming.items():
        expected = [other for other in others if who in naming[other] and not {who, other} & without]
        assert await partners.mutual(everybody[who].org) == tuple(everybody[other].org for other in expected)
