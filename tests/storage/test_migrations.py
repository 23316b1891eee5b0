"""Migrations: the schema they make, what interrupts them, and what the server says at start."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import op

from claude_wrapper.errors import ConfigurationError
from claude_wrapper.storage import Database, migrations
from claude_wrapper.storage.migrations import draft
from claude_wrapper.storage.schema import metadata

pytestmark = pytest.mark.anyio


async def tables_of(db: Database) -> set[str]:
    async with db.read() as tx:
        return set(await tx.run_sync(lambda connection: sa.inspect(connection).get_table_names()))


async def test_the_migrated_schema_is_the_declared_one(empty_database: Database) -> None:
    assert await migrations.migrate(empty_database) == (None, migrations.head_revision())
    assert await migrations.differences(empty_database) == []
    assert await tables_of(empty_database) == {*metadata.tables, "alembic_version"}


async def test_the_comparison_finds_a_table_a_column_and_an_index_that_are_missing(empty_database: Database) -> None:
    await migrations.migrate(empty_database)
    async with empty_database.transaction() as tx:
        await tx.execute(sa.text("DROP TABLE idempotency_keys"))
        await tx.execute(sa.text("DROP INDEX ix_audit_log_org_id_target"))
        await tx.execute(sa.text("ALTER TABLE audit_log DROP COLUMN request_id"))
    found = str(await migrations.differences(empty_database))
    assert "idempotency_keys" in found
    assert "ix_audit_log_org_id_target" in found
    assert "request_id" in found


async def test_migrating_twice_changes_nothing(empty_database: Database) -> None:
    await migrations.migrate(empty_database)
    head = migrations.head_revision()
    assert await migrations.migrate(empty_database) == (head, head)


async def test_several_that_migrate_at_once_do_not_meet(empty_database: Database, empty_database_url: str) -> None:
    others = [Database(empty_database_url) for _ in range(3)]
    try:
        async with asyncio.timeout(60):
            found = await asyncio.gather(*(migrations.migrate(db) for db in (empty_database, *others)))
    finally:
        for db in others:
            await db.close()
    assert sorted(str(before) for before, _ in found) == [*[migrations.head_revision()] * 3, "None"]


async def test_a_migration_that_breaks_off_half_way_leaves_nothing_and_can_be_run_again(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = op.create_table, 0

    def break_off(*args: Any, **kw: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return real(*args, **kw)

    monkeypatch.setattr(op, "create_table", break_off)
    with pytest.raises(KeyboardInterrupt):
        await migrations.migrate(empty_database)
    assert calls == 5
    assert await tables_of(empty_database) == set()
    monkeypatch.undo()
    await migrations.migrate(empty_database)
    assert await migrations.differences(empty_database) == []


KILLED = """
import asyncio, os, sys
from alembic import op
from claude_wrapper.storage import Database, migrations
real, calls = op.create_table, []
def die(*args, **kw):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), 9)
    return real(*args, **kw)
op.create_table = die
asyncio.run(migrations.migrate(Database(sys.argv[1])))
"""


async def test_a_migration_whose_process_is_killed_leaves_nothing_and_can_be_run_again(
    empty_database: Database, empty_database_url: str
) -> None:
    async with asyncio.timeout(60):
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, empty_database_url)
        assert await child.wait() == -signal.SIGKILL
    await migrations.migrate(empty_database)
    assert await migrations.differences(empty_database) == []


def test_there_is_exactly_one_newest_revision() -> None:
    assert len(migrations._scripts().get_heads()) == 1


async def test_at_start_sqlite_is_migrated_in_a_directory_that_did_not_exist(tmp_path: Path) -> None:
    db = Database(f"sqlite:///{tmp_path / 'new' / 'data' / 'cw.db'}")
    try:
        assert await migrations.prepare(db) == migrations.head_revision()
    finally:
        await db.close()


async def test_at_start_postgres_is_not_migrated_and_the_error_says_what_to_run(empty_postgres_url: str) -> None:
    db = Database(empty_postgres_url)
    try:
        with pytest.raises(ConfigurationError, match="claude-wrapper migrate"):
            await migrations.prepare(db)
        assert await tables_of(db) == set()
        await migrations.migrate(db)
        assert await migrations.prepare(db) == migrations.head_revision()
    finally:
        await db.close()


async def test_a_database_of_a_newer_version_is_refused_and_left_alone(empty_database: Database) -> None:
    await migrations.migrate(empty_database)
    async with empty_database.transaction() as tx:
        await tx.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigurationError, match="newer version"):
        await migrations.prepare(empty_database)
    with pytest.raises(ConfigurationError, match="newer version"):
        await migrations.migrate(empty_database)


async def test_a_draft_against_a_migrated_database_is_empty(empty_database: Database) -> None:
    await migrations.migrate(empty_database)
    text = await draft.draft(empty_database, "9999", "Nothing.")
    assert text.rstrip().endswith("pass")
    assert f"down_revision = {migrations.head_revision()!r}" in text
