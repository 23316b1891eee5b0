"""One writer for rows that come one at a time and may be written many at a time: usage, events, last uses.

`put` gives a row to a bounded buffer and waits while it is full, so a database that is away slows callers down instead of
losing rows. One loop writes batches, in order, and tries again for as long as the database is away. A batch whose commit
had an unknown outcome is written again: the rows carry unique keys and `insert_rows` ignores those already there, so each
row lands exactly once. A batch that the database refuses is split until the refused rows are found; only those are given
up, loudly.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage import dialects
from claude_wrapper.storage.engine import Database

T = TypeVar("T")

Write = Callable[[AsyncConnection, Sequence[T]], Awaitable[None]]
Rejected = Callable[[T, Exception], None]


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """When a batch is written."""

    max_rows: int = 500
    """Rows per transaction."""
    max_wait: float = 0.05
    """Seconds that a row may wait for company."""
    capacity: int = 10_000
    """Rows in memory before `put` waits."""
    retry_min: float = 0.1
    """Seconds before the first repetition while the database is away; doubled up to `retry_max`."""
    retry_max: float = 5.0


@dataclass(slots=True)
class _Waiting(Generic[T]):
    row: T
    durable: asyncio.Future[None] | None = field(default=None)


def insert_rows(
    db: Database, table: sa.Table, to_row: Callable[[T], Mapping[str, Any]], unique: Sequence[str]
) -> Write[T]:
    """A `Write` that inserts rows of `table` and ignores those whose `unique` columns are already there."""
    statement = dialects.insert_ignore(db.dialect, table, unique)

    async def write(tx: AsyncConnection, rows: Sequence[T]) -> None:
        await tx.execute(statement, [dict(to_row(row)) for row in rows])

    return write


class BatchWriter(Generic[T]):
    """Start it, `put` rows, close it. `write` runs in a transaction of its own and may be repeated for the same rows."""

    def __init__(
        self,
        db: Database,
        write: Write[T],
        clock: Clock,
        *,
        settings: BatchSettings | None = None,
        on_rejected: Rejected[T] | None = None,
    ) -> None:
        """`on_rejected(row, error)` is told of each row that the database refuses for good."""
        self._db = db
        self._write = write
        self._clock = clock
        self._settings = settings or BatchSettings()
        self._on_rejected = on_rejected
        self._rows: deque[_Waiting[T]] = deque()
        self._in_flight: list[_Waiting[T]] = []
        self._arrived = asyncio.Event()
        self._hurry = asyncio.Event()
        self._room = asyncio.Condition()
        self._accepted = 0
        self._finished = 0
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self.written = 0
        self.rejected = 0
        self.failures = 0
        """Writes that failed because the database was away."""

    @property
    def pending(self) -> int:
        """Rows that are not yet in the database."""
        return len(self._rows) + len(self._in_flight)

    def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.create_task(self._loop(), name="batch writer")

    async def put(self, row: T, *, durable: bool = False) -> None:
        """Give a row; waits while the buffer is full. With `durable`, returns when it is committed.

        A caller that is cancelled while it waits for durability does not take the row back. Raises StorageUnavailable
        once the writer is closed, and what the database said of this row if it was refused (only with `durable`).
        """
        if self.pending >= self._settings.capacity:
            async with self._room:
                await self._room.wait_for(lambda: self.pending < self._settings.capacity or self._closing)
        if self._closing:
            raise StorageUnavailable("the writer is closed: the server is shutting down")
        waiting = _Waiting(row, asyncio.get_running_loop().create_future() if durable else None)
        self._rows.append(waiting)
        self._accepted += 1
        self._arrived.set()
        if waiting.durable is not None:
            # Nobody gains by waiting for company: whoever comes while this batch is written makes the next one.
            self._hurry.set()
            await asyncio.shield(waiting.durable)
        elif len(self._rows) >= self._settings.max_rows:
            self._hurry.set()

    async def flush(self) -> None:
        """Return when everything that was put before is committed or refused."""
        target = self._accepted
        self._hurry.set()
        async with self._room:
            await self._room.wait_for(lambda: self._finished >= target)

    async def close(self, grace: float = 10.0) -> tuple[T, ...]:
        """Write what is left, for at most `grace` seconds; the rows that could not be written, for the caller to keep."""
        self._closing = True
        self._arrived.set()
        self._hurry.set()
        async with self._room:
            self._room.notify_all()
        task, self._task = self._task, None
        if task is not None:
            await asyncio.wait([task], timeout=grace)
            if not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=1.0)
        left = [*self._in_flight, *self._rows]
        for waiting in left:
            _fail(waiting, StorageUnavailable("the server ended before this was written"))
        self._rows.clear()
        self._in_flight = []
        return tuple(waiting.row for waiting in left)

    # inside ------------------------------------------------------------------------------------------------------------

    async def _loop(self) -> None:
        while self._rows or not self._closing:
            if not self._rows:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            await self._gather()
            count = min(len(self._rows), self._settings.max_rows)
            self._in_flight = [self._rows.popleft() for _ in range(count)]
            await self._store(self._in_flight)
            self._in_flight = []
            self._finished += count
            async with self._room:
                self._room.notify_all()

    async def _gather(self) -> None:
        """Wait a moment for company, unless somebody is in a hurry."""
        if not self._hurry.is_set() and not self._closing:
            waiting = asyncio.ensure_future(self._hurry.wait())
            sleeping = asyncio.ensure_future(self._clock.sleep(self._settings.max_wait))
            try:
                await asyncio.wait([waiting, sleeping], return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
                sleeping.cancel()
        self._hurry.clear()

    async def _store(self, batch: Sequence[_Waiting[T]]) -> None:
        """Write a batch, however long it takes; split it if the database refuses it."""
        delay = self._settings.retry_min
        while True:
            try:
                async with self._db.transaction() as tx:
                    await self._write(tx, [waiting.row for waiting in batch])
            except StorageUnavailable:
                self.failures += 1
                await self._clock.sleep(delay)
                delay = min(delay * 2, self._settings.retry_max)
            except (sa.exc.SQLAlchemyError, ValueError, TypeError) as error:
                await self._refused(batch, error)
                return
            else:
                self.written += len(batch)
                for waiting in batch:
                    if waiting.durable is not None and not waiting.durable.done():
                        waiting.durable.set_result(None)
                return

    async def _refused(self, batch: Sequence[_Waiting[T]], error: Exception) -> None:
        if len(batch) > 1:
            middle = len(batch) // 2
            await self._store(batch[:middle])
            await self._store(batch[middle:])
            return
        self.rejected += 1
        _fail(batch[0], error)
        if self._on_rejected is not None:
            self._on_rejected(batch[0].row, error)


def _fail(waiting: _Waiting[Any], error: Exception) -> None:
    if waiting.durable is not None and not waiting.durable.done():
        waiting.durable.set_exception(error)
        waiting.durable.exception()  # its caller may be gone: then nobody else reads it
