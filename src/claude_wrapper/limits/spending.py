"""Budgets at work: reserve before a call, settle after, against counters that all replicas share.

The counters are hot copies. The ledger is the truth: a counter that the store does not know is begun from it, and
`reconcile` raises counters that fell behind. Only the ledger's closed past is used for that (calls that began before
every reservation of today could still be open): a call that is in the ledger but not yet settled is never counted twice.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final, Protocol, TypeVar

from claude_wrapper.clock import Clock
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.ids import Ids
from claude_wrapper.limits import budgets
from claude_wrapper.limits.alerts import AlertDesk
from claude_wrapper.limits.budgets import Budget, Window
from claude_wrapper.limits.guard import Guard
from claude_wrapper.limits.refusals import budget_reached
from claude_wrapper.limits.rules import OrgRules
from claude_wrapper.limits.settings import LimitSettings
from claude_wrapper.limits.stores import Balance, Cap, Reserved, SpendStore, Spent, StoreGone
from claude_wrapper.limits.values import Subjects

T = TypeVar("T")

RESERVATION: Final = "rsv"
_LATE: Final = 86_400.0
"""Seconds that a counter outlives its window, so that calls that began in it can still be settled."""
_TOTAL_TTL: Final = 7 * 86_400.0
"""Seconds after which an unused counter without an end is forgotten; the ledger brings it back."""
_MOST_SEEN: Final = 100_000
_MOST_PENDING: Final = 10_000


_Settlement = tuple[tuple["Line", ...], str, int]


class SpentReader(Protocol):
    """What the ledger says: `usage.Reports`."""

    async def spent(self, org: str, scope: str, subject: str, start: datetime, end: datetime | None) -> int:
        """Micro-dollars of the calls that began in [start, end). Raises StorageUnavailable."""
        ...


@dataclass(frozen=True, slots=True)
class Line:
    """One budget in its present window, and where it is counted."""

    budget: Budget
    window: Window
    key: str

    @property
    def cap(self) -> Cap:
        return Cap(self.key, self.budget.cap_micros, self.budget.enforced)


@dataclass(frozen=True, slots=True)
class Warned:
    """A budget whose cap is passed while its action is to warn."""

    budget: Budget
    spent_micros: int


class Spending:
    """Asks all budgets that a call draws on, in one round trip."""

    def __init__(
        self,
        store: SpendStore,
        ledger: SpentReader,
        alerts: AlertDesk,
        *,
        guard: Guard,
        clock: Clock,
        ids: Ids,
        settings: LimitSettings,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._alerts = alerts
        self._guard = guard
        self._clock = clock
        # Random once, counted then: an identifier per call from the system's random source costs as much as the rest.
        self._replica = ids.new(RESERVATION)
        self._numbers = itertools.count(1)
        self._current: dict[str, Line] = {}
        self._settings = settings
        self._seen: dict[str, Line] = {}
        self._pending: deque[_Settlement] = deque(maxlen=_MOST_PENDING)
        self._doubtful: deque[_Settlement] = deque(maxlen=_MOST_PENDING)

    def lines(self, rules: OrgRules, subjects: Subjects) -> tuple[Line, ...]:
        """The budgets that a call now draws on."""
        found = rules.budgets_of(subjects)
        if not found:
            return ()
        now = self._clock.now()
        return tuple(self._line(budget, now) for budget in found)

    async def check(self, rules: OrgRules, subjects: Subjects) -> tuple[Warned, ...]:
        """See whether anything is left. Raises BudgetReached, or StoreGone if the counters are away and that is closed."""
        lines = self.lines(rules, subjects)
        if not lines:
            return ()
        balances = await self._ask(lambda: self._balances(lines))
        if balances is None:
            return ()
        warned: list[Warned] = []
        for line, balance in zip(lines, balances, strict=True):
            if balance.spent < line.budget.cap_micros:
                continue
            if line.budget.enforced:
                raise self._refused(line)
            warned.append(Warned(line.budget, balance.spent))
        return tuple(warned)

    async def reserve(self, rules: OrgRules, subjects: Subjects, amount: int) -> SpendReservation:
        """Hold `amount` micro-dollars in every budget, or in none. Raises as `check`."""
        lines = self.lines(rules, subjects)
        if not lines:
            return SpendReservation(self, (), "")
        reservation = f"{self._replica}.{next(self._numbers)}"
        answer = await self._ask(lambda: self._reserved(lines, reservation, amount))
        if answer is None:
            return SpendReservation(self, (), "")
        if answer.refused is not None:
            raise self._refused(lines[answer.refused])
        return SpendReservation(self, lines, reservation)

    async def settle(self, lines: tuple[Line, ...], reservation: str, cost: int) -> None:
        """Replace a reservation by its cost. Kept and tried again later while the store is away; raises nothing."""
        self._pending.append((lines, reservation, cost))
        await self._settle_pending()

    async def reconcile(self) -> None:
        """Settle what waits, raise counters to what the ledger says of the closed past, and redeliver alerts."""
        await self._settle_pending()
        now = self._clock.now()
        closed = now - timedelta(seconds=self._settings.reservation_seconds)
        closed = closed.replace(minute=0, second=0, microsecond=0)  # whole hours are already summed
        for key, line in list(self._seen.items()):
            window = line.window
            if window.end is not None and window.end + timedelta(seconds=_LATE) < now:
                del self._seen[key]
                if self._current.get(line.budget.id) is line:
                    del self._current[line.budget.id]
            elif closed > window.start:
                await self._raise(line, min(closed, window.end or closed))
        await self._alerts.redeliver()

    async def keep(self) -> None:
        """Reconcile for ever; the composition root runs it as a task."""
        while True:
            await self._clock.sleep(self._settings.reconcile_seconds)
            await self.reconcile()

    # inside ------------------------------------------------------------------------------------------------------------

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T | None:
        policy = self._settings.budgets_without_store
        try:
            return await self._guard.ask("budgets", policy, question)
        except StoreGone:
            raise
        except StorageUnavailable as error:  # the ledger, asked for a counter that the store does not know
            self._guard.decide("budgets", policy, error)
            return None

    async def _balances(self, lines: Sequence[Line]) -> list[Balance]:
        keys = [line.key for line in lines]
        found = await self._store.balances(keys)
        missing = [index for index, balance in enumerate(found) if balance is None]
        if missing:
            for index in missing:
                await self._begin(lines[index])
            found = await self._store.balances(keys)
        return [balance or Balance(0, 0) for balance in found]

    async def _reserved(self, lines: tuple[Line, ...], reservation: str, amount: int) -> Reserved:
        caps = [line.cap for line in lines]
        ttl = self._settings.reservation_seconds
        for _ in range(3):  # a counter may be evicted again between the two questions; not for ever
            try:
                answer = await self._store.reserve(caps, reservation, amount, ttl)
            except BaseException:
                # Cut before the answer came: the store may have reserved. Given back with the next settlement.
                self._doubtful.append((lines, reservation, 0))
                raise
            if not answer.missing:
                return answer
            for index in answer.missing:
                await self._begin(lines[index])
        raise StoreGone("the shared counters forget budgets as soon as they are written: is their memory full?")

    async def _begin(self, line: Line) -> None:
        spent = await self._spent(line, line.window.end)
        await self._store.open(line.key, spent, self._ttl(line))
        await self._alerts.moved(line.budget, line.window, 0, spent)

    async def _raise(self, line: Line, until: datetime) -> None:
        try:
            spent = await self._spent(line, until)
        except StorageUnavailable:
            return  # next time
        await self._guard.attempt(lambda: self._store.raise_to(line.key, spent, self._ttl(line)))
        await self._alerts.moved(line.budget, line.window, 0, spent)

    async def _spent(self, line: Line, until: datetime | None) -> int:
        budget = line.budget
        return await self._ledger.spent(budget.org, budget.scope.value, budget.subject, line.window.start, until)

    async def _settle_pending(self) -> None:
        await self._settle_all(self._pending)
        if not self._pending:
            await self._settle_all(self._doubtful)

    async def _settle_all(self, queue: deque[_Settlement]) -> None:
        for _ in range(len(queue)):
            if not queue:  # another task took the rest while this one waited
                return
            lines, reservation, cost = queue.popleft()
            keys = [line.key for line in lines]
            try:
                moves = await self._guard.attempt(partial(self._store.settle, keys, reservation, cost))
            except BaseException:
                queue.appendleft((lines, reservation, cost))
                raise
            if moves is None:
                queue.appendleft((lines, reservation, cost))
                return
            await self._moved(lines, moves)

    async def _moved(self, lines: Sequence[Line], moves: Sequence[Spent]) -> None:
        for line, move in zip(lines, moves, strict=True):
            if move.after > move.before:
                await self._alerts.moved(line.budget, line.window, move.before, move.after)

    def _line(self, budget: Budget, now: datetime) -> Line:
        current = self._current.get(budget.id)
        if current is not None and current.budget is budget and current.window.holds(now):
            return current
        window = budgets.window(budget.period, now)
        key = f"{self._settings.key_prefix}:{{{budget.org}}}:b:{budget.id}:{window.start:%Y%m%d}"
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()  # what is in use comes back with its next call
            self._current.clear()
        line = self._current[budget.id] = self._seen[key] = Line(budget, window, key)
        return line

    def _ttl(self, line: Line) -> float:
        left = line.window.seconds_left(self._clock.now())
        return _TOTAL_TTL if left is None else left + _LATE

    def _refused(self, line: Line) -> Exception:
        self._guard.counts.count(self._guard.counts.refused, "budget")
        return budget_reached(line.budget, line.window)


class SpendReservation:
    """Money held for one call; replaced by what the call cost, once."""

    __slots__ = ("_lines", "_reservation", "_spending")

    def __init__(self, spending: Spending, lines: tuple[Line, ...], reservation: str) -> None:
        self._spending = spending
        self._lines = lines
        self._reservation = reservation

    @property
    def limited(self) -> bool:
        """Whether any budget holds something for this call."""
        return bool(self._lines)

    async def settle(self, cost: int) -> None:
        """`cost` in micro-dollars; 0 gives everything back. A second call does nothing."""
        lines, self._lines = self._lines, ()
        if lines:
            await self._spending.settle(lines, self._reservation, cost)
