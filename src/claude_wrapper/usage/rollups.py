"""Sums per hour, organisation, workspace, key, user and model, kept with the ledger in the same transaction.

Only rows that were really new are added, so a row that arrives twice counts once. `rebuild` computes the same from the
ledger itself: a repair after a hand has been in the database, and the proof in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.storage import dialects
from claude_wrapper.storage.tables.usage import COUNTERS, usage_calls, usage_hours
from claude_wrapper.usage.entries import HOUR_MS, Row

KEY: Final = ("org_id", "hour", "workspace_id", "key_id", "user_id", "model")
SUMS: Final = ("calls", "errors", "total_ms", *COUNTERS)


def is_error(status: int) -> bool:
    """Whether a call counts as an error."""
    return status >= 400


def summed(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows of the ledger as rows of the hourly table, in the order of their key: all writers lock in one order."""
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["org_id"], row["started_ms"] // HOUR_MS, *(row[name] for name in KEY[2:]))
        line = sums.get(key)
        if line is None:
            line = sums[key] = {**dict(zip(KEY, key, strict=True)), **dict.fromkeys(SUMS, 0)}
        line["calls"] += 1
        line["errors"] += is_error(row["status"])
        line["total_ms"] += row["total_ms"]
        for name in COUNTERS:
            line[name] += row[name]
    return [sums[key] for key in sorted(sums)]


def add(tx: sa.Connection, rows: Iterable[Row]) -> None:
    """Add new rows of the ledger to the sums."""
    lines = summed(rows)
    if not lines:
        return
    tx.execute(_addition(tx.dialect.name), lines)


@cache
def _addition(dialect: str) -> Any:
    changes: dict[str, Any] = {name: _plus(name) for name in SUMS}
    return dialects.upsert(dialect, usage_hours, KEY, changes)


def _plus(name: str) -> Any:
    return lambda new: usage_hours.c[name] + new[name]


# tenant-scope: sums are rebuilt over all organisations
async def rebuild(tx: AsyncConnection, first_hour: int, last_hour: int) -> None:
    """Compute the sums of the hours [first_hour, last_hour] again from the ledger."""
    hour = usage_calls.c.started_ms // sa.literal_column(str(HOUR_MS), sa.BigInteger)
    key = [hour if name == "hour" else usage_calls.c[name] for name in KEY]
    values: Mapping[str, sa.ColumnElement[Any]] = {
        "calls": sa.func.count(),
        "errors": sa.func.sum(sa.case((usage_calls.c.status >= 400, 1), else_=0)),
        **{name: sa.func.sum(usage_calls.c[name]) for name in ("total_ms", *COUNTERS)},
    }
    period = usage_calls.c.started_ms.between(first_hour * HOUR_MS, (last_hour + 1) * HOUR_MS - 1)
    source = sa.select(*key, *(values[name] for name in SUMS)).where(period).group_by(*key)
    await tx.execute(sa.delete(usage_hours).where(usage_hours.c.hour.between(first_hour, last_hour)))
    await tx.execute(sa.insert(usage_hours).from_select([*KEY, *SUMS], source))
