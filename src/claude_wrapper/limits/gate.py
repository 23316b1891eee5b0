"""What the broker asks before each upstream call: are there tokens and money for it?"""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from claude_wrapper.clock import Clock
from claude_wrapper.limits.rates import RateLimits, TokenReservation
from claude_wrapper.limits.rules import RuleSource
from claude_wrapper.limits.spending import Spending, SpendReservation
from claude_wrapper.limits.values import Subjects
from claude_wrapper.wire.usage import Usage


class Bound(Protocol):
    """Who a slot works for: `broker.Binding`."""

    @property
    def org(self) -> str: ...
    @property
    def workspace(self) -> str | None: ...
    @property
    def key_id(self) -> str | None: ...
    @property
    def user(self) -> str | None: ...
    @property
    def session(self) -> str: ...


class Answered(Protocol):
    """What a call used: `broker.UpstreamCall`."""

    @property
    def model(self) -> str: ...
    @property
    def usage(self) -> Usage: ...
    @property
    def started_at(self) -> datetime: ...


class Pricer(Protocol):
    """What tokens cost: `usage.PriceBook`."""

    async def micros(self, org: str, model: str, usage: Usage, at: datetime) -> int:
        """Micro-dollars. Never raises for an unknown model: the dearest known price is taken."""
        ...


class Gate:
    """Implements `broker.Gate`."""

    def __init__(self, rules: RuleSource, rates: RateLimits, spending: Spending, pricer: Pricer, clock: Clock) -> None:
        self._rules = rules
        self._rates = rates
        self._spending = spending
        self._pricer = pricer
        self._clock = clock

    async def reserve(self, binding: Bound, turn: object, model: str, estimate: Usage) -> Reservation:
        """Hold tokens and money for one call, all or nothing.

        Raises LimitReached, BudgetReached, or StorageUnavailable where the counters are away and the policy is closed.
        """
        subjects = Subjects(binding.org, binding.workspace, binding.key_id, binding.user, binding.session)
        rules = await self._rules.rules(binding.org, binding.session)
        tokens = await self._rates.reserve_tokens(rules, subjects, estimate)
        try:
            amount = 0
            if rules.budgets:
                amount = await self._pricer.micros(binding.org, model, estimate, self._clock.now())
            money = await self._spending.reserve(rules, subjects, amount)
        except BaseException:
            await tokens.settle(_NOTHING)
            raise
        return Reservation(tokens, money, self._pricer, binding.org)


_NOTHING = Usage()


class Reservation:
    """Implements `broker.Reservation`: exactly one of `settle` and `cancel` counts, once."""

    __slots__ = ("_money", "_org", "_pricer", "_tokens")

    def __init__(self, tokens: TokenReservation, money: SpendReservation, pricer: Pricer, org: str) -> None:
        self._tokens = tokens
        self._money = money
        self._pricer = pricer
        self._org = org

    async def settle(self, call: Answered) -> None:
        """Replace the estimate by what the call used, at the prices of the moment when it began."""
        await self._tokens.settle(call.usage)
        if self._money.limited:
            await self._money.settle(await self._pricer.micros(self._org, call.model, call.usage, call.started_at))

    async def cancel(self) -> None:
        """Nothing was sent: give everything back."""
        await self._tokens.settle(_NOTHING)
        await self._money.settle(0)
