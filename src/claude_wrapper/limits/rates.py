"""Requests and tokens per minute (hour, day) of a key, user, workspace and organisation, asked in one round trip.

Requests are charged when a request is admitted. Tokens are only looked at then (has an earlier call left a debt?):
they are charged per upstream call, estimate first, what was really used after. As upstream does, input tokens are the
uncached ones and those written to the cache; tokens read from the cache are free of this limit.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from claude_wrapper.clock import Clock
from claude_wrapper.limits import gcra
from claude_wrapper.limits.gcra import Rate
from claude_wrapper.limits.guard import Guard
from claude_wrapper.limits.refusals import rate_reached
from claude_wrapper.limits.rules import OrgRules
from claude_wrapper.limits.settings import LimitSettings
from claude_wrapper.limits.stores import Charge, RateStore
from claude_wrapper.limits.values import RATES, Resource, Scope, Subjects
from claude_wrapper.wire.usage import Usage

_MOST_PLANS: Final = 10_000
_FAMILY: Final = {
    Resource.REQUESTS: "requests",
    Resource.INPUT_TOKENS: "input-tokens",
    Resource.OUTPUT_TOKENS: "output-tokens",
}


@dataclass(frozen=True, slots=True)
class Limit:
    """One rate of one subject, and where its level is kept."""

    resource: Resource
    scope: Scope
    rate: Rate
    key: str


@dataclass(frozen=True, slots=True)
class _Plan:
    rules: OrgRules
    limits: tuple[Limit, ...]
    door: tuple[Charge, ...]
    """What `admit` asks. One token is asked for, not charged: an empty bucket refuses before a process is claimed."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What is used of a limit."""

    limit: Limit
    used: float


NOTHING: Final[tuple[Reading, ...]] = ()


def counted_input(usage: Usage) -> int:
    """Tokens that count against `input_tokens`."""
    return usage.input_tokens + usage.cache_write_5m_tokens + usage.cache_write_1h_tokens


def headers(readings: Sequence[Reading], now: datetime) -> dict[str, str]:
    """`anthropic-ratelimit-{requests,input-tokens,output-tokens,tokens}-{limit,remaining,reset}`. Pure.

    Of several limits on the same thing the one with the least left is told; `tokens` repeats the tighter of the two
    token limits. `reset` is when nothing will be used any more, RFC 3339 in UTC.
    """
    told: dict[str, tuple[float, Reading]] = {}
    for reading in readings:
        share = 1 - reading.used / reading.limit.rate.capacity
        families = [_FAMILY[reading.limit.resource]]
        if reading.limit.resource is not Resource.REQUESTS:
            families.append("tokens")
        for family in families:
            if family not in told or share < told[family][0]:
                told[family] = (share, reading)
    found: dict[str, str] = {}
    for family, (_, reading) in told.items():
        standing = gcra.standing(reading.used, reading.limit.rate, 0, allowed=True)
        reset = now + timedelta(seconds=standing.reset_after)
        found[f"anthropic-ratelimit-{family}-limit"] = str(reading.limit.rate.capacity)
        found[f"anthropic-ratelimit-{family}-remaining"] = str(standing.remaining)
        found[f"anthropic-ratelimit-{family}-reset"] = (
            reset.isoformat(timespec="seconds")[:19] + "Z"
        )  # strftime takes ten times as long
    return found


class RateLimits:
    """Asks the store about everything that limits a request, and gives refusals their names."""

    def __init__(self, store: RateStore, guard: Guard, clock: Clock, settings: LimitSettings) -> None:
        self._store = store
        self._guard = guard
        self._clock = clock
        self._settings = settings
        self._plans: dict[Subjects, _Plan] = {}

    async def admit(self, rules: OrgRules, subjects: Subjects) -> tuple[Reading, ...]:
        """Charge one request, and see that no token limit is in debt. Raises LimitReached, or StoreGone if closed."""
        plan = self._planned(rules, subjects)
        if not plan.limits:
            return NOTHING
        return await self._take(plan.limits, plan.door)

    async def give_back(self, readings: Sequence[Reading]) -> None:
        """Undo the request that `admit` charged: a later check refused it."""
        charges = [
            Charge(reading.limit.key, reading.limit.rate, -1.0)
            for reading in readings
            if reading.limit.resource is Resource.REQUESTS
        ]
        await self._settle(charges)

    async def reserve_tokens(self, rules: OrgRules, subjects: Subjects, estimate: Usage) -> TokenReservation:
        """Charge what a call may use, before it is made. Raises LimitReached, or StoreGone if closed."""
        limits = tuple(limit for limit in self.limits_of(rules, subjects) if limit.resource is not Resource.REQUESTS)
        if limits:
            charges = [Charge(limit.key, limit.rate, float(_tokens(limit, estimate))) for limit in limits]
            if not await self._take(limits, charges):
                limits = ()  # the store was away and the policy is open: nothing was charged
        return TokenReservation(limits, estimate, self._settle)

    def limits_of(self, rules: OrgRules, subjects: Subjects) -> tuple[Limit, ...]:
        """Every rate that a request of these subjects must pass, narrowest scope first."""
        return self._planned(rules, subjects).limits

    def _planned(self, rules: OrgRules, subjects: Subjects) -> _Plan:
        plan = self._plans.get(subjects)
        if plan is None or plan.rules is not rules:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            limits = self._made(rules, subjects)
            door = tuple(
                Charge(limit.key, limit.rate, 1.0, commit=limit.resource is Resource.REQUESTS) for limit in limits
            )
            plan = self._plans[subjects] = _Plan(rules, limits, door)
        return plan

    def _made(self, rules: OrgRules, subjects: Subjects) -> tuple[Limit, ...]:
        prefix = f"{self._settings.key_prefix}:{{{subjects.org}}}:r"
        return tuple(
            Limit(resource, scope, rate, f"{prefix}:{scope}:{ident}:{resource}:{rate.period:g}")
            for scope, ident, own in rules.limits_of(subjects, self._settings)
            for resource in RATES
            for rate in own.rates(resource)
        )

    async def _take(self, limits: Sequence[Limit], charges: Sequence[Charge]) -> tuple[Reading, ...]:
        taken = await self._guard.ask("rates", self._settings.rates_without_store, lambda: self._store.take(charges))
        if taken is None:
            return NOTHING
        readings = tuple(Reading(limit, used) for limit, used in zip(limits, taken.used, strict=True))
        if taken.refused is not None:
            limit, used = limits[taken.refused], taken.used[taken.refused]
            self._guard.counts.count(self._guard.counts.refused, limit.resource.value)
            standing = gcra.standing(used, limit.rate, charges[taken.refused].cost, allowed=False)
            told = headers(readings, self._clock.now())
            raise rate_reached(limit.resource, limit.scope, limit.rate, standing.retry_after, told)
        return readings

    async def _settle(self, charges: Sequence[Charge]) -> None:
        # The store being away loses a correction: the bucket drains anyway.
        if charges:
            await self._guard.attempt(lambda: self._store.settle(charges))


def _tokens(limit: Limit, usage: Usage) -> int:
    return counted_input(usage) if limit.resource is Resource.INPUT_TOKENS else usage.output_tokens


class TokenReservation:
    """Tokens charged for one call; corrected once."""

    __slots__ = ("_estimate", "_limits", "_settle")

    def __init__(
        self, limits: Sequence[Limit], estimate: Usage, settle: Callable[[Sequence[Charge]], Awaitable[None]]
    ) -> None:
        self._limits = limits
        self._estimate = estimate
        self._settle = settle

    async def settle(self, usage: Usage) -> None:
        """Correct the charge to what was used. A second call does nothing."""
        limits, self._limits = self._limits, ()
        charges = [
            Charge(limit.key, limit.rate, float(difference))
            for limit in limits
            if (difference := _tokens(limit, usage) - _tokens(limit, self._estimate))
        ]
        await self._settle(charges)
