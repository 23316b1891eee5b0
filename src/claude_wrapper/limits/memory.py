"""The hot counters in this process: one replica, nothing to install. Time is the monotonic clock's.

Every method runs without awaiting anything, so that it is atomic on the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from claude_wrapper.clock import Clock
from claude_wrapper.limits import budgets, gcra
from claude_wrapper.limits.gcra import Level, Rate
from claude_wrapper.limits.stores import Balance, Cap, Charge, Hold, Reserved, Spent, Stores, Taken

_SWEEP_AT = 4096
"""Entries before the first look for dead ones; then at every doubling, so that a sweep costs little per call."""


class MemoryRates:
    """Levels in a dict. A level that has drained is dropped at the next sweep."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._levels: dict[str, tuple[Level, Rate]] = {}
        self._sweep_at = _SWEEP_AT

    async def take(self, charges: Sequence[Charge]) -> Taken:
        now = self._clock.monotonic()
        used = [gcra.drain(self._level(charge.key), charge.rate, now) for charge in charges]
        for index, charge in enumerate(charges):
            if not gcra.admits(used[index], charge.rate, charge.cost):
                return Taken(index, tuple(used))
        for index, charge in enumerate(charges):
            if charge.commit:
                used[index] += charge.cost
                self._levels[charge.key] = (Level(used[index], now), charge.rate)
        self._sweep(now)
        return Taken(None, tuple(used))

    async def settle(self, charges: Sequence[Charge]) -> None:
        now = self._clock.monotonic()
        for charge in charges:
            level = gcra.settle(self._level(charge.key), charge.rate, charge.cost, now)
            self._levels[charge.key] = (level, charge.rate)

    def _level(self, key: str) -> Level | None:
        found = self._levels.get(key)
        return None if found is None else found[0]

    def _sweep(self, now: float) -> None:
        if len(self._levels) < self._sweep_at:
            return
        self._levels = {
            key: (level, rate) for key, (level, rate) in self._levels.items() if gcra.drain(level, rate, now) > 0
        }
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._levels))


class MemoryLeases:
    """Places with the time at which each comes free by itself."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._places: dict[str, dict[str, float]] = {}

    async def acquire(self, holds: Sequence[Hold], lease: str, ttl: float) -> int | None:
        now = self._clock.monotonic()
        for index, hold in enumerate(holds):
            places = self._living(hold.key, now)
            if lease not in places and len(places) >= hold.capacity:
                return index
        for hold in holds:
            self._places.setdefault(hold.key, {})[lease] = now + ttl
        return None

    async def renew(self, leases: Sequence[tuple[str, Sequence[str]]], ttl: float) -> None:
        expiry = self._clock.monotonic() + ttl
        for lease, keys in leases:
            for key in keys:
                self._places.setdefault(key, {})[lease] = expiry

    async def release(self, keys: Sequence[str], lease: str) -> None:
        for key in keys:
            places = self._places.get(key)
            if places is not None:
                places.pop(lease, None)
                if not places:
                    del self._places[key]

    async def held(self, key: str) -> int:
        return len(self._living(key, self._clock.monotonic()))

    def _living(self, key: str, now: float) -> dict[str, float]:
        places = self._places.get(key)
        if places is None:
            return {}
        for lease in [lease for lease, expiry in places.items() if expiry <= now]:
            del places[lease]
        return places


@dataclass(slots=True)
class _Account:
    spent: int
    forget_at: float
    reserved: int = 0
    open: dict[str, tuple[int, float]] = field(default_factory=dict)  # reservation → (amount still reserved, expiry)

    def expire(self, now: float) -> None:
        # Kept with amount 0: the call may still end, and then it must count.
        for reservation, (amount, expiry) in self.open.items():
            if amount and expiry <= now:
                self.reserved -= amount
                self.open[reservation] = (0, expiry)


class MemorySpend:
    """Accounts per budget window."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._sweep_at = _SWEEP_AT

    async def reserve(self, caps: Sequence[Cap], reservation: str, amount: int, ttl: float) -> Reserved:
        now = self._clock.monotonic()
        accounts = [self._account(cap.key, now) for cap in caps]
        missing = tuple(index for index, account in enumerate(accounts) if account is None)
        known = [account for account in accounts if account is not None]
        for account in known:
            account.expire(now)
        balances = tuple(Balance(account.spent, account.reserved) for account in known)
        if missing:
            return Reserved(None, missing, ())
        for index, (cap, account) in enumerate(zip(caps, known, strict=True)):
            fits = budgets.admits(account.spent, account.reserved, amount, cap.cap)
            if cap.enforce and reservation not in account.open and not fits:
                return Reserved(index, (), balances)
        for account in known:
            if reservation not in account.open:
                account.open[reservation] = (amount, now + ttl)
                account.reserved += amount
        return Reserved(None, (), balances)

    async def settle(self, keys: Sequence[str], reservation: str, cost: int) -> tuple[Spent, ...]:
        now = self._clock.monotonic()
        return tuple(self._settle(self._account(key, now), reservation, cost) for key in keys)

    async def open(self, key: str, spent: int, ttl: float) -> None:
        now = self._clock.monotonic()
        if self._account(key, now) is None:
            self._sweep(now)
            self._accounts[key] = _Account(spent, now + ttl)

    async def raise_to(self, key: str, spent: int, ttl: float) -> None:
        now = self._clock.monotonic()
        account = self._account(key, now)
        if account is not None:
            account.spent = max(account.spent, spent)
            account.forget_at = now + ttl

    async def balances(self, keys: Sequence[str]) -> tuple[Balance | None, ...]:
        now = self._clock.monotonic()
        found: list[Balance | None] = []
        for key in keys:
            account = self._account(key, now)
            if account is not None:
                account.expire(now)
            found.append(None if account is None else Balance(account.spent, account.reserved))
        return tuple(found)

    def _settle(self, account: _Account | None, reservation: str, cost: int) -> Spent:
        if account is None or reservation not in account.open:
            spent = 0 if account is None else account.spent
            return Spent(spent, spent)
        amount, _ = account.open.pop(reservation)
        account.reserved -= amount
        before = account.spent
        account.spent += cost
        return Spent(before, account.spent)

    def _account(self, key: str, now: float) -> _Account | None:
        account = self._accounts.get(key)
        if account is not None and account.forget_at <= now:
            del self._accounts[key]
            return None
        return account

    def _sweep(self, now: float) -> None:
        if len(self._accounts) < self._sweep_at:
            return
        self._accounts = {key: account for key, account in self._accounts.items() if account.forget_at > now}
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._accounts))


def memory_stores(clock: Clock) -> Stores:
    """All three, in this process."""
    return Stores(MemoryRates(clock), MemoryLeases(clock), MemorySpend(clock))
