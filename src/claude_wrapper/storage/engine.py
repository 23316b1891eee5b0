"""The database handle: write transactions, reads, and a clean end.

SQLite has one writer, so write transactions of this process queue on a lock and start with BEGIN IMMEDIATE; reads run
beside them on their own connections (WAL). Postgres needs neither. What happens after a commit (telling other replicas
that a row changed) is queued on the transaction with `announce` and handed to the listener only once it is committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from claude_wrapper.clock import Clock, SystemClock
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage import dialects
from claude_wrapper.storage.failures import NOT_APPLIED, UNKNOWN, mapped_failures
from claude_wrapper.storage.sqlitetrips import save_trips
from claude_wrapper.storage.sqlitewriter import SqliteWriter

T = TypeVar("T")

_ANNOUNCEMENTS = "claude_wrapper.announcements"
_RETRY_DELAYS = (0.05, 0.2, 0.8)  # seconds; a failing-over Postgres or a busy SQLite is back or not within about one


@dataclass(frozen=True, slots=True)
class DatabaseSettings:
    """How connections are kept."""

    pool_size: int = 10
    """Postgres connections, and SQLite readers, that may be open at once."""
    pool_timeout: float = 10.0
    """Seconds to wait for a free connection before StorageUnavailable."""
    busy_timeout: float = 10.0
    """Seconds that SQLite waits for another process's write lock."""
    connect_timeout: float = 5.0
    """Seconds to wait for Postgres to accept a connection."""
    statement_timeout: float = 60.0
    """Seconds after which Postgres cancels a statement."""
    statement_cache_size: int = 256
    """Prepared statements per Postgres connection; 0 behind pgbouncer in transaction mode."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """Something that other parts of the server may want to know once it is committed."""

    channel: str
    payload: bytes


Listener = Callable[[Sequence[Announcement]], Awaitable[None]]


def announce(tx: AsyncConnection, channel: str, payload: bytes) -> None:
    """Queue a message that is published when this transaction has been committed, and dropped if it is rolled back."""
    tx.info.setdefault(_ANNOUNCEMENTS, []).append(Announcement(channel, payload))


class Database:
    """Connections to one database. Cheap to make; opens nothing until used."""

    def __init__(self, url: str, *, settings: DatabaseSettings | None = None, clock: Clock | None = None) -> None:
        """`url`: `sqlite:///relative`, `sqlite:////absolute` or `postgresql://…`; raises ConfigurationError."""
        self.url = dialects.parse_url(url)
        self.dialect = self.url.get_backend_name()
        self.settings = settings or DatabaseSettings()
        self.listener: Listener | None = None
        self._clock = clock or SystemClock()
        self._closed = False
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        if self.dialect == dialects.SQLITE:
            self._write_lock: asyncio.Lock | None = asyncio.Lock()
            self._one_trip = SqliteWriter(self.url, busy_timeout=self.settings.busy_timeout)
            self._writer = _sqlite_engine(self.url, self.settings, read_only=False)
            self._reader = _sqlite_engine(self.url, self.settings, read_only=True)
        else:
            self._write_lock = None
            self._writer = self._reader = _postgres_engine(self.url, self.settings)

    def __repr__(self) -> str:
        return f"Database({self.url.render_as_string(hide_password=True)})"

    @property
    def safe_url(self) -> str:
        """The URL without its password."""
        return self.url.render_as_string(hide_password=True)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """A write transaction: committed when the block ends, rolled back when it raises.

        Keep the block short and free of foreign awaits: on SQLite every other writer waits for it. Raises
        StorageUnavailable (`details["outcome"]` is `unknown` only if the link broke during COMMIT).
        """
        announcements: list[Announcement] = []
        async with self._entered():
            if self._write_lock is None:
                async with self._committing(announcements) as tx:
                    yield tx
            else:
                async with self._write_lock, self._committing(announcements) as tx:
                    yield tx
        if announcements and self.listener is not None:
            await self.listener(announcements)

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run a plain function in a write transaction: what `transaction` is, cheaper where it happens in every turn.

        On SQLite `work` runs in another thread: it touches nothing but its connection and its arguments, and announces
        nothing. Raises what `transaction` raises.
        """
        if self._write_lock is None:
            async with self.transaction() as tx:
                return await tx.run_sync(work)
        async with self._entered(), self._write_lock:
            return await self._one_trip.run(work)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A read-only transaction, beside any writer. Raises StorageUnavailable."""
        async with self._entered():
            tx = await self._connect(self._reader)
            try:
                with mapped_failures():
                    if self.dialect == dialects.POSTGRES:
                        await tx.execution_options(postgresql_readonly=True)
                    async with tx.begin():
                        yield tx
            finally:
                await self._leave(tx)

    async def run(self, work: Callable[[AsyncConnection], Awaitable[T]], *, idempotent: bool = False) -> T:
        """Run `work(tx)` in a write transaction, again a few times while the database is away.

        A commit whose outcome is unknown is tried again only if `idempotent`. `work` may be called several times.
        """

        async def once() -> T:
            async with self.transaction() as tx:
                return await work(tx)

        return await self._insist(once, idempotent=idempotent)

    async def write_patiently(self, work: Callable[[sa.Connection], T]) -> T:
        """`write`, again a few times while the database is away; `work` may be called several times."""
        return await self._insist(lambda: self.write(work))

    async def _insist(self, once: Callable[[], Awaitable[T]], *, idempotent: bool = False) -> T:
        for delay in (*_RETRY_DELAYS, None):
            try:
                return await once()
            except StorageUnavailable as error:
                safe = idempotent or error.details.get("outcome") == NOT_APPLIED
                if delay is None or not safe or self._closed:
                    raise
                await self._clock.sleep(delay)
        raise AssertionError("unreachable")

    async def query(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work(tx)` in a read transaction, again a few times while the database is away."""
        for delay in (*_RETRY_DELAYS, None):
            try:
                async with self.read() as tx:
                    return await work(tx)
            except StorageUnavailable:
                if delay is None or self._closed:
                    raise
                await self._clock.sleep(delay)
        raise AssertionError("unreachable")

    async def ping(self) -> None:
        """Raise StorageUnavailable unless the database answers."""
        async with self.read() as tx:
            await tx.execute(sa.text("SELECT 1"))

    async def close(self, grace: float = 10.0) -> None:
        """Refuse new work, wait at most `grace` seconds for what is open, close all connections. Idempotent."""
        self._closed = True
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._idle.wait()
        if self._write_lock is not None:
            await self._one_trip.close()
        await self._writer.dispose()
        if self._reader is not self._writer:
            await self._reader.dispose()

    # inside ------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _entered(self) -> AsyncIterator[None]:
        if self._closed:
            raise StorageUnavailable("the database is closed: the server is shutting down")
        self._open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    @asynccontextmanager
    async def _committing(self, announcements: list[Announcement]) -> AsyncIterator[AsyncConnection]:
        tx = await self._connect(self._writer)
        try:
            with mapped_failures():
                began = await tx.begin()
            try:
                with mapped_failures():
                    yield tx
            except BaseException:
                with suppress(sa.exc.SQLAlchemyError, OSError):
                    await began.rollback()
                raise
            with mapped_failures(UNKNOWN if self.dialect == dialects.POSTGRES else NOT_APPLIED):
                await began.commit()
            announcements.extend(tx.info.get(_ANNOUNCEMENTS, ()))
        finally:
            with suppress(sa.exc.SQLAlchemyError):
                tx.info.pop(_ANNOUNCEMENTS, None)
            await self._leave(tx)

    async def _connect(self, engine: AsyncEngine) -> AsyncConnection:
        with mapped_failures(connecting=True):
            return await engine.connect().start()

    async def _leave(self, tx: AsyncConnection) -> None:
        # After close() the pool is gone: a connection given back would live on, and with it aiosqlite's thread.
        with suppress(sa.exc.SQLAlchemyError, OSError):
            if self._closed and not tx.closed:
                await asyncio.shield(tx.invalidate())
            await asyncio.shield(tx.close())


def _sqlite_engine(url: sa.URL, settings: DatabaseSettings, *, read_only: bool) -> AsyncEngine:
    engine = create_async_engine(
        url,
        pool_size=min(settings.pool_size, 4) if read_only else 1,  # one thread each
        max_overflow=0,
        pool_timeout=settings.pool_timeout,
        connect_args={"timeout": settings.busy_timeout},
    )
    save_trips(engine.sync_engine)
    pragmas = dialects.sqlite_pragmas(settings.busy_timeout, read_only=read_only)
    begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"

    @sa.event.listens_for(engine.sync_engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin or commit on its own
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(pragma)
        cursor.close()

    @sa.event.listens_for(engine.sync_engine, "invalidate")
    def _invalidated(connection: Any, _record: Any, _error: Any) -> None:
        # A statement that was cancelled under way keeps its connection open behind the driver's back, and with it the
        # write lock: every writer then waits for `busy_timeout`, until the garbage collection comes by.
        driver = connection.driver_connection
        if (raw := driver._connection) is not None:  # noqa: SLF001
            driver._tx.put_nowait((None, raw.rollback))  # noqa: SLF001 - in the connection's own thread

    @sa.event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _postgres_engine(url: sa.URL, settings: DatabaseSettings) -> AsyncEngine:
    return create_async_engine(
        url,
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_timeout=settings.pool_timeout,
        pool_pre_ping=True,  # one round trip per transaction, so that a restarted Postgres fails nobody
        pool_recycle=1800,
        connect_args={
            "timeout": settings.connect_timeout,
            "statement_cache_size": settings.statement_cache_size,
            "server_settings": {
                "application_name": "claude-wrapper",
                "statement_timeout": str(int(settings.statement_timeout * 1000)),
                "timezone": "UTC",
            },
        },
    )
