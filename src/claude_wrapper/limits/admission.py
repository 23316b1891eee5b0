"""May this request begin? Rate, concurrency and budget are asked in this order; the first that refuses is named.

What was taken by an earlier question is given back when a later one refuses. Limits are per scope and all must pass:
session, key, user, workspace, organisation, the narrowest first.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Final

from claude_wrapper.clock import Clock
from claude_wrapper.ids import Ids
from claude_wrapper.limits import rates as rate_limits
from claude_wrapper.limits.alerts import AlertDesk
from claude_wrapper.limits.concurrency import FREE, Concurrency, Place
from claude_wrapper.limits.gate import Gate, Pricer
from claude_wrapper.limits.guard import Guard
from claude_wrapper.limits.rates import RateLimits, Reading
from claude_wrapper.limits.rules import RuleSource
from claude_wrapper.limits.settings import LimitCounts, LimitSettings
from claude_wrapper.limits.spending import Spending, SpentReader, Warned
from claude_wrapper.limits.stores import Stores
from claude_wrapper.limits.values import Caller, Resource, Subjects

BUDGET_WARNING: Final = "x-budget-warning"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a request before it runs."""

    session: str | None = None
    turn: bool = True
    """Whether it runs a turn: then it takes one of the concurrent turns until the block ends."""


PLAIN: Final = Facts()


class Admitted:
    """`async with admission.admit(principal) as admitted:`; the place is held until the block ends."""

    __slots__ = ("_admission", "_facts", "_place", "_readings", "_subjects", "warnings")

    def __init__(self, admission: Admission, subjects: Subjects, facts: Facts) -> None:
        self._admission = admission
        self._subjects = subjects
        self._facts = facts
        self._place: Place = FREE
        self._readings: tuple[Reading, ...] = ()
        self.warnings: tuple[Warned, ...] = ()
        """Budgets that are passed and only warn."""

    @property
    def headers(self) -> dict[str, str]:
        """`anthropic-ratelimit-*` for the answer, and a warning if a budget is passed."""
        found = self._counted()
        if self.warnings:
            found[BUDGET_WARNING] = "; ".join(
                f"{warned.budget.scope} budget per {warned.budget.period} passed" for warned in self.warnings
            )
        return found

    async def __aenter__(self) -> Admitted:
        admission, subjects = self._admission, self._subjects
        rules = await admission.rules.rules(subjects.org, subjects.session)
        if not rules.limits and not rules.budgets and not admission.settings.any_default:
            admission.counts.admitted += 1
            return self
        self._readings = await admission.rates.admit(rules, subjects)
        try:
            if self._facts.turn:
                turns = Resource.CONCURRENT_TURNS
                self._place = await admission.concurrency.acquire(rules, subjects, turns, self._counted)
            self.warnings = await admission.spending.check(rules, subjects)
        except BaseException:
            await self._undo()
            raise
        admission.counts.admitted += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        place, self._place = self._place, FREE
        if place is not FREE:
            await self._admission.concurrency.release(place)

    def _counted(self) -> dict[str, str]:
        return rate_limits.headers(self._readings, self._admission.clock.now())

    async def _undo(self) -> None:
        place, self._place = self._place, FREE
        if place is not FREE:
            await self._admission.concurrency.release(place)
        await self._admission.rates.give_back(self._readings)


class Admission:
    """The one door. Also makes what else asks limits: the broker's `gate`, and `concurrency` for pool and sessions."""

    def __init__(
        self,
        rules: RuleSource,
        stores: Stores,
        ledger: SpentReader,
        pricer: Pricer,
        alerts: AlertDesk,
        *,
        clock: Clock,
        ids: Ids,
        settings: LimitSettings,
        counts: LimitCounts,
    ) -> None:
        guard = Guard(clock, settings, counts)
        self.rules = rules
        self.settings = settings
        self.clock = clock
        self.counts = counts
        self.rates = RateLimits(stores.rates, guard, clock, settings)
        self.concurrency = Concurrency(stores.leases, guard, clock, ids, settings)
        self.spending = Spending(stores.spend, ledger, alerts, guard=guard, clock=clock, ids=ids, settings=settings)
        self.gate = Gate(rules, self.rates, self.spending, pricer, clock)

    def admit(self, principal: Caller, facts: Facts = PLAIN) -> Admitted:
        """A context manager that admits or raises.

        Raises LimitReached (429; `.headers`, `.retry_after`, `details["limit"]`, `details["scope"]`), BudgetReached
        (402; `details["action"]`), or StorageUnavailable where the counters are away and the policy is closed.
        """
        return Admitted(self, Subjects.of(principal, facts.session), facts)
