"""Ports to the hot counters, shared by all replicas: rates, leases and money. Adapters: `memory` and `redis`.

Every method that asks several keys is all or nothing, and one round trip. Keys carry the organisation in braces, so
that a Redis cluster keeps one organisation's keys on one node. All methods raise `StoreGone` when the store cannot be
reached; what that means (refuse or let through) is a policy above, per kind of limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.limits.gcra import Rate


class StoreGone(StorageUnavailable):
    """The shared counters cannot be reached."""


@dataclass(frozen=True, slots=True)
class Charge:
    """A cost on one rate. `commit` False only asks whether it would fit."""

    key: str
    rate: Rate
    cost: float
    commit: bool = True


@dataclass(frozen=True, slots=True)
class Taken:
    """Which charge refused (index of the first, None if none did), and what is used of each now."""

    refused: int | None
    used: tuple[float, ...]


class RateStore(Protocol):
    """Levels of rates."""

    async def take(self, charges: Sequence[Charge]) -> Taken:
        """Charge all, or none if one refuses."""
        ...

    async def settle(self, charges: Sequence[Charge]) -> None:
        """Correct earlier charges by `cost` (may be negative)."""
        ...


@dataclass(frozen=True, slots=True)
class Hold:
    """A place among `capacity` places."""

    key: str
    capacity: int


class LeaseStore(Protocol):
    """Who holds a place, each with an expiry, so that a dead replica's places come free."""

    async def acquire(self, holds: Sequence[Hold], lease: str, ttl: float) -> int | None:
        """Take a place under every key, or none: then the index of the first full one. Taking again renews."""
        ...

    async def renew(self, leases: Sequence[tuple[str, Sequence[str]]], ttl: float) -> None:
        """Extend `(lease, keys)`. A lease that has expired is taken again even above capacity: its holder lives."""
        ...

    async def release(self, keys: Sequence[str], lease: str) -> None:
        """Give the places back; unknown ones are ignored."""
        ...

    async def held(self, key: str) -> int:
        """Places held now."""
        ...


@dataclass(frozen=True, slots=True)
class Cap:
    """One budget's window as the store sees it: micro-dollars. `enforce` False counts but never refuses."""

    key: str
    cap: int
    enforce: bool


@dataclass(frozen=True, slots=True)
class Balance:
    """Micro-dollars spent, and reserved by calls in flight."""

    spent: int
    reserved: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """Answer to a reservation. Nothing was reserved if `refused` is an index or `missing` is not empty."""

    refused: int | None
    missing: tuple[int, ...]
    """Caps whose counter the store does not know (new window, lost data): `open` them and ask again."""
    balances: tuple[Balance, ...]


@dataclass(frozen=True, slots=True)
class Spent:
    """How a settlement moved one counter. Equal numbers: it had been settled before, or the counter is unknown."""

    before: int
    after: int


class SpendStore(Protocol):
    """Money: counters per budget window, with reservations that expire."""

    async def reserve(self, caps: Sequence[Cap], reservation: str, amount: int, ttl: float) -> Reserved:
        """Reserve `amount` under every cap, or under none. Asking again with the same id changes nothing.

        A cap lets `amount` in if spent + reserved + amount stays within it; or if nothing is reserved and something is
        left, so that the rest of a budget can be spent by one call at a time.
        """
        ...

    async def settle(self, keys: Sequence[str], reservation: str, cost: int) -> tuple[Spent, ...]:
        """Replace the reservation by what it cost, once: a second time moves nothing. An expired one still counts."""
        ...

    async def open(self, key: str, spent: int, ttl: float) -> None:
        """Begin a counter at `spent`, unless there is one. It is forgotten `ttl` seconds from now."""
        ...

    async def raise_to(self, key: str, spent: int, ttl: float) -> None:
        """Make a counter that exists at least `spent`, and forget it `ttl` seconds from now."""
        ...

    async def balances(self, keys: Sequence[str]) -> tuple[Balance | None, ...]:
        """The counters, None where unknown."""
        ...


@dataclass(frozen=True, slots=True)
class Stores:
    """The three kinds of hot counters, from one adapter: `memory_stores(clock)` or `redis_stores(client)`."""

    rates: RateStore
    leases: LeaseStore
    spend: SpendStore
