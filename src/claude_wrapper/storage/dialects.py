"""Everything that differs between SQLite and Postgres, in one file.

Column types, connection set-up, conflict-tolerant inserts and the reading of driver errors. No other module asks which
database it runs on, except through the functions and types here.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.url import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction
from sqlalchemy.types import TypeDecorator

from claude_wrapper.errors import ConfigurationError

SQLITE = "sqlite"
POSTGRES = "postgresql"

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgres": "postgresql+asyncpg", "postgresql": "postgresql+asyncpg"}
_SUPPORTED = frozenset(_DRIVERS.values())


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time in UTC: `timestamptz` on Postgres, sortable text on SQLite. Naive values are refused."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("times are stored in UTC: give an aware datetime")
        if value.tzinfo is not UTC:
            value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == SQLITE else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def json_type() -> sa.types.TypeEngine[Any]:
    """JSON that Postgres can index; Python `None` is SQL NULL."""
    return sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), POSTGRES)


def parse_url(url: str) -> URL:
    """The URL with the async driver that this project uses; raises ConfigurationError that never shows a password."""
    try:
        parsed = make_url(url)
    except sa.exc.ArgumentError:
        raise ConfigurationError(
            "the database URL cannot be read: expected sqlite:///path/to/file.db or postgresql://user:password@host/name"
        ) from None
    driver = _DRIVERS.get(parsed.drivername, parsed.drivername)
    if driver not in _SUPPORTED:
        raise ConfigurationError(f"database {parsed.drivername!r} is not supported: use sqlite or postgresql")
    parsed = parsed.set(drivername=driver)
    if driver.startswith(SQLITE) and (not parsed.database or parsed.database == ":memory:"):
        raise ConfigurationError(
            "SQLite needs a file (sqlite:///path/to/file.db): each connection of an in-memory one is empty"
        )
    return parsed


def sqlite_pragmas(busy_timeout: float, *, read_only: bool) -> tuple[str, ...]:
    """What each SQLite connection is told when it opens; `busy_timeout` in seconds."""
    pragmas = (
        f"PRAGMA busy_timeout = {int(busy_timeout * 1000)}",
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = NORMAL",  # in WAL a crash of the machine may lose the last commits, never corrupt
        "PRAGMA foreign_keys = ON",
        "PRAGMA temp_store = MEMORY",
        "PRAGMA cache_size = -16000",
    )
    return (*pragmas, "PRAGMA query_only = ON") if read_only else pragmas


def insert_ignore(dialect: str, table: sa.Table, unique: Sequence[str] = ()) -> sa.Insert:
    """INSERT … ON CONFLICT DO NOTHING; `unique` names the columns of the constraint (empty: any)."""
    columns = list(unique) or None
    if dialect == POSTGRES:
        return postgresql.insert(table).on_conflict_do_nothing(index_elements=columns)
    return sqlite.insert(table).on_conflict_do_nothing(index_elements=columns)


def upsert(dialect: str, table: sa.Table, unique: Sequence[str], changes: dict[str, Any]) -> Any:
    """INSERT … ON CONFLICT (unique) DO UPDATE SET changes.

    In `changes` a callable value gets the statement's `excluded` columns, so that `lambda new: table.c.n + new.n` adds.
    """
    statement: Any = postgresql.insert(table) if dialect == POSTGRES else sqlite.insert(table)
    values = {name: value(statement.excluded) if callable(value) else value for name, value in changes.items()}
    return statement.on_conflict_do_update(index_elements=list(unique), set_=values)


def for_update(dialect: str, statement: sa.Select[Any], *, skip_locked: bool = False) -> sa.Select[Any]:
    """Lock the rows that are read. SQLite's write transaction already excludes every other writer."""
    return statement.with_for_update(skip_locked=skip_locked) if dialect == POSTGRES else statement


class now_ms(GenericFunction[int]):  # noqa: N801 (named as SQL functions are)
    """Milliseconds since 1970 by the database's own clock, at the moment of the statement."""

    type = sa.BigInteger()
    inherit_cache = True


@compiles(now_ms, SQLITE)
def _now_ms_sqlite(element: now_ms, compiler: Any, **kw: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"


@compiles(now_ms, POSTGRES)
def _now_ms_postgres(element: now_ms, compiler: Any, **kw: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"


async def one_at_a_time(tx: AsyncConnection, name: str) -> None:
    """Until this transaction ends, others that ask for the same name wait. SQLite has one writer anyway."""
    if tx.dialect.name == POSTGRES:
        await tx.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": f"claude-wrapper {name}"})


def _driver_error(error: sa.exc.DBAPIError) -> BaseException:
    """The error of the driver itself, below SQLAlchemy's adapter."""
    original: BaseException = error.orig or error
    return original.__cause__ or original


def sqlstate(error: sa.exc.DBAPIError) -> str | None:
    """Postgres's five-character code, or None."""
    state = getattr(_driver_error(error), "sqlstate", None) or getattr(error.orig, "sqlstate", None)
    return state if isinstance(state, str) else None


_SQLITE_AWAY = (
    "locked",
    "busy",
    "disk",
    "unable to open",
    "readonly",
    "i/o error",
    "malformed",
    "no active connection",
)
_STATE_CLASSES_AWAY = ("08", "53", "57", "58")  # connection, resources (disk full, too many clients), operator, system


def is_unavailable(error: sa.exc.DBAPIError) -> bool:
    """Whether the database is away, full or busy, rather than the statement wrong."""
    if error.connection_invalidated:
        return True
    state = sqlstate(error)
    if state is not None:
        return state[:2] in _STATE_CLASSES_AWAY
    if isinstance(error, sa.exc.InterfaceError):
        return True
    return isinstance(error, sa.exc.OperationalError) and any(part in str(error.orig).lower() for part in _SQLITE_AWAY)


def is_serialization_failure(error: sa.exc.DBAPIError) -> bool:
    """Whether Postgres gave up this transaction in favour of another (deadlock, serialization): running it again helps."""
    return sqlstate(error) in {"40001", "40P01"}


def is_unique_violation(error: sa.exc.IntegrityError) -> bool:
    """Whether a unique index refused the row."""
    return sqlstate(error) == "23505" or "unique constraint" in str(error.orig).lower()
