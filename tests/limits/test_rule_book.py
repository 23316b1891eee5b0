"""Limits and budgets in the database, on SQLite and Postgres, and the alerts that budgets raise."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from limits_world import Inbox

from claude_wrapper.errors import Conflict, InvalidRequest, NotFound, PermissionDenied, StorageUnavailable
from claude_wrapper.limits import (
    CHANNEL,
    Action,
    AlertDesk,
    LimitCounts,
    Limits,
    LimitSettings,
    Period,
    Resource,
    RuleBook,
    Scope,
    Subjects,
    budgets,
    records,
)
from claude_wrapper.limits.records import BudgetDraft
from claude_wrapper.limits.rules import OrgRules
from claude_wrapper.storage import Announcement, Database
from claude_wrapper.storage.tables import limits as tables
from claude_wrapper.storage.tables.tenancy import api_keys, organizations
from claude_wrapper.tenancy.principal import Principal, user_principal
from claude_wrapper.tenancy.scopes import Role
from claude_wrapper.testing.clock import ManualClock, SequentialIds

pytestmark = pytest.mark.anyio

OWNER = user_principal("org_1", "user_1", Role.OWNER)
OTHER = user_principal("org_2", "user_2", Role.OWNER)
MONTHLY = BudgetDraft(Scope.ORGANIZATION, "org_1", Period.MONTH, 50_000_000)


@pytest.fixture
async def db(database: Database, clock: ManualClock) -> Database:
    async with database.transaction() as tx:
        for org in ("org_1", "org_2"):
            await tx.execute(sa.insert(organizations).values(id=org, name=org, created_at=clock.now()))
    return database


@pytest.fixture
def counts() -> LimitCounts:
    return LimitCounts()


@pytest.fixture
def book(db: Database, clock: ManualClock, counts: LimitCounts) -> RuleBook:
    return RuleBook(db, clock, LimitSettings(), counts)


async def limit(db: Database, principal: Principal, scope: Scope, subject: str, text: str) -> None:
    async with db.transaction() as tx:
        await records.set_limits(tx, principal, scope, subject, Limits.parse(text), clock=ManualClock())


async def add(db: Database, draft: BudgetDraft, ids: SequentialIds, principal: Principal = OWNER) -> budgets.Budget:
    async with db.transaction() as tx:
        return await records.create_budget(tx, principal, draft, clock=ManualClock(), ids=ids)


async def test_limits_are_set_changed_listed_and_removed(db: Database) -> None:
    await limit(db, OWNER, Scope.USER, "user_9", "requests=100/hour")
    await limit(db, OWNER, Scope.USER, "user_9", "requests=50/hour,sessions=3")
    async with db.read() as tx:
        (row,) = await records.list_limits(tx, OWNER)
    assert (row.scope, row.subject, row.version) == (Scope.USER, "user_9", 2)
    assert row.limits == Limits.parse("requests=50/hour,sessions=3")
    await limit(db, OWNER, Scope.USER, "user_9", "")
    async with db.read() as tx:
        assert await records.list_limits(tx, OWNER) == ()


async def test_what_is_anothers_is_neither_seen_nor_changed(db: Database) -> None:
    ids = SequentialIds()
    await limit(db, OWNER, Scope.USER, "user_9", "requests=1")
    budget = await add(db, MONTHLY, ids)
    async with db.transaction() as tx:
        assert await records.list_limits(tx, OTHER) == ()
        assert await records.list_budgets(tx, OTHER) == ()
        for attempt in (
            records.get_budget(tx, OTHER, budget.id),
            records.change_budget(tx, OTHER, budget.id, cap_micros=1, clock=ManualClock()),
            records.delete_budget(tx, OTHER, budget.id),
            records.set_limits(tx, OTHER, Scope.ORGANIZATION, "org_1", Limits.parse("requests=1"), clock=ManualClock()),
            records.create_budget(tx, OTHER, MONTHLY, clock=ManualClock(), ids=ids),
        ):
            with pytest.raises(NotFound):
                await attempt


async def test_who_is_confined_to_a_workspace_reaches_that_one_alone(db: Database) -> None:
    ids = SequentialIds()
    confined = user_principal("org_1", "user_1", Role.ADMIN, workspace="wrkspc_1")
    await add(db, MONTHLY, ids)
    mine = await add(db, BudgetDraft(Scope.WORKSPACE, "wrkspc_1", Period.DAY, 1), ids, confined)
    async with db.transaction() as tx:
        assert await records.list_budgets(tx, confined) == (mine,)
        for scope, subject in ((Scope.WORKSPACE, "wrkspc_2"), (Scope.ORGANIZATION, "org_1"), (Scope.USER, "user_1")):
            with pytest.raises(NotFound):
                await records.set_limits(tx, confined, scope, subject, Limits.parse("requests=1"), clock=ManualClock())


async def test_roles_without_the_scope_are_refused(db: Database) -> None:
    developer = user_principal("org_1", "user_1", Role.DEVELOPER)
    async with db.transaction() as tx:
        with pytest.raises(PermissionDenied, match="write:limits"):
            await records.set_limits(tx, developer, Scope.USER, "u", Limits.parse("requests=1"), clock=ManualClock())
        with pytest.raises(PermissionDenied, match="write:budgets"):
            await records.create_budget(tx, developer, MONTHLY, clock=ManualClock(), ids=SequentialIds())
        with pytest.raises(PermissionDenied, match="read:budgets"):
            await records.list_budgets(tx, developer)
        with pytest.raises(InvalidRequest):
            await records.set_limits(tx, OWNER, Scope.SESSION, "s", Limits.parse("requests=1"), clock=ManualClock())


async def test_of_two_admins_who_change_a_budget_at_once_the_second_meets_a_conflict(db: Database) -> None:
    budget = await add(db, MONTHLY, SequentialIds())
    async with db.transaction() as tx:
        changed = await records.change_budget(tx, OWNER, budget.id, version=1, cap_micros=7, clock=ManualClock())
    assert (changed.cap_micros, changed.version, changed.action) == (7, 2, Action.BLOCK)
    with pytest.raises(Conflict):
        async with db.transaction() as tx:
            await records.change_budget(tx, OWNER, budget.id, version=1, action=Action.WARN, clock=ManualClock())
    async with db.transaction() as tx:
        assert await records.get_budget(tx, OWNER, budget.id) == changed
        await records.delete_budget(tx, OWNER, budget.id)
        assert await records.list_budgets(tx, OWNER) == ()


async def test_a_subject_has_one_budget_per_period(db: Database) -> None:
    ids = SequentialIds()
    await add(db, MONTHLY, ids)
    with pytest.raises(Conflict, match="has a budget per month already"):
        await add(db, MONTHLY, ids)
    await add(db, BudgetDraft(Scope.ORGANIZATION, "org_1", Period.DAY, 1), ids)


async def test_the_book_gives_limits_of_keys_and_of_rows_and_budgets(db: Database, book: RuleBook) -> None:
    async with db.transaction() as tx:
        row = {"org_id": "org_1", "name": "k", "hint": "h", "role": "developer", "created_at": ManualClock().now()}
        await tx.execute(sa.insert(api_keys).values(id="apikey_1", digest=b"1" * 32, limits={"requests": 5}, **row))
        await tx.execute(sa.insert(api_keys).values(id="apikey_2", digest=b"2" * 32, limits={"nonsense": 5}, **row))
    await limit(db, OWNER, Scope.KEY, "apikey_1", "sessions=2")
    budget = await add(db, MONTHLY, SequentialIds())
    rules = await book.rules("org_1")
    assert rules.limits == {(Scope.KEY, "apikey_1"): Limits.parse("requests=5,sessions=2")}
    assert rules.budgets_of(Subjects("org_1", key="apikey_1")) == (budget,)
    assert rules.budgets_of(Subjects("org_2", key="apikey_1")) == ()
    assert book._counts.bad_rules == 1
    assert (await book.rules("org_2")).limits == {}
    assert (await book.rules(None)).limits == (await book.rules("")).limits == {}


async def test_a_sessions_budget_is_found_for_that_session_alone(db: Database, book: RuleBook) -> None:
    ids = SequentialIds()
    monthly = await add(db, MONTHLY, ids)
    own = await add(db, BudgetDraft(Scope.SESSION, "sesn_1", Period.TOTAL, 5), ids)
    mine, other = Subjects("org_1", session="sesn_1"), Subjects("org_1", session="sesn_2")
    rules = await book.rules("org_1", "sesn_1")
    assert rules.budgets_of(mine) == (own, monthly)
    assert await book.rules("org_1", "sesn_1") is rules
    assert (await book.rules("org_1", "sesn_2")).budgets_of(other) == (monthly,)


async def test_a_change_shows_after_it_is_announced_or_after_some_seconds(
    db: Database, book: RuleBook, clock: ManualClock
) -> None:
    heard: list[Announcement] = []

    async def listen(announcements: object) -> None:
        heard.extend(announcements)  # type: ignore[arg-type]

    assert (await book.rules("org_1")).limits == {}
    db.listener = listen
    await limit(db, OWNER, Scope.USER, "user_9", "requests=1")
    assert heard == [Announcement(CHANNEL, b"org_1")]
    assert (await book.rules("org_1")).limits == {}
    book.forget("org_1")
    assert len((await book.rules("org_1")).limits) == 1
    await limit(db, OWNER, Scope.USER, "user_8", "requests=1")
    await clock.advance(11)
    assert len((await book.rules("org_1")).limits) == 2
    rules = await book.rules("org_1")
    await clock.advance(11)
    assert await book.rules("org_1") is rules, "what is derived from unchanged rules stays valid"


async def test_while_the_database_is_away_the_last_known_rules_hold(
    db: Database, book: RuleBook, clock: ManualClock, counts: LimitCounts
) -> None:
    await limit(db, OWNER, Scope.USER, "user_9", "requests=1")
    await add(db, BudgetDraft(Scope.SESSION, "sesn_1", Period.TOTAL, 5), SequentialIds())
    rules = await book.rules("org_1", "sesn_1")
    await db.close()
    await clock.advance(11)
    again = await book.rules("org_1", "sesn_1")
    assert (again.limits, again.budgets) == (rules.limits, rules.budgets)
    assert counts.stale_rules == 2
    with pytest.raises(StorageUnavailable):
        await book.rules("org_2")


async def test_many_requests_at_once_read_an_organisation_once(db: Database, book: RuleBook) -> None:
    await limit(db, OWNER, Scope.USER, "user_9", "requests=1")
    found = await asyncio.gather(*(book.rules("org_1") for _ in range(50)))
    assert len({id(rules) for rules in found}) == 1
    assert book._reading == {}


def test_a_row_wins_over_the_default_and_narrower_scopes_come_first() -> None:
    settings = LimitSettings(default_key=Limits.parse("requests=1"), default_organization=Limits.parse("requests=9"))
    rules = OrgRules({(Scope.ORGANIZATION, "org_1"): Limits.parse("requests=5")})
    found = [
        (scope, own.rates(Resource.REQUESTS)[0].limit)
        for scope, _, own in rules.limits_of(Subjects("org_1", key="k"), settings)
    ]
    assert found == [(Scope.KEY, 1), (Scope.ORGANIZATION, 5)]


# Alerts ---------------------------------------------------------------------------------------------------------------

WINDOW = budgets.window(Period.MONTH, datetime(2026, 1, 15, tzinfo=UTC))


async def test_each_share_is_told_once_however_many_replicas_see_it(db: Database, clock: ManualClock) -> None:
    budget = await add(db, MONTHLY, SequentialIds())
    inbox, counts = Inbox(), LimitCounts()
    desks = [AlertDesk(db, inbox, clock, counts) for _ in range(5)]
    await asyncio.gather(*(desk.moved(budget, WINDOW, 0, 45_000_000) for desk in desks))
    assert [alert.percent for alert in inbox.alerts] == [80]
    await desks[0].moved(budget, WINDOW, 45_000_000, 60_000_000)
    await desks[1].moved(budget, WINDOW, 0, 60_000_000)
    assert [(alert.percent, alert.spent_micros) for alert in inbox.alerts] == [(80, 45_000_000), (100, 60_000_000)]
    following = budgets.window(Period.MONTH, datetime(2026, 2, 15, tzinfo=UTC))
    await desks[0].moved(budget, following, 0, 45_000_000)
    assert len(inbox.alerts) == 3
    assert (counts.alerts, counts.alerts_failed) == ({80: 2, 100: 1}, 0)


async def test_a_raised_cap_may_be_reached_again(db: Database, clock: ManualClock) -> None:
    budget = await add(db, MONTHLY, SequentialIds())
    inbox = Inbox()
    desk = AlertDesk(db, inbox, clock, LimitCounts())
    await desk.moved(budget, WINDOW, 0, 50_000_000)
    async with db.transaction() as tx:
        raised = await records.change_budget(tx, OWNER, budget.id, cap_micros=100_000_000, clock=clock)
    await desk.moved(raised, WINDOW, 50_000_000, 100_000_000)
    assert [alert.percent for alert in inbox.alerts] == [80, 100, 80, 100]


async def test_an_alert_that_nobody_took_is_delivered_later_and_once(db: Database, clock: ManualClock) -> None:
    budget = await add(db, MONTHLY, SequentialIds())
    inbox, counts = Inbox(failing=True), LimitCounts()
    desk = AlertDesk(db, inbox, clock, counts)
    await desk.moved(budget, WINDOW, 0, 45_000_000)
    await desk.redeliver()
    assert counts.alerts_failed == 2
    inbox.failing = False
    await desk.redeliver()
    await desk.redeliver()
    assert [alert.percent for alert in inbox.alerts] == [80]
    async with db.read() as tx:
        row = (await tx.execute(sa.select(tables.budget_alerts))).mappings().one()
    assert (row["percent"], row["spent_micros"], row["delivered_at"]) == (80, 45_000_000, clock.now())


async def test_an_alert_of_a_deleted_budget_or_an_absent_database_breaks_nothing(
    db: Database, clock: ManualClock
) -> None:
    budget = await add(db, MONTHLY, SequentialIds())
    async with db.transaction() as tx:
        await records.delete_budget(tx, OWNER, budget.id)
    inbox, counts = Inbox(), LimitCounts()
    desk = AlertDesk(db, inbox, clock, counts)
    await desk.moved(budget, WINDOW, 0, 45_000_000)
    assert (inbox.alerts, counts.alerts_failed) == ([], 0)
    await db.close()
    await desk.moved(budget, WINDOW, 0, 45_000_000)
    assert (inbox.alerts, counts.alerts_failed) == ([], 1)
