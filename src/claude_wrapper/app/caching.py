"""The shared cache of one server: one store, one named and sealed cache for each purpose, and its metrics."""

from __future__ import annotations

from typing import Final

from claude_wrapper.broker.keeping import Caching
from claude_wrapper.clock import Clock
from claude_wrapper.config import Settings
from claude_wrapper.storage.cache import Bounds, Cache, CacheStore, MemoryStore, Outcome
from claude_wrapper.storage.cacheredis import RedisStore
from claude_wrapper.telemetry.metrics import Metrics
from claude_wrapper.tenancy.partners import Partners
from claude_wrapper.vault.orgkeys import OrgKeys
from claude_wrapper.vault.sealedcache import SealedCache

UPSTREAM: Final = "upstream"
TOOL: Final = "tool"
TOKEN_COUNT: Final = "token_count"  # noqa: S105 (a name)
MODELS: Final = "models"
"""The names: `telemetry.metrics.CACHES` lists them."""

_LEASE_SECONDS: Final = 10.0
"""How long a replica waits for what another one computes."""


class Caches:
    """Sealed caches by name. None of them exists when the setting `cache_bytes` is 0."""

    def __init__(self, settings: Settings, clock: Clock, keys: OrgKeys, partners: Partners, *, holder: str) -> None:
        """`holder` names this replica. Raises nothing: a store that cannot be reached is found out at the first use."""
        self._metrics: Metrics | None = None
        self._clock, self._keys, self._partners, self._holder = clock, keys, partners, holder
        self._count_seconds, self._models_seconds = settings.cache_count_seconds, settings.cache_models_seconds
        self._made: dict[str, SealedCache] = {}
        self._store: CacheStore | None = None
        self._shared = bool(settings.redis_url)
        if settings.cache_bytes:
            bounds = Bounds(settings.cache_bytes, settings.cache_entry_bytes)
            self._store = RedisStore(settings.redis_url, bounds) if settings.redis_url else MemoryStore(clock, bounds)

    def named(self, name: str) -> SealedCache | None:
        """The cache of this name; None when caching is off."""
        if self._store is None:
            return None
        if name not in self._made:
            cache = Cache(
                name,
                self._store,
                self._clock,
                watch=self._looked,
                holder=self._holder,
                lease_seconds=_LEASE_SECONDS if self._shared and name != UPSTREAM else 0.0,
            )
            self._made[name] = SealedCache(cache, self._keys, self._clock, self._partners)
        return self._made[name]

    def of_broker(self) -> Caching | None:
        """What the broker keeps; None when caching is off."""
        answers, counts, models = self.named(UPSTREAM), self.named(TOKEN_COUNT), self.named(MODELS)
        if answers is None or counts is None or models is None:
            return None
        return Caching(answers, counts, models, self._count_seconds, self._models_seconds)

    def follow(self, metrics: Metrics) -> None:
        """Count look-ups; show the size of a store in this process (Redis shows its own)."""
        self._metrics = metrics
        store = self._store
        if isinstance(store, MemoryStore):
            metrics.pull("cache", lambda: metrics.cache_bytes.set(store.held))

    def _looked(self, name: str, outcome: Outcome) -> None:
        if self._metrics is not None:
            self._metrics.cache_requests.inc(cache=name, outcome=outcome.value)

    async def close(self) -> None:
        """Let the store go."""
        if self._store is not None:
            await self._store.close()
