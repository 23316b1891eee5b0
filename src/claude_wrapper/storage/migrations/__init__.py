"""Migrations: Alembic, driven from code, with its revisions inside the package.

Every migration runs as one transaction on both databases (SQLite's schema changes are transactional too), behind one
lock, so one that is interrupted leaves the old schema and can simply be run again, and two replicas that start at once
do not meet. SQLite is migrated on start; Postgres only by `claude-wrapper migrate`, because other replicas of the old
version may still use it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError

import claude_wrapper.storage.tables  # noqa: F401 (declares the tables)
from claude_wrapper.errors import ConfigurationError, StorageUnavailable
from claude_wrapper.storage import dialects
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.schema import metadata

_LOCK = 0x636C_7772  # any number that nobody else locks in our database: "clwr"


def _scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    return ScriptDirectory.from_config(config)


def head_revision() -> str:
    """The revision that this version of the program works with."""
    heads = _scripts().get_heads()
    return heads[0]  # a test says that there is exactly one


async def current_revision(db: Database) -> str | None:
    """The database's revision; None for an empty one."""
    async with db.read() as tx:
        return await tx.run_sync(_current)


async def migrate(db: Database, target: str = "head") -> tuple[str | None, str | None]:
    """Bring the database to `target`; (revision before, revision after). Raises ConfigurationError, StorageUnavailable.

    One transaction: it succeeds wholly or changes nothing.
    """
    _make_directory(db)
    async with db.transaction() as tx:
        if db.dialect == dialects.POSTGRES:
            await tx.execute(sa.text("SET LOCAL statement_timeout = 0"))
            await tx.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        return await tx.run_sync(_upgrade, target)


async def prepare(db: Database) -> str:
    """What the server does at start: migrate SQLite, check Postgres. Returns the revision.

    Raises ConfigurationError for a Postgres that is not at the program's revision, and for a database that a newer
    version of the program has migrated.
    """
    head = head_revision()
    if db.dialect == dialects.SQLITE:
        return (await migrate(db))[1] or head
    current = await current_revision(db)
    if current == head:
        return head
    _require_known(current)
    state = f"at revision {current}" if current else "empty"
    raise ConfigurationError(
        f"the database is {state}, this version needs {head}: run `claude-wrapper migrate` once, before the servers start"
    )


async def differences(db: Database) -> list[Any]:
    """How the database's schema differs from the declared tables (Alembic's own comparison); empty if it does not."""
    async with db.read() as tx:
        return await tx.run_sync(lambda connection: list(compare_metadata(_context(connection), metadata)))


# inside ----------------------------------------------------------------------------------------------------------------


def _current(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _context(connection: sa.Connection) -> MigrationContext:
    return MigrationContext.configure(connection, opts={"compare_type": True, "target_metadata": metadata})


def _upgrade(connection: sa.Connection, target: str) -> tuple[str | None, str | None]:
    scripts = _scripts()
    before = _current(connection)
    _require_known(before)
    config = Config()

    def steps(revision: Any, _context: Any) -> Any:
        return scripts._upgrade_revs(target, revision)  # noqa: SLF001 (what alembic.command.upgrade itself calls)

    with EnvironmentContext(config, scripts, fn=steps, destination_rev=target) as environment:
        environment.configure(
            connection=connection,
            target_metadata=metadata,
            transactional_ddl=True,
            render_as_batch=connection.dialect.name == dialects.SQLITE,
        )
        environment.run_migrations()
    return before, _current(connection)


def _require_known(revision: str | None) -> None:
    if revision is None:
        return
    try:
        _scripts().get_revision(revision)
    except CommandError:
        raise ConfigurationError(
            f"the database is at revision {revision}, which this version does not know: a newer version has migrated it; "
            "run that one, or restore a backup"
        ) from None


def _make_directory(db: Database) -> None:
    if db.dialect != dialects.SQLITE or db.url.database is None:
        return
    try:
        Path(db.url.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageUnavailable(f"the database's directory cannot be made: {error.strerror}") from error
