"""Who used what, when, and what it cost: by any dimensions, in hours, days, months or altogether.

Reports without sessions and turns, over whole hours, come from the hourly sums (a thousandth of the rows); the others
from the ledger itself through an index. Times are UTC. Every report names a principal and sees its organisation alone;
only the operator, acting in none, sees all.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.storage import Database
from claude_wrapper.storage.tables.usage import COUNTERS, usage_calls, usage_hours
from claude_wrapper.tenancy.principal import Principal, require_operator
from claude_wrapper.usage.entries import EPOCH, HOUR_MS, milliseconds
from claude_wrapper.wire.usage import Usage

HOUR: Final = timedelta(hours=1)
MOST_MONTHS: Final = 240
"""Twenty years; beyond, InvalidRequest."""
MOST_ROWS: Final = 10_000


class Dimension(enum.StrEnum):
    """By what a report may be divided and filtered."""

    ORGANIZATION = "organization"
    WORKSPACE = "workspace"
    KEY = "key"
    USER = "user"
    MODEL = "model"
    SESSION = "session"
    TURN = "turn"


class Bucket(enum.StrEnum):
    """How time is divided."""

    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    ALL = "all"


_COLUMN: Final[Mapping[Dimension, str]] = {
    Dimension.ORGANIZATION: "org_id",
    Dimension.WORKSPACE: "workspace_id",
    Dimension.KEY: "key_id",
    Dimension.USER: "user_id",
    Dimension.MODEL: "model",
    Dimension.SESSION: "session_id",
    Dimension.TURN: "turn_id",
}
_SCOPES: Final[Mapping[str, Dimension]] = {
    "organization": Dimension.ORGANIZATION,
    "workspace": Dimension.WORKSPACE,
    "key": Dimension.KEY,
    "user": Dimension.USER,
    "session": Dimension.SESSION,
}


@dataclass(frozen=True, slots=True)
class Query:
    """What a report is about: calls that began in [start, end)."""

    start: datetime
    end: datetime
    by: tuple[Dimension, ...] = ()
    bucket: Bucket = Bucket.ALL
    where: Mapping[Dimension, Sequence[str]] = field(default_factory=dict)
    """Only these ids; the empty text means calls without one (no key, no workspace)."""
    limit: int = MOST_ROWS
    offset: int = 0

    def __post_init__(self) -> None:
        if self.start.tzinfo is None or self.end.tzinfo is None:
            raise InvalidRequest("expected times with a zone, as in 2026-01-31T00:00:00Z", field="starting_at")
        if self.start >= self.end:
            raise InvalidRequest("must be after the start", field="ending_at")
        if self.bucket is Bucket.MONTH and self.end - self.start > timedelta(days=28 * MOST_MONTHS):
            raise InvalidRequest(f"a report by month covers at most {MOST_MONTHS} months", field="ending_at")
        if not 1 <= self.limit <= MOST_ROWS or self.offset < 0:
            raise InvalidRequest(f"expected 1 to {MOST_ROWS}", field="limit")

    @property
    def from_sums(self) -> bool:
        """Whether the hourly sums can answer."""
        named = {*self.by, *self.where}
        return not named & {Dimension.SESSION, Dimension.TURN} and _whole_hour(self.start) and _whole_hour(self.end)


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a report."""

    start: datetime | None
    """Beginning of the bucket; None if time is not divided."""
    who: Mapping[Dimension, str]
    calls: int
    errors: int
    total_ms: int
    usage: Usage
    cost_micros: int | None
    """None if the principal may not see costs."""

    def to_json(self) -> dict[str, Any]:
        """Flat: the same names as the columns of the CSV and Parquet forms."""
        return {
            "start": None if self.start is None else self.start.strftime("%Y-%m-%dT%H:%M:%SZ"),
            **{dimension.value: ident for dimension, ident in self.who.items()},
            "calls": self.calls,
            "errors": self.errors,
            "total_ms": self.total_ms,
            **{name: getattr(self.usage, name) for name in COUNTERS if name != "cost_micros"},
            "cost_micros": self.cost_micros,
        }


class Reports:
    """Asks the ledger. Also implements `limits.SpentReader`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, principal: Principal, query: Query) -> tuple[Line, ...]:
        """The report's lines in order of time, then of the dimensions. Needs `read:usage`; costs need `read:costs`."""
        principal.require("read:usage")
        statement = statement_of(principal, query)
        rows = await self._database.query(lambda tx: _rows(tx, statement))
        costs = principal.may("read:costs")
        return tuple(_line(row, query, costs=costs) for row in rows)

    # tenant-scope: what budgets ask, for the organisation that they belong to
    async def spent(self, org: str, scope: str, subject: str, start: datetime, end: datetime | None) -> int:
        """Micro-dollars of one subject's calls that began in [start, end). For budgets, of any organisation."""
        dimension = _SCOPES[scope]
        sums = dimension is not Dimension.SESSION and _whole_hour(start) and (end is None or _whole_hour(end))
        table = usage_hours if sums else usage_calls
        where = [table.c.org_id == org, table.c[_COLUMN[dimension]] == subject, *_period(table, start, end)]
        statement = sa.select(sa.func.coalesce(sa.func.sum(table.c.cost_micros), 0)).where(*where)
        rows = await self._database.query(lambda tx: _rows(tx, statement))
        return int(rows[0][0])


def statement_of(principal: Principal, query: Query) -> sa.Select[Any]:
    """The SELECT of a report. Public so that tests and the benchmark can show its plan."""
    table = usage_hours if query.from_sums else usage_calls
    bucket = _bucket(table, query)
    by = [table.c[_COLUMN[dimension]] for dimension in query.by]
    group = by if bucket is None else [bucket, *by]
    where = [*_mine(principal, table), *_period(table, query.start, query.end)]
    where += [table.c[_COLUMN[dimension]].in_(list(idents)) for dimension, idents in query.where.items()]
    calls = sa.func.sum(table.c.calls) if table is usage_hours else sa.func.count()
    failed = sa.case((usage_calls.c.status >= 400, 1), else_=0)
    errors = sa.func.sum(table.c.errors) if table is usage_hours else sa.func.sum(failed)
    totals = (calls, errors, *(sa.func.sum(table.c[name]) for name in ("total_ms", *COUNTERS)))
    sums = [sa.func.coalesce(total, whole(0)) for total in totals]
    begins = sa.null() if bucket is None else bucket
    statement = sa.select(begins.label("begins"), *by, *sums).where(*where)
    if group:
        statement = statement.group_by(*group).order_by(*group)
    return statement.limit(query.limit).offset(query.offset)


def whole(number: int) -> sa.ColumnElement[int]:
    """A number in the statement's text: Postgres takes two parameters for two expressions, even of one value."""
    return sa.literal_column(str(int(number)), sa.BigInteger)


def _mine(principal: Principal, table: sa.Table) -> list[sa.ColumnElement[bool]]:
    if not principal.org:
        require_operator(principal)
        return []
    mine: list[sa.ColumnElement[bool]] = [table.c.org_id == principal.org]
    if principal.workspace is not None:
        mine.append(table.c.workspace_id == principal.workspace)
    return mine


def _period(table: sa.Table, start: datetime, end: datetime | None) -> list[sa.ColumnElement[bool]]:
    column, unit = (table.c.hour, HOUR_MS) if table is usage_hours else (table.c.started_ms, 1)
    found: list[sa.ColumnElement[bool]] = [column >= milliseconds(start) // unit]
    if end is not None:
        found.append(column < milliseconds(end) // unit)
    return found


def _bucket(table: sa.Table, query: Query) -> sa.ColumnElement[Any] | None:
    """The beginning of the bucket, in hours since 1970."""
    hour = table.c.hour if table is usage_hours else table.c.started_ms // whole(HOUR_MS)
    match query.bucket:
        case Bucket.HOUR:
            return sa.type_coerce(hour, sa.BigInteger)
        case Bucket.DAY:
            return sa.type_coerce(hour // whole(24) * whole(24), sa.BigInteger)
        case Bucket.MONTH:
            return sa.case(*((hour < whole(end), whole(start)) for start, end in _months(query)))
        case Bucket.ALL:
            return None


def _months(query: Query) -> list[tuple[int, int]]:
    """First hour of each month of the period and of the next one: both databases compare numbers alike, not calendars."""
    found: list[tuple[int, int]] = []
    first = query.start.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    while first < query.end and len(found) < MOST_MONTHS:
        following = (first + timedelta(days=32)).replace(day=1)
        found.append((milliseconds(first) // HOUR_MS, milliseconds(following) // HOUR_MS))
        first = following
    return found


def _whole_hour(moment: datetime) -> bool:
    return milliseconds(moment) % HOUR_MS == 0


async def _rows(tx: AsyncConnection, statement: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
    rows: Sequence[sa.Row[Any]] = (await tx.execute(statement)).all()
    return rows


def _line(row: Sequence[Any], query: Query, *, costs: bool) -> Line:
    names = len(query.by)
    calls, errors, total_ms, *sums = (int(value) for value in row[1 + names :])
    counted = dict(zip(COUNTERS, sums, strict=True))
    cost = counted.pop("cost_micros")
    return Line(
        start=None if row[0] is None else EPOCH + row[0] * HOUR,
        who=dict(zip(query.by, row[1 : 1 + names], strict=True)),
        calls=calls,
        errors=errors,
        total_ms=total_ms,
        usage=Usage(**counted),
        cost_micros=cost if costs else None,
    )
