"""The rows of the queue. Every change names the version that it was decided on: of two replicas one wins, the other
decides again on what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict, NotFound
from claude_wrapper.sessions.selfhosted import work as states
from claude_wrapper.sessions.selfhosted.work import Work
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.environments import environment_work as table
from claude_wrapper.tenancy.principal import Principal, owned

T = TypeVar("T")
_TRIES: Final = 5
_LOOKED_AT: Final = 20
_COLUMNS: Final = tuple(one.name for one in fields(Work))


async def insert(tx: AsyncConnection, principal: Principal, work: Work) -> None:
    """A new item; `principal` owns it."""
    await tx.execute(sa.insert(table).values(**{name: getattr(work, name) for name in _COLUMNS if name != "version"}))


async def get(tx: AsyncConnection, principal: Principal, environment: str, work_id: str) -> Work:
    """Raises NotFound."""
    query = sa.select(table).where(
        owned(principal, table), table.c.environment_id == environment, table.c.id == work_id
    )
    row = (await tx.execute(query)).first()
    if row is None:
        raise NotFound(f"environment {environment} has no work {work_id[:128]!r}")
    return _read(row)


async def change(
    tx: AsyncConnection,
    principal: Principal,
    environment: str,
    work_id: str,
    decide: Callable[[Work], tuple[Work, T]],
) -> tuple[Work, Work, T]:
    """Decide on the item as it is and write that, again as long as somebody else was faster: before, after, answer.

    Raises what `decide` raises, NotFound, and Conflict when others are always faster.
    """
    for _ in range(_TRIES):
        before = await get(tx, principal, environment, work_id)
        after, answer = decide(before)
        if after == before or await write(tx, principal, before, after):
            return before, after, answer
    raise Conflict(f"work {work_id} is changed by many at once; try again")


async def write(tx: AsyncConnection, principal: Principal, before: Work, after: Work) -> bool:
    """Put `after` in the place of `before`; False when the row is not `before` any more."""
    values = {name: getattr(after, name) for name in _COLUMNS if getattr(after, name) != getattr(before, name)}
    done = await tx.execute(
        sa.update(table)
        .where(owned(principal, table), table.c.id == before.id, table.c.version == before.version)
        .values(**values | {"version": before.version + 1})
    )
    return bool(done.rowcount)


async def waiting(
    tx: AsyncConnection, principal: Principal, environment: str, now: datetime, reclaim_ms: int
) -> list[Work]:
    """What a poll may hand out, oldest first; leases that have ended come with it, to be given up."""
    late = now - timedelta(milliseconds=reclaim_ms)
    queued = sa.and_(table.c.state == states.QUEUED, sa.or_(table.c.polled_at.is_(None), table.c.polled_at <= late))
    query = (
        sa.select(table)
        .where(owned(principal, table), table.c.environment_id == environment, sa.or_(queued, _ended(now)))
        .order_by(table.c.queued_at, table.c.id)
        .limit(_LOOKED_AT)
    )
    return [_read(row) for row in (await tx.execute(query)).all()]


async def settle(tx: AsyncConnection, principal: Principal, environment: str, now: datetime) -> None:
    """Give up the leases that have ended."""
    query = sa.select(table).where(owned(principal, table), table.c.environment_id == environment, _ended(now))
    for row in (await tx.execute(query.order_by(table.c.id))).all():  # in one order, or two replicas lock each other
        before = _read(row)
        await write(tx, principal, before, states.settled(before, now))


def _ended(now: datetime) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.state.in_(sorted(states.LEASED)), table.c.lease_expires_at <= now)


async def page_of(tx: AsyncConnection, principal: Principal, environment: str, page: PageRequest) -> Page[Work]:
    """Items, newest first."""
    query = sa.select(table).where(owned(principal, table), table.c.environment_id == environment)
    return await fetch_page(tx, query, (table.c.created_at, table.c.id), page, _read)


async def live_of(tx: AsyncConnection, principal: Principal, session: str) -> Sequence[Work]:
    """The items of a session that are not stopped: one, or none."""
    query = sa.select(table).where(
        owned(principal, table), table.c.session_id == session, table.c.state != states.STOPPED
    )
    return [_read(row) for row in (await tx.execute(query)).all()]


async def counts(tx: AsyncConnection, principal: Principal, environment: str) -> tuple[int, int, datetime | None]:
    """Queued items that nobody was given, those that were given and not acknowledged, and since when the oldest waits."""
    query = sa.select(
        sa.func.count(),
        sa.func.count(table.c.polled_at),
        sa.func.min(table.c.queued_at, type_=table.c.queued_at.type),
    ).where(owned(principal, table), table.c.environment_id == environment, table.c.state == states.QUEUED)
    total, pending, oldest = (await tx.execute(query)).one()
    return total - pending, pending, oldest


def _read(row: Any) -> Work:
    return Work(**{name: getattr(row, name) for name in _COLUMNS})
