"""The rules of each organisation, read from the database and kept in memory for some seconds.

A change through `records` is announced on `CHANNEL`; whoever composes the server connects that to `forget`. While the
database is away the last known rules stay in force (counted): a limit must not vanish with its row.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import InvalidRequest, StorageUnavailable
from claude_wrapper.limits.budgets import Action, Budget, Period
from claude_wrapper.limits.rules import OrgRules, Subject
from claude_wrapper.limits.settings import LimitCounts, LimitSettings
from claude_wrapper.limits.values import Limits, Scope
from claude_wrapper.storage import Database
from claude_wrapper.storage.tables.limits import budgets, limits
from claude_wrapper.storage.tables.tenancy import api_keys

CHANNEL: Final = "limits.changed"
"""Announced with the organisation's id (UTF-8) when its limits or budgets changed."""
_MOST_ORGS: Final = 10_000
_MOST_SESSIONS: Final = 20_000
_NOBODY: Final = OrgRules()


@dataclass(frozen=True, slots=True)
class _Kept:
    rules: OrgRules
    some_sessions: bool
    """Whether any session of the organisation has a budget: else none is looked for."""
    fresh_until: float


class RuleBook:
    """`rules.RuleSource` over the database."""

    def __init__(self, database: Database, clock: Clock, settings: LimitSettings, counts: LimitCounts) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings
        self._counts = counts
        self._orgs: OrderedDict[str, _Kept] = OrderedDict()
        self._sessions: OrderedDict[tuple[str, str], tuple[OrgRules, OrgRules, float]] = OrderedDict()
        self._reading: dict[str, asyncio.Lock] = {}

    async def rules(self, org: str | None, session: str | None = None) -> OrgRules:
        """The organisation's rules, with the budgets of `session`. Raises StorageUnavailable if they were never read."""
        if not org:
            return _NOBODY
        kept = self._orgs.get(org)
        if kept is None or kept.fresh_until <= self._clock.monotonic():
            kept = await self._refreshed(org)
        if session is None or not kept.some_sessions:
            return kept.rules
        return await self._with_session(org, session, kept.rules)

    def forget(self, org: str) -> None:
        """Read the organisation's rules again at the next request (what was known stays for an absent database)."""
        kept = self._orgs.get(org)
        if kept is not None:
            self._orgs[org] = replace(kept, fresh_until=float("-inf"))
        for key in [key for key in self._sessions if key[0] == org]:
            rules, base, _ = self._sessions[key]
            self._sessions[key] = (rules, base, float("-inf"))

    async def _refreshed(self, org: str) -> _Kept:
        lock = self._reading.setdefault(org, asyncio.Lock())
        try:
            async with lock:  # a hundred requests at once read once
                kept = self._orgs.get(org)
                if kept is not None and kept.fresh_until > self._clock.monotonic():
                    return kept
                return await self._read(org, kept)
        finally:
            if not lock.locked():
                self._reading.pop(org, None)

    async def _read(self, org: str, kept: _Kept | None) -> _Kept:
        try:
            async with self._database.read() as tx:
                own = await _limits(tx, org, self._counts)
                capped = await _budgets(tx, org, budgets.c.scope != Scope.SESSION.value)
                some = await _any_session_budget(tx, org)
        except StorageUnavailable:
            if kept is None:
                raise
            self._counts.stale_rules += 1
            fresh = replace(kept, fresh_until=self._until())
        else:
            # Equal rules keep their identity: what is derived from them stays valid.
            same = kept is not None and dict(kept.rules.limits) == own and dict(kept.rules.budgets) == capped
            fresh = _Kept(kept.rules if same and kept else OrgRules(own, capped), some, self._until())
        self._orgs[org] = fresh
        self._orgs.move_to_end(org)
        while len(self._orgs) > _MOST_ORGS:
            self._orgs.popitem(last=False)
        return fresh

    async def _with_session(self, org: str, session: str, base: OrgRules) -> OrgRules:
        found = self._sessions.get((org, session))
        if found is not None and found[1] is base and found[2] > self._clock.monotonic():
            return found[0]
        try:
            async with self._database.read() as tx:
                mine = sa.and_(budgets.c.scope == Scope.SESSION.value, budgets.c.subject_id == session)
                own = await _budgets(tx, org, mine)
        except StorageUnavailable:
            if found is None:
                raise
            self._counts.stale_rules += 1
            own = {key: value for key, value in found[0].budgets.items() if key[0] is Scope.SESSION}
        rules = OrgRules(base.limits, {**base.budgets, **own}) if own else base
        if found is not None and found[1] is base and dict(found[0].budgets) == dict(rules.budgets):
            rules = found[0]
        self._sessions[org, session] = (rules, base, self._until())
        while len(self._sessions) > _MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return rules

    def _until(self) -> float:
        return self._clock.monotonic() + self._settings.rules_seconds


# tenant-scope: the rules of one organisation, for its own admission
async def _limits(tx: AsyncConnection, org: str, counts: LimitCounts) -> dict[Subject, Limits]:
    found: dict[Subject, Limits] = {}
    keys = sa.select(api_keys.c.id, api_keys.c.limits).where(api_keys.c.org_id == org, api_keys.c.limits.is_not(None))
    for ident, value in await tx.execute(keys):
        _add(found, (Scope.KEY, ident), value, counts)
    rows = sa.select(limits.c.scope, limits.c.subject_id, limits.c.limits).where(limits.c.org_id == org)
    for scope, ident, value in await tx.execute(rows):
        _add(found, (Scope(scope), ident), value, counts)
    return found


def _add(found: dict[Subject, Limits], subject: Subject, value: Mapping[str, Any], counts: LimitCounts) -> None:
    """A row that cannot be read is counted and left out: one bad row must not stop a whole organisation."""
    try:
        parsed = Limits.parse(value)
    except InvalidRequest:
        counts.bad_rules += 1
        return
    found[subject] = parsed.over(found[subject]) if subject in found else parsed


# tenant-scope: the rules of one organisation, for its own admission
async def _budgets(tx: AsyncConnection, org: str, which: sa.ColumnElement[bool]) -> dict[Subject, tuple[Budget, ...]]:
    found: dict[Subject, tuple[Budget, ...]] = {}
    rows = await tx.execute(sa.select(budgets).where(budgets.c.org_id == org, which).order_by(budgets.c.id))
    for row in rows.mappings():
        budget = budget_of(row)
        subject = (budget.scope, budget.subject)
        found[subject] = (*found.get(subject, ()), budget)
    return found


# tenant-scope: the rules of one organisation, for its own admission
async def _any_session_budget(tx: AsyncConnection, org: str) -> bool:
    mine = sa.select(budgets.c.id).where(budgets.c.org_id == org, budgets.c.scope == Scope.SESSION.value)
    return (await tx.execute(mine.limit(1))).first() is not None


def budget_of(row: RowMapping) -> Budget:
    """A budget from its row."""
    return Budget(
        id=row["id"],
        org=row["org_id"],
        scope=Scope(row["scope"]),
        subject=row["subject_id"],
        period=Period(row["period"]),
        cap_micros=row["cap_micros"],
        action=Action(row["action"]),
        alert_percents=tuple(row["alert_percents"]),
        version=row["version"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )
