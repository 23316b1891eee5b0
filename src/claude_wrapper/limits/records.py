"""Limits and budgets in the database: set, list, remove. All take the principal that asks and see only its organisation.

Which scopes are needed is asked here; that a subject (a key, a workspace) exists is the caller's to check. Changes are
announced on `book.CHANNEL` when they are committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import Conflict, InvalidRequest, NotFound
from claude_wrapper.ids import Ids
from claude_wrapper.limits.book import CHANNEL, budget_of
from claude_wrapper.limits.budgets import Action, Budget, Period
from claude_wrapper.limits.values import Limits, Scope
from claude_wrapper.storage import announce, dialects
from claude_wrapper.storage.failures import conflict_when_duplicate
from claude_wrapper.storage.tables.limits import budgets, limits
from claude_wrapper.tenancy.principal import Principal

BUDGET = "spl"
"""Prefix of a budget's id: what Anthropic's Admin API calls a spend limit."""


@dataclass(frozen=True, slots=True)
class LimitRow:
    """The limits of one subject."""

    scope: Scope
    subject: str
    limits: Limits
    version: int


@dataclass(frozen=True, slots=True)
class BudgetDraft:
    """A budget that does not exist yet."""

    scope: Scope
    subject: str
    period: Period
    cap_micros: int
    action: Action = Action.BLOCK
    alert_percents: tuple[int, ...] = (80, 100)


async def list_limits(tx: AsyncConnection, principal: Principal) -> tuple[LimitRow, ...]:
    """All limits of the organisation; of one workspace only, for a principal that is confined to it."""
    principal.require("read:limits")
    rows = await tx.execute(
        sa.select(limits).where(_visible(principal, limits)).order_by(limits.c.scope, limits.c.subject_id)
    )
    return tuple(
        LimitRow(Scope(row["scope"]), row["subject_id"], Limits.parse(row["limits"]), row["version"])
        for row in rows.mappings()
    )


async def set_limits(
    tx: AsyncConnection,
    principal: Principal,
    scope: Scope,
    subject: str,
    value: Limits,
    *,
    clock: Clock,
    expected_version: int | None = None,
) -> None:
    """Replace the limits of a subject; empty limits remove the row. SESSION has none: InvalidRequest.

    `expected_version` is the one that the caller read (0: there were none): Conflict if somebody changed them since.
    """
    principal.require("write:limits")
    _reach(principal, scope, subject)
    if scope is Scope.SESSION:
        raise InvalidRequest("a session has a budget, not limits", field="scope")
    if expected_version is not None:
        at = sa.select(limits.c.version).where(
            limits.c.org_id == principal.org, limits.c.scope == scope.value, limits.c.subject_id == subject
        )
        if (await tx.scalar(at.with_for_update()) or 0) != expected_version:
            raise Conflict("somebody else has changed these limits; read them again")
    if not value.entries:
        same = (limits.c.org_id == principal.org, limits.c.scope == scope.value, limits.c.subject_id == subject)
        await tx.execute(sa.delete(limits).where(*same))
    else:
        changes: dict[str, Any] = {
            "limits": lambda new: new.limits,
            "updated_at": lambda new: new.updated_at,
            "version": limits.c.version + 1,
        }
        unique = ("org_id", "scope", "subject_id")
        statement = dialects.upsert(tx.dialect.name, limits, unique, changes)
        row = {"org_id": principal.org, "scope": scope.value, "subject_id": subject}
        await tx.execute(statement.values(**row, limits=value.to_json(), updated_at=clock.now(), version=1))
    announce(tx, CHANNEL, principal.org.encode())


async def list_budgets(
    tx: AsyncConnection, principal: Principal, *, scope: Scope | None = None, subject: str | None = None
) -> tuple[Budget, ...]:
    """Budgets of the organisation, oldest first."""
    principal.require("read:budgets")
    statement = sa.select(budgets).where(_visible(principal, budgets)).order_by(budgets.c.created_at, budgets.c.id)
    if scope is not None:
        statement = statement.where(budgets.c.scope == scope.value)
    if subject is not None:
        statement = statement.where(budgets.c.subject_id == subject)
    return tuple(budget_of(row) for row in (await tx.execute(statement)).mappings())


async def get_budget(tx: AsyncConnection, principal: Principal, budget_id: str) -> Budget:
    """One budget; raises NotFound, also for another organisation's."""
    principal.require("read:budgets")
    return await _found(tx, principal, budget_id)


async def create_budget(
    tx: AsyncConnection, principal: Principal, draft: BudgetDraft, *, clock: Clock, ids: Ids
) -> Budget:
    """A new budget; Conflict if the subject has one for that period."""
    principal.require("write:budgets")
    _reach(principal, draft.scope, draft.subject)
    budget = Budget(
        id=ids.new(BUDGET),
        org=principal.org,
        scope=draft.scope,
        subject=draft.subject,
        period=draft.period,
        cap_micros=draft.cap_micros,
        action=draft.action,
        alert_percents=draft.alert_percents,
        created_at=(now := clock.now()),
        updated_at=now,
    )
    with conflict_when_duplicate(f"this {draft.scope} has a budget per {draft.period} already: change that one"):
        await tx.execute(
            sa.insert(budgets).values(
                id=budget.id,
                org_id=budget.org,
                scope=budget.scope.value,
                subject_id=budget.subject,
                period=budget.period.value,
                **_terms(budget.cap_micros, budget.action, budget.alert_percents),
                created_at=now,
                updated_at=now,
                version=1,
            )
        )
    announce(tx, CHANNEL, principal.org.encode())
    return budget


async def change_budget(
    tx: AsyncConnection,
    principal: Principal,
    budget_id: str,
    *,
    version: int | None = None,
    cap_micros: int | None = None,
    action: Action | None = None,
    alert_percents: Sequence[int] | None = None,
    clock: Clock,
) -> Budget:
    """Change what is given. `version` is the one that the caller read: Conflict if somebody changed it since."""
    principal.require("write:budgets")
    old = await _found(tx, principal, budget_id)
    new = Budget(
        id=old.id,
        org=old.org,
        scope=old.scope,
        subject=old.subject,
        period=old.period,
        cap_micros=old.cap_micros if cap_micros is None else cap_micros,
        action=old.action if action is None else action,
        alert_percents=old.alert_percents if alert_percents is None else tuple(alert_percents),
        version=old.version + 1,
        created_at=old.created_at,
        updated_at=clock.now(),
    )
    expected = old.version if version is None else version
    changed = await tx.execute(
        sa.update(budgets)
        .where(budgets.c.org_id == principal.org, budgets.c.id == budget_id, budgets.c.version == expected)
        .values(
            **_terms(new.cap_micros, new.action, new.alert_percents), updated_at=new.updated_at, version=new.version
        )
    )
    if changed.rowcount != 1:
        raise Conflict("somebody else has changed this budget; read it again", details={"version": old.version})
    announce(tx, CHANNEL, principal.org.encode())
    return new


async def delete_budget(tx: AsyncConnection, principal: Principal, budget_id: str) -> None:
    """Remove a budget; raises NotFound."""
    principal.require("write:budgets")
    await _found(tx, principal, budget_id)
    await tx.execute(sa.delete(budgets).where(budgets.c.org_id == principal.org, budgets.c.id == budget_id))
    announce(tx, CHANNEL, principal.org.encode())


async def _found(tx: AsyncConnection, principal: Principal, budget_id: str) -> Budget:
    statement = sa.select(budgets).where(_visible(principal, budgets), budgets.c.id == budget_id)
    row = (await tx.execute(statement)).mappings().first()
    if row is None:
        raise NotFound(f"there is no budget {budget_id!r}")
    return budget_of(row)


def _visible(principal: Principal, table: sa.Table) -> sa.ColumnElement[bool]:
    mine = table.c.org_id == principal.org
    if principal.workspace is None:
        return mine
    return sa.and_(mine, table.c.scope == Scope.WORKSPACE.value, table.c.subject_id == principal.workspace)


def _reach(principal: Principal, scope: Scope, subject: str) -> None:
    """A principal that is confined to a workspace changes that workspace's alone; an organisation's row names itself."""
    confined = principal.workspace is not None and (scope, subject) != (Scope.WORKSPACE, principal.workspace)
    if confined or (scope is Scope.ORGANIZATION and subject != principal.org):
        raise NotFound(f"there is no {scope} {subject!r}")


def _terms(cap_micros: int, action: Action, alert_percents: Sequence[int]) -> Mapping[str, Any]:
    return {"cap_micros": cap_micros, "action": action.value, "alert_percents": list(alert_percents)}
