"""Copies closed hours of the ledger to a sink, each once, and again if rows came late."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import sqlalchemy as sa

from claude_wrapper.clock import Clock
from claude_wrapper.storage import Database, dialects
from claude_wrapper.storage.tables.usage import usage_calls, usage_exports, usage_hours
from claude_wrapper.usage.entries import HOUR_MS, Row, milliseconds
from claude_wrapper.usage.sinks import LedgerSink, Part

PIECE: Final = 50_000
"""Rows per part: about 15 MB in memory."""


@dataclass(frozen=True, slots=True)
class _Due:
    org: str
    hour: int
    calls: int


class Exporter:
    """One sink's copy of the ledger. One replica at a time should run it; two only write the same parts twice."""

    def __init__(
        self, database: Database, sink: LedgerSink, clock: Clock, *, look_back: timedelta = timedelta(days=35)
    ) -> None:
        """Hours older than `look_back` are never looked at again."""
        self._database = database
        self._sink = sink
        self._clock = clock
        self._look_back = look_back

    async def run(self) -> int:
        """Export every closed hour whose number of calls is not what was exported; how many hours that were.

        Raises what the sink or the database raises; what was exported before that stays exported.
        """
        done = 0
        for due in await self._due():
            index = 0
            async for rows in self._pieces(due):
                await self._sink.write(Part(due.org, due.hour, index), rows)
                index += 1
            await self._database.run(lambda tx, due=due: tx.execute(self._mark(due)), idempotent=True)  # type: ignore[misc]
            done += 1
        return done

    # tenant-scope: the operator's export goes over all organisations
    async def _due(self) -> list[_Due]:
        now = self._clock.now()
        this_hour = milliseconds(now) // HOUR_MS
        first = milliseconds(now - self._look_back) // HOUR_MS
        calls = sa.func.sum(usage_hours.c.calls)
        exported = usage_exports.c.calls
        statement = (
            sa.select(usage_hours.c.org_id, usage_hours.c.hour, calls)
            .outerjoin(
                usage_exports,
                sa.and_(
                    usage_exports.c.sink == self._sink.name,
                    usage_exports.c.org_id == usage_hours.c.org_id,
                    usage_exports.c.hour == usage_hours.c.hour,
                ),
            )
            .where(usage_hours.c.hour >= first, usage_hours.c.hour < this_hour)
            .group_by(usage_hours.c.org_id, usage_hours.c.hour, exported)
            .having(sa.func.coalesce(exported, 0) != calls)
            .order_by(usage_hours.c.hour, usage_hours.c.org_id)
        )
        async with self._database.read() as tx:
            return [_Due(org, hour, int(count)) for org, hour, count in (await tx.execute(statement)).all()]

    # tenant-scope: the operator's export goes over all organisations
    async def _pieces(self, due: _Due) -> AsyncIterator[Sequence[Row]]:
        """Rows in the order of their ids: a late row moves others, so all pieces are written again."""
        last = ""
        while True:
            statement = (
                sa.select(usage_calls)
                .where(
                    usage_calls.c.org_id == due.org,
                    usage_calls.c.started_ms >= due.hour * HOUR_MS,
                    usage_calls.c.started_ms < (due.hour + 1) * HOUR_MS,
                    usage_calls.c.id > last,
                )
                .order_by(usage_calls.c.id)
                .limit(PIECE)
            )
            async with self._database.read() as tx:
                rows: list[dict[str, Any]] = [dict(row) for row in (await tx.execute(statement)).mappings()]
            if rows:
                yield rows
                last = rows[-1]["id"]
            if len(rows) < PIECE:
                return

    def _mark(self, due: _Due) -> Any:
        changes = {"calls": lambda new: new.calls, "exported_at": lambda new: new.exported_at}
        statement = dialects.upsert(self._database.dialect, usage_exports, ("sink", "org_id", "hour"), changes)
        return statement.values(
            sink=self._sink.name, org_id=due.org, hour=due.hour, calls=due.calls, exported_at=self._clock.now()
        )
