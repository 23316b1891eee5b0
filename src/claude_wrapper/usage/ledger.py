"""The ledger: one row per upstream call, exactly once, whatever happens to the database.

`record` returns when the row is safe: committed, or (database away) synchronised to the local spill file. Calls that
end at the same time share a commit: whoever comes while a commit runs goes with the next one, so that a lone call does not
wait and a thousand do not commit a thousand times. The primary key is the call's id and an insert that conflicts does
nothing: writing a row again, after a time-out of unknown outcome or from the spill, changes nothing. Hourly sums are added
in the same transaction, for rows that were new.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

import sqlalchemy as sa
from sqlalchemy.sql.dml import ReturningInsert

from claude_wrapper.clock import Clock
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage import Database, dialects
from claude_wrapper.storage.tables.usage import usage_calls
from claude_wrapper.usage import rollups
from claude_wrapper.usage.entries import LATER_COLUMNS, Call, Row, row_of
from claude_wrapper.usage.prices import PriceBook
from claude_wrapper.usage.spill import Spill


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """How the ledger writes."""

    linger_seconds: float = 0.0
    """How long a row waits for others, so that they share a commit (1.1 ms of CPU alone, 0.06 ms among 64)."""
    batch_rows: int = 500
    """Rows per commit at most; 30 columns each must stay below SQLite's 32 766 parameters."""
    write_seconds: float = 10.0
    """A commit that takes longer counts as the database being away."""
    retry_seconds: float = 5.0
    """After the database failed, how long rows go straight to the spill; also how often the spill is drained."""
    most_in_memory: int = 10_000
    """Rows kept in memory while neither the database nor the disk takes them; further ones are lost, and counted."""


@dataclass(slots=True)
class LedgerCounts:
    """What happened, for whoever exports metrics."""

    written: int = 0
    duplicates: int = 0
    spilled: int = 0
    drained: int = 0
    rejected: int = 0
    lost: int = 0
    """Rows that neither database nor disk nor memory could keep: anything but 0 is an incident."""


@dataclass(slots=True)
class _Waiting:
    row: Row
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Ledger:
    """Implements `broker.CallSink`."""

    def __init__(
        self,
        database: Database,
        prices: PriceBook,
        spill: Spill,
        clock: Clock,
        *,
        settings: LedgerSettings | None = None,
        counts: LedgerCounts | None = None,
    ) -> None:
        self._database = database
        self._prices = prices
        self._spill = spill
        self._clock = clock
        self._settings = settings or LedgerSettings()
        self.counts = counts or LedgerCounts()
        self._pricing: set[asyncio.Task[None]] = set()
        self._queue: deque[_Waiting] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._writing: list[_Waiting] = []
        self._in_memory: list[Row] = []
        self._away_until = float("-inf")

    @property
    def pending(self) -> int:
        """Rows that are neither in the database nor on the disk."""
        return len(self._pricing) + len(self._queue) + len(self._writing) + len(self._in_memory)

    async def record(self, call: Call) -> None:
        """Write one finished call. Returns when it is safe; a caller that is cancelled does not take the row with it.

        Raises StorageUnavailable if neither the database nor the disk took it (it is kept in memory and tried again).
        """
        task = asyncio.get_running_loop().create_task(self._record(call))
        self._pricing.add(task)
        await asyncio.shield(task)

    async def _record(self, call: Call) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - started by `record`
        try:
            priced = await self._prices.priced(call.org or "", call.model or "", call.usage, call.started_at)
            saved = 0
            if call.cache_hit:
                saved = await self._prices.micros(call.org or "", call.model or "", call.saved, call.started_at)
            waiting = _Waiting(row_of(call, priced, saved))
            self._queue.append(waiting)
        finally:
            self._pricing.discard(task)
        self._ensure_writer()
        await waiting.done

    async def flush(self) -> None:
        """Return when everything recorded so far is safe."""
        while self._pricing or self._writer is not None:
            await (asyncio.wait(self._pricing) if self._writer is None else asyncio.shield(self._writer))

    async def drain(self) -> int:
        """Bring what waits in memory and on the disk into the database; how many rows. Raises StorageUnavailable."""
        in_memory, self._in_memory = self._in_memory, []
        try:
            while in_memory:
                await self._commit(in_memory[: self._settings.batch_rows])
                del in_memory[: self._settings.batch_rows]
            drained = await self._spill.drain(self._commit)
        except BaseException:
            self._in_memory = in_memory + self._in_memory
            raise
        self.counts.drained += drained
        return drained

    async def keep(self) -> None:
        """Drain whatever waits, for ever; the composition root runs it as a task, from the start of the server on."""
        while True:
            if self._in_memory or self._spill.waiting:
                with suppress(StorageUnavailable):
                    await self.drain()
            await self._clock.sleep(self._settings.retry_seconds)

    async def close(self, grace: float = 10.0) -> None:
        """Write what is queued, within `grace` seconds; what the database does not take goes to the disk."""
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self.flush()
        if self._writer is not None:
            self._writer.cancel()
        waiting = [*self._writing, *self._queue]
        self._queue.clear()
        rest = [*self._in_memory, *(one.row for one in waiting)]
        error: StorageUnavailable | None = None
        if rest:
            try:
                await self._spill.append(rest)  # also what may have been committed: writing it again changes nothing
                self._in_memory = []
            except StorageUnavailable as failed:
                error = failed
                self.counts.lost += len(rest)
        _answer(waiting, error)
        await self._spill.close()

    # inside ------------------------------------------------------------------------------------------------------------

    def _ensure_writer(self) -> None:
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_queue(), name="ledger-writer")

    async def _write_queue(self) -> None:
        try:
            while self._queue:
                if self._settings.linger_seconds:
                    await self._clock.sleep(self._settings.linger_seconds)
                size = min(len(self._queue), self._settings.batch_rows)
                self._writing = [self._queue.popleft() for _ in range(size)]
                _answer(self._writing, await self._save([waiting.row for waiting in self._writing]))
                self._writing = []
        finally:
            self._writer = None

    async def _save(self, rows: Sequence[Row]) -> StorageUnavailable | None:
        """Commit, else spill, else keep in memory. The error of the last if nothing durable worked."""
        if self._away_until <= self._clock.monotonic():
            try:
                await self._commit(rows)
            except StorageUnavailable:
                self._away_until = self._clock.monotonic() + self._settings.retry_seconds
            else:
                return None
        try:
            await self._spill.append(rows)
        except StorageUnavailable as error:
            room = max(0, self._settings.most_in_memory - len(self._in_memory))
            self._in_memory.extend(rows[:room])
            self.counts.lost += len(rows[room:])
            return error
        self.counts.spilled += len(rows)
        return None

    async def _commit(self, rows: Sequence[Row]) -> None:
        """One transaction; raises StorageUnavailable. A row that can never be written is set aside, not its batch."""
        try:
            new = await self._bounded(rows)
        except StorageUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 (whatever a driver raises for a value: the other rows must get in)
            if len(rows) == 1:
                await self._spill.reject(rows[0], f"{type(error).__name__}: {str(error)[:500]}")
                self.counts.rejected += 1
                return
            for row in rows:
                await self._commit([row])
            return
        self.counts.written += new
        self.counts.duplicates += len(rows) - new

    async def _bounded(self, rows: Sequence[Row]) -> int:
        try:
            async with asyncio.timeout(self._settings.write_seconds):
                return await self._database.write(lambda connection: insert(connection, rows))
        except TimeoutError as error:
            raise StorageUnavailable("the database did not commit usage in time") from error


def _answer(batch: Sequence[_Waiting], error: StorageUnavailable | None) -> None:
    for waiting in batch:
        if waiting.done.done():
            continue
        if error is None:
            waiting.done.set_result(None)
        else:
            waiting.done.set_exception(error)
            waiting.done.exception()  # read: a caller that has gone does not make the loop complain


def insert(tx: sa.Connection, rows: Sequence[Row]) -> int:
    """Add rows to the ledger and its sums; how many were new. The same row twice, here or before, is one row."""
    ordered = sorted(
        rows, key=lambda row: row["id"]
    )  # two writers of the same rows must not wait for each other crosswise
    inserted = set(tx.execute(_insertion(tx.dialect.name), [{**LATER_COLUMNS, **row} for row in ordered]).scalars())
    fresh = {row["id"]: row for row in reversed(ordered) if row["id"] in inserted}  # of equal ids the first was kept
    rollups.add(tx, fresh.values())
    return len(fresh)


@cache
def _insertion(dialect: str) -> ReturningInsert[tuple[str]]:
    # Built once: SQLAlchemy takes longer to build and recognise it than SQLite to run it.
    return dialects.insert_ignore(dialect, usage_calls, ("id",)).returning(usage_calls.c.id)
