"""A cached value is one organisation's: no other can name it, read it or plant it, and an erased one's cannot be opened."""

from __future__ import annotations

import pytest
from vault_doubles import Vault

from claude_wrapper.storage.cache import Bounds, Cache, Computed, MemoryStore, Outcome, cache_key
from claude_wrapper.vault.envelope import Unreadable
from claude_wrapper.vault.erasure import erase_vault
from claude_wrapper.vault.sealedcache import SealedCache
from tenants import World

pytestmark = pytest.mark.anyio

KEY = cache_key("POST", b"what was asked")
SECRET = b"the answer that only we paid for"


@pytest.fixture
def store(world: World) -> MemoryStore:
    return MemoryStore(world.clock, Bounds())


def sealed(store: MemoryStore, vault: Vault, name: str = "upstream") -> SealedCache:
    return SealedCache(Cache(name, store, vault.world.clock), vault.keys, vault.world.clock)


async def test_nothing_of_one_organisation_is_found_by_another_nor_seen_in_the_store(
    vault: Vault, store: MemoryStore
) -> None:
    cache, ours, theirs = sealed(store, vault), vault.world.ours.org, vault.world.theirs.org
    assert await cache.put(ours, KEY, SECRET, 60)
    assert await cache.get(ours, KEY) == SECRET
    assert await cache.get(theirs, KEY) is None
    assert await sealed(store, vault, "tool").get(ours, KEY) is None
    stored = repr(store._entries)
    assert KEY not in stored
    assert SECRET.decode() not in stored


async def test_a_value_that_is_moved_to_another_organisations_place_does_not_open_there(
    vault: Vault, store: MemoryStore
) -> None:
    """An attacker who can write into the store cannot make one tenant read what another was answered."""
    cache, ours, theirs = sealed(store, vault), vault.world.ours.org, vault.world.theirs.org
    await cache.put(ours, KEY, SECRET, 60)
    await cache.put(theirs, KEY, b"theirs", 60)
    our_place, their_place = store._entries
    await store.put(their_place, store._entries[our_place][0], ttl=60)
    assert await cache.get(theirs, KEY) is None

    async def compute() -> Computed:
        return Computed(b"asked again")

    found = await cache.get_or_compute(theirs, KEY, 60, compute)
    assert (found.value, found.outcome) == (b"asked again", Outcome.ERROR)
    assert await cache.get(theirs, KEY) == b"asked again"
    assert await cache.get(ours, KEY) == SECRET


async def test_what_an_erased_organisation_left_in_the_store_is_not_opened_any_more(
    vault: Vault, store: MemoryStore
) -> None:
    cache, ours = sealed(store, vault), vault.world.ours.org
    await cache.put(ours, KEY, SECRET, 60)
    (place,) = store._entries
    left = store._entries[place][0]
    async with vault.world.db.transaction() as tx:
        await erase_vault(tx, vault.world.ours)
    vault.keys.forget(ours)
    assert await cache.get(ours, KEY) is None
    with pytest.raises(Unreadable):
        (await vault.keys.of(ours)).open(left, table="cache", record=place, field="upstream")
