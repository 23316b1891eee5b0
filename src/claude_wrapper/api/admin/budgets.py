"""Budgets: `/v1/organizations/spend_limits` as in Anthropic's Admin API, and `/budgets` with all that ours can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response

from claude_wrapper.api.admin.ceilings import parse_scope
from claude_wrapper.api.admin.http import AdminRoute, Asked, json, sliced
from claude_wrapper.errors import InvalidRequest
from claude_wrapper.limits import Action, Budget, Period, Scope
from claude_wrapper.limits import records as store
from claude_wrapper.limits.budgets import window
from claude_wrapper.limits.records import BudgetDraft
from claude_wrapper.tenancy.subjects import require_subject
from claude_wrapper.tenancy.users import list_users

CENT: Final = 10_000
"""Micro-dollars."""
_PERIODS: Final[Mapping[Period, str]] = {Period.DAY: "daily", Period.WEEK: "weekly", Period.MONTH: "monthly"}
_ID_OF: Final[Mapping[Scope, str]] = {
    Scope.SESSION: "session_id",
    Scope.KEY: "api_key_id",
    Scope.USER: "user_id",
    Scope.WORKSPACE: "workspace_id",
}


class NewBudget(msgspec.Struct, forbid_unknown_fields=True):
    """A cap on what a subject may spend per period, in micro-dollars (1 dollar = 1 000 000)."""

    scope: str
    cap_micros: int
    period: str = "month"
    subject_id: str | None = None
    action: str = "block"
    alert_percents: tuple[int, ...] = (80, 100)


class ChangedBudget(msgspec.Struct, forbid_unknown_fields=True):
    """What to change."""

    cap_micros: int | None = None
    action: str | None = None
    alert_percents: list[int] | None = None
    version: int | None = None


class SpendScope(msgspec.Struct):
    """Whose spend limit."""

    type: str
    workspace_id: str | None = None
    user_id: str | None = None
    api_key_id: str | None = None
    session_id: str | None = None


class NewSpendLimit(msgspec.Struct, forbid_unknown_fields=True):
    """A spend limit in cents; the one that is there for this scope and period is replaced."""

    amount: str | None
    scope: SpendScope
    period: str = "monthly"


# Ours -------------------------------------------------------------------------------------------------------------------


async def list_budgets(asked: Asked) -> Response:
    """List budgets with what is spent of them in their present window."""
    scope = asked.one("scope")
    found = await asked.see(
        store.list_budgets,
        scope=None if scope is None else parse_scope(scope),
        subject=asked.one("subject_id"),
    )
    return sliced([await _view(asked, one) for one in found], asked, lambda row: str(row["id"]))


async def create_budget(asked: Asked) -> Response:
    """Create a budget for a key, user, workspace, session or the organisation."""
    body = await asked.body(NewBudget)
    scope = parse_scope(body.scope)
    subject = body.subject_id or (asked.principal.org if scope is Scope.ORGANIZATION else None)
    if subject is None:
        raise InvalidRequest("is needed", field="subject_id")
    draft = BudgetDraft(
        scope=scope,
        subject=subject,
        period=parse_period(body.period),
        cap_micros=body.cap_micros,
        action=parse_action(body.action),
        alert_percents=body.alert_percents,
    )

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        return await _view(asked, await create(tx, asked, draft), fresh=True)

    return await asked.create(work)


async def get_budget(asked: Asked) -> Response:
    """One budget."""
    return json(await _view(asked, await asked.see(store.get_budget, asked.path("budget_id"))))


async def update_budget(asked: Asked) -> Response:
    """Change a budget's cap, action or alerts."""
    body = await asked.body(ChangedBudget)
    changed = await asked.db.run(
        lambda tx: change(
            tx,
            asked,
            asked.path("budget_id"),
            version=body.version,
            cap_micros=body.cap_micros,
            action=None if body.action is None else parse_action(body.action),
            alert_percents=body.alert_percents,
        )
    )
    return json(await _view(asked, changed))


async def delete_budget(asked: Asked) -> Response:
    """Remove a budget."""
    await asked.db.run(lambda tx: remove(tx, asked, asked.path("budget_id")))
    return json({"id": asked.path("budget_id"), "type": "budget_deleted"})


# As in Anthropic's Admin API --------------------------------------------------------------------------------------------


async def list_spend_limits(asked: Asked) -> Response:
    """List spend limits."""
    found = await asked.see(store.list_budgets)
    kinds, workspace = asked.many("scope_type"), asked.one("workspace_id")
    if kinds is not None:
        wanted = {parse_scope(kind, field="scope_type") for kind in kinds}
        found = tuple(one for one in found if one.scope in wanted)
    if workspace is not None:
        found = tuple(one for one in found if (one.scope, one.subject) == (Scope.WORKSPACE, workspace))
    return sliced([_limit_view(one) for one in found], asked, lambda row: str(row["id"]))


async def set_spend_limit(asked: Asked) -> Response:
    """Set the spend limit of the organisation, a workspace or a user for a period."""
    body = await asked.body(NewSpendLimit)
    scope = parse_scope(body.scope.type, field="scope.type")
    subject = asked.principal.org if scope is Scope.ORGANIZATION else getattr(body.scope, _ID_OF[scope])
    if subject is None:
        raise InvalidRequest("is needed", field=f"scope.{_ID_OF[scope]}")
    if body.amount is None:
        raise InvalidRequest("no limit is the same as none here: delete the spend limit", field="amount")
    if not body.amount.isascii() or not body.amount.isdigit() or len(body.amount) > 12:
        raise InvalidRequest("must be whole cents as text, such as 5000 for 50 dollars", field="amount")
    period = parse_period(body.period)
    cap = int(body.amount) * CENT

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        same = await store.list_budgets(tx, asked.principal, scope=scope, subject=subject)
        present = next((one for one in same if one.period is period), None)
        if present is None:
            return _limit_view(await create(tx, asked, BudgetDraft(scope, subject, period, cap)))
        return _limit_view(await change(tx, asked, present.id, cap_micros=cap))

    return await asked.create(work)


async def get_spend_limit(asked: Asked) -> Response:
    """One spend limit."""
    return json(_limit_view(await asked.see(store.get_budget, asked.path("spend_limit_id"))))


async def delete_spend_limit(asked: Asked) -> Response:
    """Remove a spend limit."""
    await asked.db.run(lambda tx: remove(tx, asked, asked.path("spend_limit_id")))
    return json({"id": asked.path("spend_limit_id"), "type": "spend_limit_deleted"})


async def list_effective(asked: Asked) -> Response:
    """For each user and period, the spend limit in force and what is spent of it."""
    periods, only = asked.many("period"), asked.many("user_ids")
    wanted = [parse_period(period) for period in periods] if periods else list(_PERIODS)
    people = await asked.see(list_users, asked.page())
    budgets = await asked.see(store.list_budgets)
    by_subject = {(one.scope, one.subject, one.period): one for one in budgets}
    rows: list[dict[str, Any]] = []
    for person in people.data:
        if only is not None and person.id not in only:
            continue
        for period in wanted:
            own = by_subject.get((Scope.USER, person.id, period))
            budget = own or by_subject.get((Scope.ORGANIZATION, asked.principal.org, period))
            if budget is None:
                continue
            present = window(period, asked.scribe.now())
            spent = await asked.deps.tenants.reports.spent(
                asked.principal.org, Scope.USER.value, person.id, present.start, present.end
            )
            rows.append(
                {
                    "spend_limit_id": budget.id,
                    "actor": {"type": "user_actor", "user_id": person.id, "email": person.email, "name": person.name},
                    "amount": cents(budget.cap_micros),
                    "currency": "USD",
                    "period": _PERIODS[period],
                    "period_to_date_spend": cents(spent),
                    "scope": {"type": "user", "user_id": person.id},
                    "source": _scope_view(budget),
                }
            )
    return json({"data": rows, "next_page": people.next_page})


# Changes, with their audit ----------------------------------------------------------------------------------------------


async def create(tx: AsyncConnection, asked: Asked, draft: BudgetDraft) -> Budget:
    """A new budget for a subject that exists."""
    await require_subject(tx, asked.principal, draft.scope.value, draft.subject)
    made = await store.create_budget(tx, asked.principal, draft, clock=asked.scribe.clock, ids=asked.scribe.ids)
    await asked.scribe.record(tx, asked.principal, "budget.create", ("budget", made.id), after=_audited(made))
    return made


async def change(tx: AsyncConnection, asked: Asked, budget_id: str, **terms: Any) -> Budget:
    """Change what is given."""
    before = await store.get_budget(tx, asked.principal, budget_id)
    after = await store.change_budget(tx, asked.principal, budget_id, **terms, clock=asked.scribe.clock)
    target = ("budget", budget_id)
    await asked.scribe.record(
        tx, asked.principal, "budget.update", target, before=_audited(before), after=_audited(after)
    )
    return after


async def remove(tx: AsyncConnection, asked: Asked, budget_id: str) -> None:
    """Remove a budget."""
    before = await store.get_budget(tx, asked.principal, budget_id)
    await store.delete_budget(tx, asked.principal, budget_id)
    await asked.scribe.record(tx, asked.principal, "budget.delete", ("budget", budget_id), before=_audited(before))


# Views ------------------------------------------------------------------------------------------------------------------


async def _view(asked: Asked, budget: Budget, *, fresh: bool = False) -> dict[str, Any]:
    present = window(budget.period, asked.scribe.now())
    spent = None
    if not fresh:  # inside the transaction that makes it, the ledger is not asked
        spent = await asked.deps.tenants.reports.spent(
            budget.org, budget.scope.value, budget.subject, present.start, present.end
        )
    return {
        "id": budget.id,
        "type": "budget",
        "scope": budget.scope.value,
        "subject_id": budget.subject,
        "period": budget.period.value,
        "cap_micros": budget.cap_micros,
        "action": budget.action.value,
        "alert_percents": list(budget.alert_percents),
        "spent_micros": spent,
        "window": {"starting_at": present.start, "ending_at": present.end},
        "created_at": budget.created_at,
        "updated_at": budget.updated_at,
        "version": budget.version,
    }


def _limit_view(budget: Budget) -> dict[str, Any]:
    return {
        "id": budget.id,
        "type": "spend_limit",
        "amount": cents(budget.cap_micros),
        "currency": "USD",
        "is_enabled": True,
        "period": _PERIODS.get(budget.period, budget.period.value),
        "scope": _scope_view(budget),
        "created_at": budget.created_at,
        "updated_at": budget.updated_at,
        "version": budget.version,
    }


def _scope_view(budget: Budget) -> dict[str, Any]:
    if budget.scope is Scope.ORGANIZATION:
        return {"type": "organization"}
    return {"type": budget.scope.value, _ID_OF[budget.scope]: budget.subject}


def cents(micros: int) -> str:
    """Cents as text, with at most four decimals: `5000`, `12.3456`."""
    text = f"{micros / CENT:.4f}"
    return text.rstrip("0").rstrip(".")


def parse_period(value: str) -> Period:
    """Our names and Anthropic's. Raises InvalidRequest naming the field."""
    for period, name in _PERIODS.items():
        if value == name:
            return period
    try:
        return Period(value)
    except ValueError:
        raise InvalidRequest(f"use one of {', '.join((*Period, *_PERIODS.values()))}", field="period") from None


def parse_action(value: str) -> Action:
    """Raises InvalidRequest naming the field."""
    try:
        return Action(value)
    except ValueError:
        raise InvalidRequest(f"use one of {', '.join(Action)}", field="action") from None


def _audited(budget: Budget) -> dict[str, Any]:
    return {
        "scope": budget.scope.value,
        "subject": budget.subject,
        "period": budget.period.value,
        "cap_micros": budget.cap_micros,
        "action": budget.action.value,
        "alert_percents": list(budget.alert_percents),
    }


_BUDGETS = "/v1/organizations/budgets"
_SPEND = "/v1/organizations/spend_limits"

ROUTES = (
    AdminRoute("GET", _BUDGETS, "read:budgets", list_budgets, query=("limit", "page", "scope", "subject_id")),
    AdminRoute("POST", _BUDGETS, "write:budgets", create_budget, NewBudget),
    AdminRoute("GET", _BUDGETS + "/{budget_id}", "read:budgets", get_budget),
    AdminRoute("POST", _BUDGETS + "/{budget_id}", "write:budgets", update_budget, ChangedBudget),
    AdminRoute("DELETE", _BUDGETS + "/{budget_id}", "write:budgets", delete_budget),
    AdminRoute(
        "GET", _SPEND, "read:budgets", list_spend_limits, query=("limit", "page", "scope_type[]", "workspace_id")
    ),
    AdminRoute("POST", _SPEND, "write:budgets", set_spend_limit, NewSpendLimit),
    AdminRoute(
        "GET",
        _SPEND + "/effective",
        "read:budgets",
        list_effective,
        query=("limit", "page", "period[]", "user_ids[]"),
    ),
    AdminRoute("GET", _SPEND + "/{spend_limit_id}", "read:budgets", get_spend_limit),
    AdminRoute("DELETE", _SPEND + "/{spend_limit_id}", "write:budgets", delete_spend_limit),
)
