"""How many turns, processes and sessions a key, user, workspace and organisation has at the same time.

A place is a lease in the shared store with an expiry. `keep` renews this replica's leases; those of a replica that
died come free by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from claude_wrapper.clock import Clock
from claude_wrapper.ids import Ids
from claude_wrapper.limits.guard import Guard
from claude_wrapper.limits.refusals import count_reached
from claude_wrapper.limits.rules import OrgRules
from claude_wrapper.limits.settings import LimitSettings
from claude_wrapper.limits.stores import Hold, LeaseStore
from claude_wrapper.limits.values import Resource, Scope, Subjects

LEASE = "lease"


@dataclass(frozen=True, slots=True)
class Place:
    """What is held; give it to `release`. `keys` empty: nothing limits it."""

    lease: str
    keys: tuple[str, ...]


FREE = Place("", ())


class Concurrency:
    """Takes and gives back places."""

    def __init__(self, store: LeaseStore, guard: Guard, clock: Clock, ids: Ids, settings: LimitSettings) -> None:
        self._store = store
        self._guard = guard
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._held: dict[str, Place] = {}

    async def acquire(
        self, rules: OrgRules, subjects: Subjects, resource: Resource, headers: Mapping[str, str] | None = None
    ) -> Place:
        """Take a place for `resource` under every limit that counts it, or none. Raises LimitReached, StoreGone.

        `headers` go into the refusal.
        """
        found: list[tuple[Scope, Hold]] = []
        for scope, ident, own in rules.limits_of(subjects, self._settings):
            capacity = own.count(resource)
            if capacity is not None:
                key = f"{self._settings.key_prefix}:{{{subjects.org}}}:c:{scope}:{ident}:{resource}"
                found.append((scope, Hold(key, capacity)))
        if not found:
            return FREE
        holds = [hold for _, hold in found]
        place = Place(self._ids.new(LEASE), tuple(hold.key for hold in holds))
        self._held[place.lease] = place  # before the question: an answer that is lost must not lose the place
        try:
            full = await self._guard.ask(
                "concurrency",
                self._settings.concurrency_without_store,
                lambda: self._asked(holds, place.lease),
            )
        except BaseException:
            await self.release(place)
            raise
        if full is None:  # the store is away and the policy is open: `keep` will take the place when it is back
            return place
        if full >= 0:
            self._held.pop(place.lease, None)
            scope, hold = found[full]
            self._guard.counts.count(self._guard.counts.refused, resource.value)
            raise count_reached(resource, scope, hold.capacity, headers or {})
        return place

    async def release(self, place: Place) -> None:
        """Give a place back. Never raises for a store that is away: the lease expires by itself."""
        if self._held.pop(place.lease, None) is not None:
            await self._guard.attempt(lambda: self._store.release(place.keys, place.lease))

    @property
    def held(self) -> int:
        """Places that this replica holds."""
        return len(self._held)

    async def renew(self) -> None:
        """Extend all places of this replica once."""
        leases = list(self._held.values())
        if not leases:
            return
        questions = [(place.lease, place.keys) for place in leases]
        await self._guard.attempt(lambda: self._store.renew(questions, self._settings.lease_seconds))
        for place in leases:
            if place.lease not in self._held:  # given back meanwhile, and then revived by this renewal
                await self._guard.attempt(partial(self._store.release, place.keys, place.lease))

    async def keep(self) -> None:
        """Renew for ever; the composition root runs it as a task."""
        while True:
            await self._clock.sleep(self._settings.lease_seconds / 3)
            await self.renew()

    async def _asked(self, holds: list[Hold], lease: str) -> int:
        """Index of the first full hold, -1 if the places were taken."""
        full = await self._store.acquire(holds, lease, self._settings.lease_seconds)
        return -1 if full is None else full
