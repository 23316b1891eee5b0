"""Telling people that a share of a budget is reached: each share once per window and cap, across replicas and restarts.

A row in `budget_alerts` decides who tells: the insert that wins, then the update that claims the delivery. A delivery
that fails gives the claim back and is tried again by `redeliver`. A server that dies between claim and delivery has
told nobody: an alert comes at most once, and the row shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.limits import budgets
from claude_wrapper.limits.budgets import Alert, Budget, Window
from claude_wrapper.limits.settings import LimitCounts
from claude_wrapper.storage import Database, dialects
from claude_wrapper.storage.tables.limits import budget_alerts

_MOST_UNDELIVERED = 1000
"""Alerts kept for another try in this process; the rows in the database keep all."""


class AlertSink(Protocol):
    """Where alerts go: a webhook, a mail, a log. May raise: the alert is then tried again later."""

    async def raised(self, alert: Alert) -> None: ...


class AlertDesk:
    """Finds out which alerts are new, and delivers them."""

    def __init__(self, database: Database, sink: AlertSink, clock: Clock, counts: LimitCounts) -> None:
        self._database = database
        self._sink = sink
        self._clock = clock
        self._counts = counts
        self._undelivered: dict[tuple[Any, ...], Alert] = {}

    async def moved(self, budget: Budget, window: Window, before: int, after: int) -> None:
        """A budget's counter moved. Never raises for a database or a sink that is away: `redeliver` tries again."""
        for percent in budgets.crossed(budget.alert_percents, budget.cap_micros, before, after):
            await self._tell(Alert(budget, window, percent, after))

    async def redeliver(self) -> None:
        """Try again what could not be delivered."""
        for alert in list(self._undelivered.values()):
            await self._tell(alert)

    async def _tell(self, alert: Alert) -> None:
        key = _key(alert)
        try:
            claimed = await self._claim(alert)
            if claimed:
                await self._deliver(alert)
                self._counts.alerts[alert.percent] = self._counts.alerts.get(alert.percent, 0) + 1
            self._undelivered.pop(key, None)
        except Exception:  # noqa: BLE001 (whatever a sink raises: a bill is not worth a broken turn)
            self._counts.alerts_failed += 1
            if len(self._undelivered) < _MOST_UNDELIVERED:
                self._undelivered[key] = alert

    async def _deliver(self, alert: Alert) -> None:
        try:
            await self._sink.raised(alert)
        except BaseException:
            await self._unclaim(alert)
            raise

    # tenant-scope: alerts are raised by the server; the organisation comes from the budget
    async def _claim(self, alert: Alert) -> bool:
        async def work(tx: AsyncConnection) -> bool:
            now = self._clock.now()
            statement = dialects.insert_ignore(self._database.dialect, budget_alerts).values(
                budget_id=alert.budget.id,
                window_start=alert.window.start,
                percent=alert.percent,
                cap_micros=alert.budget.cap_micros,
                org_id=alert.budget.org,
                spent_micros=alert.spent_micros,
                raised_at=now,
            )
            await tx.execute(statement)
            claim = sa.update(budget_alerts).where(*_same(alert), budget_alerts.c.delivered_at.is_(None))
            claimed = await tx.execute(claim.values(delivered_at=now))
            return bool(claimed.rowcount == 1)

        try:
            return await self._database.run(work)
        except sa.exc.IntegrityError:  # the budget was deleted meanwhile: nobody wants to know
            return False

    # tenant-scope: alerts are raised by the server; the organisation comes from the budget
    async def _unclaim(self, alert: Alert) -> None:
        async def work(tx: AsyncConnection) -> None:
            await tx.execute(sa.update(budget_alerts).where(*_same(alert)).values(delivered_at=None))

        await self._database.run(work, idempotent=True)


def _key(alert: Alert) -> tuple[str, datetime, int, int]:
    return (alert.budget.id, alert.window.start, alert.percent, alert.budget.cap_micros)


def _same(alert: Alert) -> Sequence[sa.ColumnElement[bool]]:
    columns = (
        budget_alerts.c.budget_id,
        budget_alerts.c.window_start,
        budget_alerts.c.percent,
        budget_alerts.c.cap_micros,
    )
    return [column == value for column, value in zip(columns, _key(alert), strict=True)]
