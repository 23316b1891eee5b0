"""Who used what: by any dimension and period, from sums and from rows, for one's own organisation alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest
import sqlalchemy as sa
from usage_world import NOON, Call

from claude_wrapper.errors import InvalidRequest, PermissionDenied
from claude_wrapper.storage import Database
from claude_wrapper.storage.tables.usage import usage_calls, usage_hours
from claude_wrapper.tenancy.principal import Principal, operator, user_principal
from claude_wrapper.tenancy.scopes import Role
from claude_wrapper.usage import Bucket, Dimension, Query, Reports
from claude_wrapper.usage.entries import Priced, row_of
from claude_wrapper.usage.forms import to_csv
from claude_wrapper.usage.ledger import insert
from claude_wrapper.usage.reports import statement_of
from claude_wrapper.wire.usage import Usage

pytestmark = pytest.mark.anyio

OWNER = user_principal("org_1", "user_1", Role.OWNER)
START, END = datetime(2026, 10, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)
WHOLE = Query(START, END)
TIMES = (
    datetime(2026, 10, 31, 23, 59, 59, tzinfo=UTC),
    datetime(2026, 11, 1, tzinfo=UTC),
    NOON,
    NOON + timedelta(minutes=29, seconds=59),
    NOON + timedelta(minutes=30),
)


@pytest.fixture
async def db(database: Database) -> Database:
    """240 calls of two organisations, workspaces, users, models and sessions at five moments."""
    calls = [
        Call(
            f"call_{org}{workspace}{user}{model}{time:%d%H%M%S}{session}",
            org=f"org_{org}",
            workspace=workspace and f"wrkspc_{workspace}",
            user=f"user_{user}",
            model=f"claude-{model}",
            session=f"sesn_{session}",
            status=529 if user == 2 else 200,
            started_at=time,
            usage=Usage(input_tokens=10, output_tokens=1, cache_read_tokens=5),
        )
        for org, workspace, user, model, time, session in product((1, 2), (None, 1, 2), (1, 2), "ab", TIMES, (1, 2))
    ]
    await database.write(lambda tx: insert(tx, [row_of(call, Priced(7, "v")) for call in calls]))
    return database


@pytest.fixture
def reports(db: Database) -> Reports:
    return Reports(db)


async def test_altogether_is_one_line(reports: Reports) -> None:
    (line,) = await reports.run(OWNER, WHOLE)
    assert (line.calls, line.errors, line.cost_micros, line.total_ms) == (120, 60, 840, 240_000)
    assert line.usage == Usage(input_tokens=1200, output_tokens=120, cache_read_tokens=600)
    assert (line.start, line.who) == (None, {})


async def test_an_empty_period_is_a_line_of_zeros_altogether_and_none_by_day(reports: Reports) -> None:
    nothing = Query(START - timedelta(days=9), START - timedelta(days=8))
    (line,) = await reports.run(OWNER, nothing)
    assert (line.calls, line.cost_micros) == (0, 0)
    assert await reports.run(OWNER, replace(nothing, bucket=Bucket.DAY)) == ()


async def test_hours_days_and_months_divide_at_utc(reports: Reports) -> None:
    async def starts(bucket: Bucket) -> list[tuple[str, int]]:
        found = await reports.run(OWNER, replace(WHOLE, bucket=bucket))
        return [(f"{line.start:%m-%dT%H}", line.calls) for line in found]

    assert await starts(Bucket.HOUR) == [("10-31T23", 24), ("11-01T00", 24), ("11-20T12", 48), ("11-20T13", 24)]
    assert await starts(Bucket.DAY) == [("10-31T00", 24), ("11-01T00", 24), ("11-20T00", 72)]
    assert await starts(Bucket.MONTH) == [("10-01T00", 24), ("11-01T00", 96)]


@pytest.mark.parametrize("bucket", list(Bucket))
@pytest.mark.parametrize("by", [(Dimension.USER,), (Dimension.WORKSPACE, Dimension.MODEL), tuple(Dimension)[:5]])
async def test_sums_and_rows_give_the_same_report(reports: Reports, db: Database, bucket: Bucket, by: Any) -> None:
    query = replace(WHOLE, by=by, bucket=bucket, where={Dimension.MODEL: ["claude-a", "claude-b"]})
    assert query.from_sums
    from_sums = await reports.run(OWNER, query)
    with_rows = replace(query, where={**query.where, Dimension.SESSION: ["sesn_1", "sesn_2"]})
    assert not with_rows.from_sums
    assert await reports.run(OWNER, with_rows) == from_sums
    assert sum(line.calls for line in from_sums) == 120


async def test_a_period_that_cuts_hours_is_exact(reports: Reports) -> None:
    (line,) = await reports.run(OWNER, Query(NOON, NOON + timedelta(minutes=29, seconds=59)))
    assert line.calls == 24
    (line,) = await reports.run(OWNER, Query(NOON, NOON + timedelta(minutes=30)))
    assert line.calls == 48


async def test_filters_narrow_and_the_empty_text_means_none(reports: Reports) -> None:
    where = {Dimension.WORKSPACE: ["", "wrkspc_1"], Dimension.USER: ["user_1"], Dimension.SESSION: ["sesn_2"]}
    lines = await reports.run(OWNER, replace(WHOLE, by=(Dimension.WORKSPACE, Dimension.SESSION), where=where))
    assert [(dict(line.who), line.calls) for line in lines] == [
        ({Dimension.WORKSPACE: "", Dimension.SESSION: "sesn_2"}, 10),
        ({Dimension.WORKSPACE: "wrkspc_1", Dimension.SESSION: "sesn_2"}, 10),
    ]


async def test_nobody_sees_anothers_usage(reports: Reports) -> None:
    foreign = replace(WHOLE, by=(Dimension.ORGANIZATION,), where={Dimension.ORGANIZATION: ["org_2"]})
    assert await reports.run(OWNER, foreign) == ()
    confined = user_principal("org_1", "user_1", Role.OWNER, workspace="wrkspc_1")
    lines = await reports.run(confined, replace(WHOLE, by=(Dimension.ORGANIZATION, Dimension.WORKSPACE)))
    assert [(tuple(line.who.values()), line.calls) for line in lines] == [(("org_1", "wrkspc_1"), 40)]
    nowhere = Principal("", None, OWNER.actor_kind, None, "user_1", Role.OWNER, OWNER.scopes)
    with pytest.raises(PermissionDenied):
        await reports.run(nowhere, WHOLE)


async def test_the_operator_sees_all_or_acts_in_one(reports: Reports) -> None:
    lines = await reports.run(operator(), replace(WHOLE, by=(Dimension.ORGANIZATION,)))
    assert [line.calls for line in lines] == [120, 120]
    (line,) = await reports.run(operator().acting_in("org_2"), WHOLE)
    assert line.calls == 120


async def test_costs_need_their_own_scope(reports: Reports) -> None:
    (line,) = await reports.run(user_principal("org_1", "u", Role.DEVELOPER), WHOLE)
    assert (line.calls, line.cost_micros) == (120, None)
    with pytest.raises(PermissionDenied, match="read:usage"):
        await reports.run(replace(OWNER, scopes=frozenset()), WHOLE)


async def test_pages_of_a_long_report_join_to_the_whole(reports: Reports) -> None:
    query = replace(WHOLE, by=(Dimension.USER, Dimension.MODEL), bucket=Bucket.HOUR)
    whole = await reports.run(OWNER, query)
    pages = [await reports.run(OWNER, replace(query, limit=5, offset=offset)) for offset in range(0, 20, 5)]
    assert tuple(line for page in pages for line in page) == whole


async def test_a_line_is_flat_json_and_csv(reports: Reports) -> None:
    lines = await reports.run(OWNER, replace(WHOLE, by=(Dimension.MODEL,), bucket=Bucket.MONTH))
    flat = [line.to_json() for line in lines]
    assert flat[0] == {
        "start": "2026-10-01T00:00:00Z",
        "model": "claude-a",
        "calls": 12,
        "errors": 6,
        "total_ms": 24_000,
        "input_tokens": 120,
        "output_tokens": 12,
        "cache_read_tokens": 60,
        "cache_write_5m_tokens": 0,
        "cache_write_1h_tokens": 0,
        "thinking_tokens": 0,
        "web_search_requests": 0,
        "web_fetch_requests": 0,
        "cost_micros": 84,
    }
    assert to_csv(flat).count(b"\r\n") == 5


async def test_what_budgets_ask_is_answered_from_sums_or_rows(reports: Reports) -> None:
    november = datetime(2026, 11, 1, tzinfo=UTC)
    assert await reports.spent("org_1", "organization", "org_1", november, END) == 96 * 7
    assert await reports.spent("org_1", "user", "user_2", november, END) == 48 * 7
    assert await reports.spent("org_1", "session", "sesn_1", datetime(1970, 1, 1, tzinfo=UTC), None) == 60 * 7
    assert await reports.spent("org_1", "workspace", "wrkspc_9", november, END) == 0
    assert await reports.spent("org_3", "session", "sesn_1", november, END) == 0


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"end": START}, "ending_at"),
        ({"start": datetime(2026, 1, 1)}, "starting_at"),  # noqa: DTZ001
        ({"limit": 0}, "limit"),
        ({"limit": 10**6}, "limit"),
        ({"start": datetime(1970, 1, 1, tzinfo=UTC), "bucket": Bucket.MONTH}, "ending_at"),
    ],
)
def test_a_report_that_makes_no_sense_is_refused(bad: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        replace(WHOLE, **bad)
    assert caught.value.field == field


async def test_every_report_goes_through_an_index(db: Database) -> None:
    queries = {
        "altogether": WHOLE,
        "by day and user": replace(WHOLE, by=(Dimension.USER,), bucket=Bucket.DAY),
        "by month and model": replace(WHOLE, by=(Dimension.MODEL,), bucket=Bucket.MONTH),
        "by session": replace(WHOLE, by=(Dimension.SESSION,)),
        "one session": replace(WHOLE, where={Dimension.SESSION: ["sesn_1"]}),
        "cut hours": Query(NOON, NOON + timedelta(minutes=5)),
    }
    async with db.read() as tx:
        if db.dialect == "postgresql":
            await tx.execute(sa.text("SET LOCAL enable_seqscan = off"))  # 240 rows: it would scan them, and rightly
        for name, query in queries.items():
            statement = statement_of(OWNER, query).compile(tx.engine, compile_kwargs={"literal_binds": True})
            explain = "EXPLAIN QUERY PLAN " if db.dialect == "sqlite" else "EXPLAIN "
            plan = "\n".join(
                str(tuple(row)) for row in await tx.execute(sa.text(explain + str(statement).replace(":", r"\:")))
            )
            table = (usage_hours if query.from_sums else usage_calls).name
            assert "Seq Scan" not in plan, (name, plan)
            assert f"SCAN {table}" not in plan, (name, plan)
            assert "INDEX" in plan.upper() or "PRIMARY KEY" in plan, (name, plan)
