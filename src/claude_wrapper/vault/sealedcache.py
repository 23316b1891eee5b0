"""A cache whose values are sealed with their organisation's data key, and whose places only that organisation can name.

Whoever reads the store sees how many values an organisation keeps, how large and how old they are, and nothing else:
a place is a keyed fingerprint of what was asked. An organisation that was erased has no data key any more, so what is
left of it in a store cannot be opened.

Organisations that name each other share what their callers mark with `share`: at a miss the server looks into the
partner's place and opens its value with the partner's key. No copy is made, so a withdrawal, and the partner's end, hold
from the next look-up on. A value says whom its organisation named when it was kept: only they are ever given it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import msgspec
import structlog

from claude_wrapper.clock import Clock
from claude_wrapper.errors import VaultSealed
from claude_wrapper.storage.cache import Cache, Computed, Found, Outcome
from claude_wrapper.vault.envelope import DataKeys
from claude_wrapper.vault.orgkeys import OrgKeys

log = structlog.get_logger(__name__)

_TABLE: Final = "cache"
_FORM: Final = "2"
"""Part of every place: change it when the form of entries changes."""


class Partners(Protocol):
    """Who shares with whom (`tenancy.partners`)."""

    async def named(self, org: str) -> tuple[str, ...]:
        """Whom an organisation names, as it is remembered."""
        ...

    async def mutual(self, org: str) -> tuple[str, ...]:
        """Whom it names and who name it, in the order of asking, as it is now."""
        ...


class NoPartners:
    """Nobody shares."""

    async def named(self, org: str) -> tuple[str, ...]:
        return ()

    async def mutual(self, org: str) -> tuple[str, ...]:
        return ()


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """What is sealed."""

    value: bytes
    kept_at: float
    """Seconds since 1970."""
    partners: tuple[str, ...] = ()
    """Who may be given it: whom its organisation named when it was kept."""


_ENTRY: Final = msgspec.msgpack.Decoder(Entry)


class SealedCache:
    """One named cache of all organisations. `key` is what `storage.cache.cache_key` makes of what was asked."""

    def __init__(self, cache: Cache, keys: OrgKeys, clock: Clock, partners: Partners | None = None) -> None:
        self._cache, self._keys, self._clock = cache, keys, clock
        self._partners = partners or NoPartners()

    @property
    def name(self) -> str:
        """The cache's name: part of every place, and a label in metrics."""
        return self._cache.name

    async def get(self, org: str, key: str) -> bytes | None:
        """The value, or None."""
        keys = await self._of(org)
        if keys is None:
            return None
        place = _place(keys, key)
        sealed = await self._cache.get(place)
        entry = None if sealed is None else await self._opened(org, sealed, place)
        return None if entry is None else entry.value

    async def put(self, org: str, key: str, value: bytes, ttl: float) -> bool:
        """Keep for `ttl` seconds; whether it is kept."""
        keys = await self._of(org)
        if keys is None or ttl <= 0:
            return False
        place = _place(keys, key)
        return await self._cache.put(place, self._sealed(keys, place, value), ttl)

    async def delete(self, org: str, key: str) -> bool:
        """Forget; whether there was something."""
        keys = await self._of(org)
        return keys is not None and await self._cache.delete(_place(keys, key))

    async def get_or_compute(
        self,
        org: str,
        key: str,
        ttl: float,
        compute: Callable[[], Awaitable[Computed]],
        *,
        refresh: bool = False,
        share: bool = False,
    ) -> Found:
        """As `Cache.get_or_compute`, for one organisation. A value that does not open is computed again.

        With `share` a partner's value will do where there is none of one's own, if it is younger than `ttl`, and what is
        computed may be given to partners.
        """
        keys = await self._of(org)
        if keys is None:
            return Found((await compute()).value, Outcome.ERROR)
        place = _place(keys, key)

        async def sealed() -> Computed:
            named = await self._partners.named(org) if share else ()
            theirs = await self._of_partners(org, key, ttl) if named and not refresh else None
            if theirs is not None:
                return Computed(self._sealed(keys, place, theirs), keep=False, shared=True)
            computed = await compute()
            return Computed(self._sealed(keys, place, computed.value, named), computed.keep)

        found = await self._cache.get_or_compute(place, ttl, sealed, refresh=refresh)
        entry = await self._opened(org, found.value, place)
        if entry is None:
            again = await self._cache.get_or_compute(place, ttl, sealed, refresh=True)
            found = Found(again.value, Outcome.ERROR)
            entry = _ENTRY.decode(keys.open(again.value, table=_TABLE, record=place, field=self.name))
        return Found(entry.value, found.outcome)

    async def _of_partners(self, org: str, key: str, ttl: float) -> bytes | None:
        """The value of the first partner that has one and may give it."""
        for partner in await self._partners.mutual(org):
            try:
                keys = await self._keys.present(partner)
            except VaultSealed as error:
                log.warning("cache.no_data_key", cache=self.name, org=partner, reason=error.message)
                continue
            if keys is None:
                continue
            place = _place(keys, key)
            sealed = await self._cache.peek(place)
            entry = None if sealed is None else await self._opened(partner, sealed, place)
            if entry is not None and org in entry.partners and self._now() - entry.kept_at < ttl:
                return entry.value
        return None

    async def _of(self, org: str) -> DataKeys | None:
        try:
            return await self._keys.of(org)
        except VaultSealed as error:
            log.warning("cache.no_data_key", cache=self.name, org=org, reason=error.message)
            return None

    def _sealed(self, keys: DataKeys, place: str, value: bytes, partners: tuple[str, ...] = ()) -> bytes:
        entry = msgspec.msgpack.encode(Entry(value, self._now(), partners))
        return keys.seal(entry, table=_TABLE, record=place, field=self.name)

    async def _opened(self, org: str, sealed: bytes, place: str) -> Entry | None:
        """The entry; None if it does not open (another key version, damage, a value that stood elsewhere)."""
        try:
            keys = await self._keys.present(org, opening=sealed)  # another replica may have made a newer key
            if keys is None:
                return None  # erased meanwhile
            return _ENTRY.decode(keys.open(sealed, table=_TABLE, record=place, field=self.name))
        except VaultSealed as error:
            log.warning("cache.unreadable_value", cache=self.name, org=org, reason=error.message)
            return None

    def _now(self) -> float:
        return self._clock.now().timestamp()


def _place(keys: DataKeys, key: str) -> str:
    return f"{keys.org}:{keys.fingerprint(_FORM + key)}"
