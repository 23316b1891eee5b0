"""Several replicas that start for the first time at once, on one database: they agree on who the operator is."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa

from claude_wrapper.app.tenants import running_tenants
from claude_wrapper.clock import SystemClock
from claude_wrapper.config import Settings
from claude_wrapper.ids import RandomIds
from claude_wrapper.storage import Database, migrations
from claude_wrapper.storage.tables.tenancy import api_keys, organizations
from claude_wrapper.testing.upstream import ScriptedUpstream
from replicas import SHARED, ready, replica

pytestmark = pytest.mark.anyio


async def _operators(url: str) -> tuple[int, int]:
    """(organisations, operator's keys) in the database."""
    db = Database(url)
    try:
        async with db.read() as tx:
            made = await tx.scalar(sa.select(sa.func.count()).select_from(organizations))
            keys = await tx.scalar(sa.select(sa.func.count()).select_from(api_keys).where(api_keys.c.is_operator))
        return int(made or 0), int(keys or 0)
    finally:
        await db.close()


async def _migrated(url: str) -> None:
    db = Database(url)
    await migrations.migrate(db)
    await db.close()


@pytest.mark.process
async def test_two_servers_that_start_at_once_make_one_operator(empty_postgres_url: str, tmp_path: Path) -> None:
    await _migrated(empty_postgres_url)
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(ScriptedUpstream())
        starts = [
            replica(tmp_path / name, upstream, database_url=empty_postgres_url, spares=0) for name in ("one", "two")
        ]
        servers = await asyncio.gather(*(stack.enter_async_context(start) for start in starts))
        assert [await ready(server.url) for server in servers] == [True, True]
    assert await _operators(empty_postgres_url) == (1, 1)


async def test_of_many_first_starts_one_makes_the_operator_and_tells_the_key(
    empty_postgres_url: str, tmp_path: Path
) -> None:
    await _migrated(empty_postgres_url)
    together = asyncio.Barrier(6)

    async def start(name: str) -> tuple[str, str | None]:
        directory = tmp_path / name
        directory.mkdir()
        settings = Settings(database_url=empty_postgres_url, **SHARED)
        await together.wait()
        async with running_tenants(settings, directory, SystemClock(), RandomIds()) as tenants:
            return tenants.operator.org, tenants.new_operator_key

    started = await asyncio.gather(*(start(f"replica{number}") for number in range(6)))
    assert len({org for org, _ in started}) == 1
    assert len([key for _, key in started if key is not None]) == 1
    assert await _operators(empty_postgres_url) == (1, 1)
