"""Two organisations with an owner each, an operator, and a clock that is moved by hand.

A test directory that wants the fixtures has `from tenants import hand_clock, world` in its
conftest (pytest finds imported fixtures).
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.storage import Database
from claude_wrapper.tenancy import orgs
from claude_wrapper.tenancy.audit import Origin, Scribe
from claude_wrapper.tenancy.keyformat import Pepper
from claude_wrapper.tenancy.principal import ActorKind, Principal, operator
from claude_wrapper.tenancy.scopes import Role, scopes_of

PEPPER = Pepper(b"a pepper for tests only")


@dataclass
class HandClock:
    """Time that stands still until it is moved."""

    wall: datetime = datetime(2026, 11, 20, 12, tzinfo=UTC)
    seconds: float = 1000.0

    def now(self) -> datetime:
        return self.wall

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.seconds += seconds


@dataclass
class CountingIds:
    """Identifiers in order: `org_0001`."""

    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def new(self, prefix: str) -> str:
        return f"{prefix}_{next(self.numbers):04d}"

    def uuid(self) -> str:
        return str(uuid.UUID(int=next(self.numbers)))


@dataclass
class World:
    """A database with two organisations, and who acts in them."""

    db: Database
    clock: HandClock
    scribe: Scribe
    operator: Principal
    ours: Principal
    theirs: Principal

    def as_role(self, role: Role, **changed: Any) -> Principal:
        """Somebody of our organisation with this role."""
        return replace(self.ours, role=role, scopes=scopes_of(role), **changed)

    async def do(self, function: Callable[..., Awaitable[Any]], principal: Principal, *args: Any, **kw: Any) -> Any:
        """Run a changing function in a transaction of its own."""
        async with self.db.transaction() as tx:
            return await function(tx, principal, self.scribe, *args, **kw)

    async def see(self, function: Callable[..., Awaitable[Any]], principal: Principal, *args: Any, **kw: Any) -> Any:
        """Run a reading function."""
        async with self.db.read() as tx:
            return await function(tx, principal, *args, **kw)


def owner(org: str) -> Principal:
    return Principal(org, None, ActorKind.USER, None, "user_owner", Role.OWNER, scopes_of(Role.OWNER))


@pytest.fixture
def hand_clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def world(database: Database, hand_clock: HandClock, anyio_backend: str) -> World:
    scribe = Scribe(hand_clock, CountingIds(), Origin("203.0.113.9", "tests", "req_1"))
    boss = operator(user_id="user_boss")

    async def create(tx: AsyncConnection, name: str) -> Principal:
        return owner((await orgs.create_organization(tx, boss, scribe, name)).id)

    async with database.transaction() as tx:
        ours, theirs = await create(tx, "Ours"), await create(tx, "Theirs")
    return World(database, hand_clock, scribe, boss, ours, theirs)
