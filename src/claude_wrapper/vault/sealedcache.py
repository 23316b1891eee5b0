"""A cache whose values are sealed with their organisation's data key, and whose places only that organisation can name.

Whoever reads the store sees how many values an organisation keeps, how large and how old they are, and nothing else:
a place is a keyed fingerprint of what was asked. An organisation that was erased has no data key any more, so what is
left of it in a store cannot be opened.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from claude_wrapper.errors import VaultSealed
from claude_wrapper.storage.cache import Cache, Computed, Found, Outcome
from claude_wrapper.vault.envelope import DataKeys
from claude_wrapper.vault.orgkeys import OrgKeys

log = structlog.get_logger(__name__)

_TABLE: Final = "cache"


class SealedCache:
    """One named cache of all organisations. `key` is what `storage.cache.cache_key` makes of what was asked."""

    def __init__(self, cache: Cache, keys: OrgKeys) -> None:
        self._cache, self._keys = cache, keys

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
        return None if sealed is None else await self._opened(keys, sealed, place)

    async def put(self, org: str, key: str, value: bytes, ttl: float) -> bool:
        """Keep for `ttl` seconds; whether it is kept."""
        keys = await self._of(org)
        if keys is None or ttl <= 0:
            return False
        place = _place(keys, key)
        return await self._cache.put(place, keys.seal(value, table=_TABLE, record=place, field=self.name), ttl)

    async def delete(self, org: str, key: str) -> bool:
        """Forget; whether there was something."""
        keys = await self._of(org)
        return keys is not None and await self._cache.delete(_place(keys, key))

    async def get_or_compute(
        self, org: str, key: str, ttl: float, compute: Callable[[], Awaitable[Computed]], *, refresh: bool = False
    ) -> Found:
        """As `Cache.get_or_compute`, for one organisation. A value that does not open is computed again."""
        keys = await self._of(org)
        if keys is None:
            return Found((await compute()).value, Outcome.ERROR)
        place = _place(keys, key)

        async def sealed() -> Computed:
            computed = await compute()
            value = keys.seal(computed.value, table=_TABLE, record=place, field=self.name)
            return Computed(value, computed.keep)

        found = await self._cache.get_or_compute(place, ttl, sealed, refresh=refresh)
        value = await self._opened(keys, found.value, place)
        if value is None:
            again = await self._cache.get_or_compute(place, ttl, sealed, refresh=True)
            found = Found(again.value, Outcome.ERROR)
            value = keys.open(again.value, table=_TABLE, record=place, field=self.name)
        return Found(value, found.outcome)

    async def _of(self, org: str) -> DataKeys | None:
        try:
            return await self._keys.of(org)
        except VaultSealed as error:
            log.warning("cache.no_data_key", cache=self.name, org=org, reason=error.message)
            return None

    async def _opened(self, keys: DataKeys, sealed: bytes, place: str) -> bytes | None:
        """The value; None if it does not open (another key version, damage, a value that stood elsewhere)."""
        try:
            keys = await self._keys.of(keys.org, opening=sealed)  # another replica may have made a newer key
            return keys.open(sealed, table=_TABLE, record=place, field=self.name)
        except VaultSealed as error:
            log.warning("cache.unreadable_value", cache=self.name, org=keys.org, reason=error.message)
            return None


def _place(keys: DataKeys, key: str) -> str:
    return f"{keys.org}:{keys.fingerprint(key)}"
