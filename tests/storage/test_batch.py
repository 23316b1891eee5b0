"""The batching writer: durability, order, back-pressure, outages and the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import SystemClock
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage import Database
from claude_wrapper.storage.batch import BatchSettings, BatchWriter, insert_rows
from databases import SteppedClock, scalar

pytestmark = pytest.mark.anyio

rows = sa.Table("rows", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("text", sa.String(5)))


@pytest.fixture
async def db(empty_database: Database) -> Database:
    async with empty_database.transaction() as tx:
        await tx.run_sync(rows.create)
    return empty_database


def inserting(db: Database) -> Any:
    return insert_rows(db, rows, lambda n: {"id": n, "text": str(n)}, ["id"])


class Away:
    """Stands before a database and fails its first transactions."""

    def __init__(self, db: Database, failures: int, *, after_commit: bool = False) -> None:
        self.db, self.failures, self.after_commit = db, failures, after_commit

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        if self.failures and not self.after_commit:
            self.failures -= 1
            raise StorageUnavailable(details={"outcome": "not_applied"})
        async with self.db.transaction() as tx:
            yield tx
        if self.failures:
            self.failures -= 1
            raise StorageUnavailable(details={"outcome": "unknown"})


async def count(db: Database) -> int:
    return int(await scalar(db, "SELECT count(*) FROM rows"))


async def test_a_durable_row_is_in_the_database_when_put_returns(db: Database) -> None:
    writer = BatchWriter[int](db, inserting(db), SystemClock(), settings=BatchSettings(max_wait=60))
    writer.start()
    async with asyncio.timeout(20):
        await writer.put(1, durable=True)
        assert await count(db) == 1
        assert await writer.close() == ()


async def test_a_thousand_rows_take_few_transactions_and_all_arrive(db: Database) -> None:
    sizes: list[int] = []
    write = inserting(db)

    async def counted(tx: AsyncConnection, batch: Sequence[int]) -> None:
        sizes.append(len(batch))
        await write(tx, batch)

    writer = BatchWriter[int](db, counted, SystemClock(), settings=BatchSettings(max_rows=200))
    writer.start()
    async with asyncio.timeout(30):
        for n in range(1000):
            await writer.put(n)
        await writer.flush()
    assert await count(db) == 1000
    assert len(sizes) <= 6
    assert (writer.written, writer.pending) == (1000, 0)
    await writer.close()


async def test_rows_that_are_put_twice_land_once(db: Database) -> None:
    writer = BatchWriter[int](db, inserting(db), SystemClock())
    writer.start()
    async with asyncio.timeout(20):
        await asyncio.gather(*(writer.put(n % 10, durable=True) for n in range(100)))
    assert await count(db) == 10
    await writer.close()


async def test_an_outage_delays_rows_and_loses_none(db: Database) -> None:
    clock = SteppedClock()
    writer = BatchWriter[int](Away(db, 5), inserting(db), clock)  # type: ignore[arg-type]
    writer.start()
    async with asyncio.timeout(20):
        await asyncio.gather(*(writer.put(n, durable=True) for n in range(20)))
    assert await count(db) == 20
    assert writer.failures == 5
    assert clock.seconds >= 1000 + 0.1 + 0.2 + 0.4 + 0.8 + 1.6
    await writer.close()


async def test_a_commit_whose_outcome_is_unknown_is_repeated_and_still_lands_once(db: Database) -> None:
    writer = BatchWriter[int](Away(db, 3, after_commit=True), inserting(db), SteppedClock())  # type: ignore[arg-type]
    writer.start()
    async with asyncio.timeout(20):
        await asyncio.gather(*(writer.put(n, durable=True) for n in range(20)))
    assert await count(db) == 20
    await writer.close()


async def test_a_full_buffer_makes_callers_wait_and_never_grows(db: Database) -> None:
    settings = BatchSettings(max_rows=5, capacity=10)
    writer = BatchWriter[int](db, inserting(db), SystemClock(), settings=settings)
    most = 0

    async def put(n: int) -> None:
        nonlocal most
        await writer.put(n)
        most = max(most, writer.pending)

    async with asyncio.timeout(30):
        putting = [asyncio.create_task(put(n)) for n in range(100)]
        await asyncio.sleep(0)
        assert writer.pending == 10
        writer.start()
        await asyncio.gather(*putting)
        await writer.flush()
    assert most <= 10
    assert await count(db) == 100
    await writer.close()


async def test_a_row_that_the_database_refuses_is_given_up_alone_and_loudly(db: Database) -> None:
    refused: list[tuple[int, Exception]] = []

    def row(n: int) -> dict[str, Any]:
        return {"id": n, "text": None if n != 7 else object()}

    writer = BatchWriter[int](
        db,
        insert_rows(db, rows, row, ["id"]),
        SystemClock(),
        on_rejected=lambda n, error: refused.append((n, error)),
    )
    writer.start()
    async with asyncio.timeout(30):
        results = await asyncio.gather(*(writer.put(n, durable=True) for n in range(20)), return_exceptions=True)
    assert [n for n, result in enumerate(results) if result is not None] == [7]
    assert [n for n, _ in refused] == [7]
    assert await count(db) == 19
    await writer.close()


async def test_closing_writes_what_is_left(db: Database) -> None:
    writer = BatchWriter[int](db, inserting(db), SystemClock(), settings=BatchSettings(max_wait=60))
    writer.start()
    for n in range(50):
        await writer.put(n)
    async with asyncio.timeout(20):
        assert await writer.close() == ()
    assert await count(db) == 50
    with pytest.raises(StorageUnavailable, match="closed"):
        await writer.put(51)


async def test_closing_while_the_database_is_away_hands_the_rows_back(db: Database) -> None:
    writer = BatchWriter[int](Away(db, 10**9), inserting(db), SystemClock())  # type: ignore[arg-type]
    writer.start()
    durable = asyncio.create_task(writer.put(0, durable=True))
    await asyncio.sleep(0)
    for n in range(1, 20):
        await writer.put(n)
    async with asyncio.timeout(20):
        assert await writer.close(grace=0.05) == tuple(range(20))
        with pytest.raises(StorageUnavailable):
            await durable


async def test_a_caller_that_hangs_up_does_not_take_its_row_back(db: Database) -> None:
    writer = BatchWriter[int](db, inserting(db), SystemClock())
    putting = asyncio.create_task(writer.put(1, durable=True))
    await asyncio.sleep(0)
    putting.cancel()
    await asyncio.wait([putting])
    writer.start()
    async with asyncio.timeout(20):
        await writer.flush()
    assert await count(db) == 1
    await writer.close()
