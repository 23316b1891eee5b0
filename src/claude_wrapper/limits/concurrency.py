"""How many turns, processes and sessions a key, user, workspace and organisation has at the same time.

A place is a lease in the shared store with an expiry. `keep` renews this replica's leases; those of a replica that
died come free by themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
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
_MOST_PLANS = 10_000


@dataclass(frozen=True, slots=True)
class Place:
    """What is held; give it to `release`. `keys` empty: nothing limits it."""

    lease: str
    keys: tuple[str, ...]


FREE = Place("", ())


@dataclass(frozen=True, slots=True)
class _Plan:
    rules: OrgRules
    holds: tuple[tuple[Scope, Hold], ...]


class Concurrency:
    """Takes and gives back places."""

    def __init__(self, store: LeaseStore, guard: Guard, clock: Clock, ids: Ids, settings: LimitSettings) -> None:
        self._store = store
        self._guard = guard
        self._clock = clock
        self._settings = settings
        # Random once, counted then: an identifier per turn from the system's random source costs as much as the rest.
        self._replica = ids.new(LEASE)
        self._numbers = itertools.count(1)
        self._plans: dict[tuple[Subjects, Resource], _Plan] = {}
        self._held: dict[str, Place] = {}

    async def acquire(
        self,
        rules: OrgRules,
        subjects: Subjects,
        resource: Resource,
        headers: Callable[[], Mapping[str, str]] = dict,
    ) -> Place:
        """Take a place for `resource` under every limit that counts it, or none. Raises LimitReached, StoreGone.

        `headers` are asked for when they must go into a refusal.
        """
        found = self._holds(rules, subjects, resource)
        if not found:
            return FREE
        holds = [hold for _, hold in found]
        place = Place(f"{self._replica}.{next(self._numbers)}", tuple(hold.key for hold in holds))
        self._held[place.lease] = place  # before the question: an answer that is lost must not lose the place
        try:
            full = await self._guard.ask(
                "concurrency", self._settings.concurrency_without_store, partial(self._asked, holds, place.lease)
            )
        except BaseException:
            await self.release(place)
            raise
        if full is not None and full >= 0:
            self._held.pop(place.lease, None)
            scope, hold = found[full]
            self._guard.counts.count(self._guard.counts.refused, resource.value)
            raise count_reached(resource, scope, hold.capacity, headers())
        return place  # also when the store is away and the policy is open: `keep` takes the place when it is back

    def _holds(self, rules: OrgRules, subjects: Subjects, resource: Resource) -> tuple[tuple[Scope, Hold], ...]:
        plan = self._plans.get((subjects, resource))
        if plan is None or plan.rules is not rules:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            prefix = f"{self._settings.key_prefix}:{{{subjects.org}}}:c"
            plan = self._plans[subjects, resource] = _Plan(
                rules,
                tuple(
                    (scope, Hold(f"{prefix}:{scope}:{ident}:{resource}", capacity))
                    for scope, ident, own in rules.limits_of(subjects, self._settings)
                    if (capacity := own.count(resource)) is not None
                ),
            )
        return plan.holds

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
