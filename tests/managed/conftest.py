"""Fixtures of the tests of sessions: a real server, the official SDK, an agent and an environment."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from anthropic import AsyncAnthropic

from claude_wrapper.storage import Database, migrations
from databases import PostgresServer, RedisServer
from running_server import KEY, Running, running


@pytest.fixture
async def server(reachable_tmp_path: Path) -> AsyncIterator[Running]:
    """A server without a sandbox, so that built-in tools run anywhere."""
    async with running(reachable_tmp_path, sandbox="none", security_level="permissive") as one:
        yield one


@pytest.fixture
async def client(server: Running) -> AsyncIterator[AsyncAnthropic]:
    """The official SDK, pointed at it."""
    async with AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0) as one:
        yield one


@pytest.fixture(scope="module", params=["sqlite", "postgres and redis"])
def stores(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Settings: where a server keeps what it knows. Sync, because servers must not be started inside an event loop."""
    if request.param == "sqlite":
        yield {}
        return
    postgres: PostgresServer = request.getfixturevalue("postgres_server")
    state: RedisServer = request.getfixturevalue("redis_server")
    state.flush()
    name = postgres.create()
    asyncio.run(_migrated(postgres.url(name)))
    yield {"database_url": postgres.url(name), "redis_url": state.url}
    postgres.drop(name)


async def _migrated(url: str) -> None:
    db = Database(url)
    await migrations.migrate(db)
    await db.close()


@pytest.fixture(scope="module")
async def shared_server(stores: dict[str, str]) -> AsyncIterator[Running]:
    """One server for a module's tests, on SQLite alone and then on Postgres and Redis."""
    with tempfile.TemporaryDirectory(prefix="cw-test-") as name:
        async with running(Path(name), sandbox="none", security_level="permissive", **stores) as one:
            yield one
