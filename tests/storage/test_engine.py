"""Transactions, reads, failures and the end of the database handle, on SQLite and on Postgres."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import ConfigurationError, Conflict, StorageUnavailable
from claude_wrapper.storage import Announcement, Database, DatabaseSettings, announce
from claude_wrapper.storage.dialects import UtcDateTime, insert_ignore, upsert
from claude_wrapper.storage.failures import conflict_when_duplicate
from databases import PostgresServer, SteppedClock, scalar

pytestmark = pytest.mark.anyio

numbers = sa.Table("numbers", sa.MetaData(), sa.Column("a", sa.Integer, primary_key=True), sa.Column("n", sa.Integer))


@pytest.fixture
async def db(empty_database: Database) -> Database:
    async with empty_database.transaction() as tx:
        await tx.run_sync(numbers.create)
    return empty_database


async def insert(tx: AsyncConnection, a: int) -> None:
    await tx.execute(numbers.insert().values(a=a, n=0))


async def insert_then_fail(db: Database, a: int) -> None:
    async with db.transaction() as tx:
        await insert(tx, a)
        announce(tx, "c", b"never")
        raise KeyError(a)


async def test_a_block_that_raises_leaves_nothing_behind(db: Database) -> None:
    with pytest.raises(KeyError):
        await insert_then_fail(db, 1)
    assert await scalar(db, "SELECT count(*) FROM numbers") == 0


async def test_a_cancelled_block_leaves_nothing_behind_and_the_next_one_works(db: Database) -> None:
    entered = asyncio.Event()

    async def hang() -> None:
        async with db.transaction() as tx:
            await insert(tx, 1)
            entered.set()
            await asyncio.Event().wait()

    async with asyncio.timeout(20):
        hanging = asyncio.create_task(hang())
        await entered.wait()
        hanging.cancel()
        await asyncio.wait([hanging])
        async with db.transaction() as tx:
            await insert(tx, 2)
    assert await scalar(db, "SELECT sum(a) FROM numbers") == 2


async def test_a_cancellation_at_any_moment_of_a_transaction_leaves_the_database_usable(db: Database) -> None:
    async def write(a: int) -> None:
        async with db.transaction() as tx:
            await insert(tx, a)

    async with asyncio.timeout(60):
        for steps in range(40):
            writing = asyncio.create_task(write(steps))
            for _ in range(steps):
                await asyncio.sleep(0)
            writing.cancel()
            await asyncio.wait([writing])
        await write(1000)
    assert await scalar(db, "SELECT count(*) FROM numbers WHERE a = 1000") == 1


# Plain functions --------------------------------------------------------------------------------------------------------


def add_row(a: int) -> Callable[[sa.Connection], None]:
    def work(tx: sa.Connection) -> None:
        tx.execute(numbers.insert().values(a=a, n=0))

    return work


async def test_a_plain_function_is_committed_when_it_returns_and_rolled_back_when_it_raises(db: Database) -> None:
    def fail(tx: sa.Connection) -> None:
        add_row(2)(tx)
        raise KeyError(2)

    await db.write(add_row(1))
    with pytest.raises(KeyError):
        await db.write(fail)
    with pytest.raises(sa.exc.IntegrityError):
        await db.write(add_row(1))
    await db.write(add_row(3))
    assert await scalar(db, "SELECT sum(a) FROM numbers") == 4


async def test_functions_and_blocks_take_turns(db: Database) -> None:
    await db.write(add_row(0))

    def more(tx: sa.Connection) -> None:
        tx.execute(numbers.update().values(n=numbers.c.n + 1))

    async def block() -> None:
        async with db.transaction() as tx:
            await tx.run_sync(more)

    async with asyncio.timeout(30):
        await asyncio.gather(*(one for _ in range(20) for one in (db.write(more), block())))
    assert await scalar(db, "SELECT n FROM numbers") == 40


async def test_a_cancellation_at_any_moment_of_a_function_leaves_the_database_usable(db: Database) -> None:
    async with asyncio.timeout(60):
        for steps in range(12):
            writing = asyncio.ensure_future(db.write(add_row(steps)))
            for _ in range(steps):
                await asyncio.sleep(0)
            writing.cancel()
            await asyncio.wait([writing])
        await db.write(add_row(1000))
    assert await scalar(db, "SELECT count(*) FROM numbers WHERE a = 1000") == 1


async def test_a_function_whose_caller_was_cancelled_meanwhile_is_rolled_back(sqlite_url: str) -> None:
    db = Database(sqlite_url)
    await db.write(numbers.create)
    begun, go_on = threading.Event(), threading.Event()

    def slow(tx: sa.Connection) -> None:
        add_row(1)(tx)
        begun.set()
        assert go_on.wait(20)

    writing = asyncio.ensure_future(db.write(slow))
    assert await asyncio.to_thread(begun.wait, 20)
    writing.cancel()
    await asyncio.sleep(0)
    assert not writing.done()  # it ends when its transaction has
    go_on.set()
    await asyncio.wait([writing], timeout=20)
    assert writing.cancelled()
    await db.write(add_row(2))
    assert await scalar(db, "SELECT sum(a) FROM numbers") == 2
    await db.close()


async def test_a_function_waits_for_another_process_no_longer_than_allowed(sqlite_url: str) -> None:
    one = Database(sqlite_url)
    two = Database(sqlite_url, settings=DatabaseSettings(busy_timeout=0.05))
    await one.write(numbers.create)
    async with one.transaction() as tx:
        await insert(tx, 1)
        with pytest.raises(StorageUnavailable):
            await two.write(add_row(2))
    await two.write_patiently(add_row(2))
    await one.close()
    await two.close()
    await two.close()
    with pytest.raises(StorageUnavailable):
        await two.write(add_row(3))


async def test_a_read_cannot_write(db: Database) -> None:
    async def write() -> None:
        async with db.read() as tx:
            await insert(tx, 1)

    with pytest.raises((sa.exc.DBAPIError, StorageUnavailable)):
        await write()
    assert await scalar(db, "SELECT count(*) FROM numbers") == 0


async def test_reads_run_beside_an_open_write_and_do_not_see_it(db: Database) -> None:
    async with db.transaction() as tx:
        await insert(tx, 1)
        async with asyncio.timeout(20):
            assert await scalar(db, "SELECT count(*) FROM numbers") == 0
    assert await scalar(db, "SELECT count(*) FROM numbers") == 1


async def test_fifty_writers_at_once_all_get_their_turn(db: Database) -> None:
    async with db.transaction() as tx:
        await insert(tx, 1)

    async def add() -> None:
        async with db.transaction() as tx:
            await tx.execute(numbers.update().values(n=numbers.c.n + 1))

    async with asyncio.timeout(30):
        await asyncio.gather(*(add() for _ in range(50)))
    assert await scalar(db, "SELECT n FROM numbers") == 50


async def test_two_processes_handles_write_to_one_sqlite_file_without_an_error(sqlite_url: str) -> None:
    one, two = Database(sqlite_url), Database(sqlite_url)
    try:
        async with one.transaction() as tx:
            await tx.run_sync(numbers.create)
        async with asyncio.timeout(60):
            await asyncio.gather(*(_insert_one(db, 2 * n + k) for n in range(30) for k, db in enumerate((one, two))))
        assert await scalar(one, "SELECT count(*) FROM numbers") == 60
    finally:
        await one.close()
        await two.close()


async def _insert_one(db: Database, a: int) -> None:
    async with db.transaction() as tx:
        await insert(tx, a)


async def test_a_duplicate_becomes_a_conflict_where_the_caller_says_so(db: Database) -> None:
    async def twice() -> None:
        async with db.transaction() as tx:
            await insert(tx, 1)
            with conflict_when_duplicate("there is one already"):
                await insert(tx, 1)

    with pytest.raises(Conflict, match="already"):
        await twice()
    assert await scalar(db, "SELECT count(*) FROM numbers") == 0


async def test_inserts_can_ignore_or_add_to_what_is_there(db: Database) -> None:
    async with db.transaction() as tx:
        for _ in range(2):
            await tx.execute(insert_ignore(db.dialect, numbers, ["a"]).values(a=1, n=5))
        add = upsert(db.dialect, numbers, ["a"], {"n": lambda new: numbers.c.n + new.n})
        await tx.execute(add, [{"a": 1, "n": 2}, {"a": 2, "n": 7}])
    assert await scalar(db, "SELECT n FROM numbers WHERE a = 1") == 7
    assert await scalar(db, "SELECT n FROM numbers WHERE a = 2") == 7


# Announcements --------------------------------------------------------------------------------------------------------


async def test_announcements_are_heard_after_the_commit_and_never_after_a_rollback(db: Database) -> None:
    heard: list[Announcement] = []

    async def listen(announcements: Sequence[Announcement]) -> None:
        assert await scalar(db, "SELECT count(*) FROM numbers") == 1
        heard.extend(announcements)

    db.listener = listen
    with pytest.raises(KeyError):
        await insert_then_fail(db, 1)
    async with db.transaction() as tx:
        await insert(tx, 1)
        announce(tx, "c", b"x")
        assert heard == []
    async with db.transaction():
        pass
    assert heard == [Announcement("c", b"x")]


# Times ----------------------------------------------------------------------------------------------------------------


async def test_times_come_back_aware_and_in_utc_and_naive_ones_are_refused(db: Database) -> None:
    times = sa.Table("times", sa.MetaData(), sa.Column("at", UtcDateTime()))
    given = datetime(2026, 11, 20, 1, 2, 3, 456789, tzinfo=timezone(timedelta(hours=5)))
    async with db.transaction() as tx:
        await tx.run_sync(times.create)
        await tx.execute(times.insert(), [{"at": given}, {"at": None}])
        found = (await tx.execute(sa.select(times.c.at).where(times.c.at.is_not(None)))).scalar()
        assert (await tx.execute(sa.select(times.c.at).where(times.c.at <= given))).scalar() == given
    assert found == given
    assert found is not None
    assert found.tzinfo is UTC

    async def naive() -> None:
        async with db.transaction() as tx:
            await tx.execute(times.insert(), {"at": datetime(2026, 1, 1)})  # noqa: DTZ001

    with pytest.raises((sa.exc.StatementError, ValueError), match="aware"):
        await naive()


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "cannot be read"),
        ("mysql://u:secret@h/d", "not supported"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_showing_its_password(url: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        Database(url)
    assert "secret" not in str(caught.value)


def test_the_handle_never_shows_its_password() -> None:
    assert "secret" not in repr(Database("postgresql://u:secret@h/d")) + Database("postgresql://u:secret@h/d").safe_url


async def test_a_server_that_is_not_there_is_storage_unavailable() -> None:
    db = Database("postgresql://nobody@127.0.0.1:1/none", settings=DatabaseSettings(connect_timeout=2))
    with pytest.raises(StorageUnavailable) as caught:
        await db.ping()
    assert caught.value.retryable
    await db.close()


async def test_a_sqlite_file_that_cannot_be_made_is_storage_unavailable(tmp_path: Path) -> None:
    db = Database(f"sqlite:///{tmp_path / 'missing' / 'x.db'}")
    with pytest.raises(StorageUnavailable, match="unable to open"):
        await db.ping()
    await db.close()


async def test_a_file_error_in_the_block_stays_what_it_is(db: Database, tmp_path: Path) -> None:
    async def read_file() -> None:
        async with db.transaction():
            (tmp_path / "nothing").read_text()

    with pytest.raises(FileNotFoundError):
        await read_file()


async def test_a_full_disk_is_storage_unavailable_and_nothing_is_half_written(sqlite_url: str) -> None:
    db = Database(sqlite_url)
    try:
        async with db.transaction() as tx:
            await tx.execute(sa.text("CREATE TABLE big (b blob)"))
            pages = (await tx.execute(sa.text("PRAGMA page_count"))).scalar()
            await tx.execute(sa.text(f"PRAGMA max_page_count = {pages}"))

        async def fill() -> None:
            async with db.transaction() as tx:
                for _ in range(100):
                    await tx.execute(sa.text("INSERT INTO big VALUES (zeroblob(100000))"))

        with pytest.raises(StorageUnavailable, match="full"):
            await fill()
        assert await scalar(db, "SELECT count(*) FROM big") == 0
    finally:
        await db.close()


async def test_when_postgres_is_restarted_the_turn_in_flight_fails_and_the_next_one_works(
    own_postgres: PostgresServer,
) -> None:
    db = Database(own_postgres.admin_url, clock=SteppedClock())

    async def cut_off() -> None:
        async with db.transaction() as tx:
            await insert(tx, 1)
            await asyncio.to_thread(own_postgres.kill)
            await insert(tx, 2)

    try:
        async with asyncio.timeout(60):
            async with db.transaction() as tx:
                await tx.run_sync(numbers.create)
            with pytest.raises(StorageUnavailable) as caught:
                await cut_off()
            assert caught.value.details == {"outcome": "not_applied"}
            with pytest.raises(StorageUnavailable):
                await db.run(lambda tx: insert(tx, 3))
            await asyncio.to_thread(own_postgres.start)
            await db.run(lambda tx: insert(tx, 4))
            assert await scalar(db, "SELECT sum(a) FROM numbers") == 4
    finally:
        await db.close()


async def test_work_is_tried_again_while_the_database_is_away_but_not_after_an_unknown_commit(db: Database) -> None:
    tries = 0

    async def flaky(tx: AsyncConnection) -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise StorageUnavailable(details={"outcome": "not_applied"})
        return "done"

    assert await db.run(flaky) == "done"
    tries = 0

    async def unknown(tx: AsyncConnection) -> None:
        nonlocal tries
        tries += 1
        raise StorageUnavailable(details={"outcome": "unknown"})

    with pytest.raises(StorageUnavailable):
        await db.run(unknown)
    assert tries == 1
    with pytest.raises(StorageUnavailable):
        await db.run(unknown, idempotent=True)
    assert tries == 5


# The end --------------------------------------------------------------------------------------------------------------


async def test_closing_waits_for_open_work_and_refuses_new_work(db: Database) -> None:
    async with asyncio.timeout(20):
        async with db.transaction() as tx:
            await insert(tx, 1)
            closing = asyncio.create_task(db.close())
            await asyncio.sleep(0)
            with pytest.raises(StorageUnavailable, match="shutting down"):
                await db.ping()
        await closing
        await db.close()


@pytest.mark.parametrize("left_open", [False, True])
def test_a_process_that_used_sqlite_ends_even_if_a_transaction_was_left_open(tmp_path: Path, left_open: bool) -> None:
    program = """
import asyncio, sys
import sqlalchemy as sa
from claude_wrapper.storage import Database
async def main():
    db = Database(sys.argv[1])
    await db.ping()
    async with db.transaction() as tx:
        await tx.execute(sa.text("CREATE TABLE t (a int)"))
        if sys.argv[2] == "True":
            await db.close(grace=0.01)
    await db.close()
asyncio.run(main())
"""
    url = f"sqlite:///{tmp_path / 'x.db'}"
    subprocess.run([sys.executable, "-c", program, url, str(left_open)], timeout=60, check=True)


async def test_a_write_that_is_cancelled_at_any_moment_does_not_lock_out_the_next(sqlite_url: str) -> None:
    db = Database(sqlite_url)

    async def write() -> None:
        async with db.transaction() as tx:
            await tx.execute(sa.text("CREATE TABLE IF NOT EXISTS one (a INTEGER)"))
            await tx.execute(sa.text("INSERT INTO one VALUES (1)"))
            await tx.execute(sa.text("SELECT count(*) FROM one"))

    try:
        for turns in range(120):
            writing = asyncio.ensure_future(write())
            for _ in range(turns % 40):
                await asyncio.sleep(0.0001)
            writing.cancel()
            await asyncio.wait({writing})
            async with asyncio.timeout(5):  # far below the ten seconds that a writer waits for a lock
                await write()
    finally:
        await db.close(grace=5)
