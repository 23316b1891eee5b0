"""One row per call, exactly once, whatever happens to the database and the disk."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from usage_world import NOON, Call, Switched

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage import Database
from claude_wrapper.storage.schema import metadata
from claude_wrapper.storage.tables.usage import usage_calls, usage_hours
from claude_wrapper.testing.clock import ManualClock
from claude_wrapper.usage import Ledger, LedgerSettings, PriceBook, Spill, packaged, rollups
from claude_wrapper.usage.entries import HOUR_MS, Priced, milliseconds, row_of
from claude_wrapper.usage.ledger import insert
from claude_wrapper.wire.usage import Usage
from databases import PostgresServer

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def switched(database: Database) -> Switched:
    return Switched(database)


def make(switched: Any, clock: ManualClock, directory: Path, name: str = "a", **kw: Any) -> Ledger:
    spill = Spill(directory / "spill", name)
    return Ledger(switched, PriceBook(packaged(), None, clock), spill, clock, settings=LedgerSettings(**kw))


@pytest.fixture
def ledger(switched: Switched, clock: ManualClock, tmp_path: Path) -> Ledger:
    return make(switched, clock, tmp_path)


async def rows(db: Any) -> list[dict[str, Any]]:
    async with db.read() as tx:
        return [dict(row) for row in (await tx.execute(sa.select(usage_calls).order_by(usage_calls.c.id))).mappings()]


async def sums(db: Any) -> list[dict[str, Any]]:
    async with db.read() as tx:
        found = await tx.execute(sa.select(usage_hours).order_by(*(usage_hours.c[name] for name in rollups.KEY)))
        return [dict(row) for row in found.mappings()]


async def test_a_call_becomes_a_row_with_its_cost_and_is_summed(ledger: Ledger, switched: Switched) -> None:
    await ledger.record(Call("call_1"))
    (row,) = await rows(switched)
    assert row["cost_micros"] == 2000 + 1000
    assert (row["org_id"], row["session_id"], row["turn_id"]) == ("org_1", "sesn_1", "turn_1")
    assert (row["started_ms"], row["first_byte_ms"], row["total_ms"]) == (milliseconds(NOON), 400, 2000)
    assert row["price_version"] == "2026-11-20"
    (line,) = await sums(switched)
    assert (line["calls"], line["errors"], line["cost_micros"], line["hour"]) == (
        1,
        0,
        3000,
        milliseconds(NOON) // HOUR_MS,
    )


async def test_a_hundred_calls_at_once_share_commits(ledger: Ledger, switched: Switched) -> None:
    await asyncio.gather(*(ledger.record(Call(f"call_{n:03d}")) for n in range(100)))
    assert len(await rows(switched)) == 100
    assert switched.transactions <= 3
    assert (await sums(switched))[0]["calls"] == 100
    assert ledger.pending == 0


async def test_the_same_call_recorded_again_counts_once(ledger: Ledger, switched: Switched) -> None:
    await asyncio.gather(*(ledger.record(Call("call_1")) for _ in range(20)))
    await ledger.record(Call("call_1", usage=Usage(input_tokens=5)))
    (row,) = await rows(switched)
    assert row["input_tokens"] == 1000
    assert [line["calls"] for line in await sums(switched)] == [1]
    assert (ledger.counts.written, ledger.counts.duplicates) == (1, 20)


async def test_usage_of_a_turn_during_which_the_database_goes_away_is_not_lost(
    ledger: Ledger, switched: Switched, clock: ManualClock, tmp_path: Path
) -> None:
    await ledger.record(Call("call_1"))
    switched.away = True
    await ledger.record(Call("call_2"))
    asked = switched.transactions
    await asyncio.gather(*(ledger.record(Call(f"call_{n}")) for n in range(3, 8)))
    assert switched.transactions == asked, "no call waits again for a database that has just failed"
    assert (ledger.counts.spilled, ledger.pending) == (6, 0)
    assert len(await rows(switched)) == 1
    with pytest.raises(StorageUnavailable):
        await ledger.drain()
    switched.away = False
    keeper = asyncio.create_task(ledger.keep())
    async with asyncio.timeout(20):
        await clock.wait_for_sleepers(1)
    keeper.cancel()
    assert [row["id"] for row in await rows(switched)] == [f"call_{n}" for n in range(1, 8)]
    assert [line["calls"] for line in await sums(switched)] == [7]
    assert list((tmp_path / "spill").iterdir()) == []
    await clock.advance(6)
    await ledger.record(Call("call_8"))
    assert ledger.counts.spilled == 6


async def test_a_caller_that_stops_waiting_takes_no_row_along_not_even_while_prices_are_read(
    ledger: Ledger, switched: Switched, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, go = asyncio.Event(), asyncio.Event()
    priced = ledger._prices.priced

    async def slow(*asked: Any) -> Any:
        read.set()
        await go.wait()
        return await priced(*asked)

    monkeypatch.setattr(ledger._prices, "priced", slow)
    recording = asyncio.create_task(ledger.record(Call("call_1")))
    await read.wait()
    recording.cancel()
    await asyncio.wait({recording})
    assert ledger.pending == 1
    go.set()
    await ledger.flush()
    assert [row["id"] for row in await rows(switched)] == ["call_1"]
    assert ledger.pending == 0


async def test_a_commit_of_unknown_outcome_is_written_again_and_counts_once(ledger: Ledger, switched: Switched) -> None:
    switched.forgetful = True
    await ledger.record(Call("call_1"))
    assert len(await rows(switched)) == 1
    switched.forgetful = False
    assert await ledger.drain() == 1
    assert len(await rows(switched)) == 1
    assert [line["calls"] for line in await sums(switched)] == [1]


async def test_what_a_crashed_server_spilled_is_recovered_by_the_next(
    switched: Switched, clock: ManualClock, tmp_path: Path
) -> None:
    switched.away = True
    dead = make(switched, clock, tmp_path, "dead")
    await dead.record(Call("call_1"))
    await dead.record(Call("call_2"))
    living = make(switched, clock, tmp_path, "living")
    switched.away = False
    assert await living.drain() == 0, "a file whose writer lives is not taken"
    opened = dead._spill._open
    assert opened is not None
    os.write(opened.fd, b'{"id": "call_3", "torn')  # what a crash in the middle of a write leaves
    os.close(opened.fd)  # the kernel closes a dead process's files
    assert await living.drain() == 2
    assert [row["id"] for row in await rows(switched)] == ["call_1", "call_2"]
    assert list((tmp_path / "spill").iterdir()) == []


async def test_a_broken_line_is_set_aside_and_the_others_get_in(
    ledger: Ledger, switched: Switched, tmp_path: Path
) -> None:
    directory = tmp_path / "spill"
    directory.mkdir()
    good = json.dumps(row_of(Call("call_1"), Priced(1, "v")))
    (directory / "usage-x-1.ndjson").write_text(f"garbage\n{good}\n[1]\n")
    assert await ledger.drain() == 1
    assert len(await rows(switched)) == 1
    assert (directory / "rejected.ndjson").read_text() == "garbage\n[1]\n"


async def test_a_row_that_no_database_takes_does_not_hold_up_the_others(
    ledger: Ledger, switched: Switched, tmp_path: Path
) -> None:
    bad = Call("call_bad", status="two hundred")  # type: ignore[arg-type]
    await asyncio.gather(
        *(ledger.record(call) for call in (Call("call_1"), bad, Call("call_2"))), return_exceptions=True
    )
    stored = [row["id"] for row in await rows(switched)]
    assert {"call_1", "call_2"} <= set(stored)
    if "call_bad" not in stored:  # SQLite takes text in a column of numbers
        assert ledger.counts.rejected == 1
        assert "call_bad" in (tmp_path / "spill" / "rejected.ndjson").read_text()


async def test_texts_and_numbers_that_upstream_makes_up_are_cut_to_what_fits(
    ledger: Ledger, switched: Switched
) -> None:
    await ledger.record(
        Call("call_1", model="m" * 5000, error_type="e\x00" * 500, usage=Usage(input_tokens=10**30), total_seconds=1e12)
    )
    (row,) = await rows(switched)
    assert (len(row["model"]), row["error_type"], row["input_tokens"]) == (200, "e" * 100, 10**13)


async def test_with_database_and_disk_gone_rows_wait_in_memory_and_the_caller_hears(
    switched: Switched, clock: ManualClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make(switched, clock, tmp_path, most_in_memory=2)
    switched.away = True
    fsync = os.fsync

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for n in range(3):
        with pytest.raises(StorageUnavailable, match="free some disk space"):
            await ledger.record(Call(f"call_{n}"))
    assert (ledger.pending, ledger.counts.lost) == (2, 1)
    monkeypatch.setattr(os, "fsync", fsync)
    await ledger.record(Call("call_3"))
    switched.away = False
    await ledger.drain()
    assert [row["id"] for row in await rows(switched)] == ["call_0", "call_1", "call_3"]
    assert ledger.pending == 0


async def test_a_caller_that_gives_up_does_not_take_its_row_with_it(ledger: Ledger, switched: Switched) -> None:
    task = asyncio.create_task(ledger.record(Call("call_1")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await ledger.flush()
    assert len(await rows(switched)) == 1


async def test_closing_writes_what_is_queued_and_spills_what_the_database_does_not_take(
    switched: Switched, clock: ManualClock, tmp_path: Path
) -> None:
    ledger = make(switched, clock, tmp_path)
    stuck = asyncio.Event()

    async def never(_rows: Any) -> None:
        await stuck.wait()

    ledger._commit = never  # type: ignore[method-assign]
    calls = [asyncio.create_task(ledger.record(Call(f"call_{n}"))) for n in range(3)]
    await asyncio.sleep(0.01)
    calls.append(asyncio.create_task(ledger.record(Call("call_3"))))
    await asyncio.sleep(0.01)
    await ledger.close(grace=0.05)
    await asyncio.gather(*calls)
    following = make(switched, clock, tmp_path, "b")
    assert await following.drain() == 4
    assert len(await rows(switched)) == 4


async def test_drained_rows_go_to_the_hour_in_which_the_call_began(ledger: Ledger, switched: Switched) -> None:
    before_midnight = NOON.replace(hour=23, minute=59, second=59, microsecond=999_999)
    await ledger.record(Call("call_1", started_at=before_midnight))
    await ledger.record(
        Call("call_2", started_at=before_midnight.replace(day=21, hour=0, minute=0, second=0, microsecond=0))
    )
    hours = [line["hour"] for line in await sums(switched)]
    assert [hour % 24 for hour in hours] == [23, 0]
    assert hours[1] == hours[0] + 1


CALLS = st.lists(
    st.builds(
        Call,
        id=st.integers(0, 12).map(lambda n: f"call_{n}"),
        workspace=st.sampled_from([None, "wrkspc_1"]),
        model=st.sampled_from(["claude-opus-5-5", "claude-haiku-5-5"]),
        status=st.sampled_from([200, 429, 529]),
        usage=st.builds(Usage, st.integers(0, 10**6), st.integers(0, 10**6)),
        started_at=st.sampled_from([NOON, NOON.replace(hour=13)]),
    ),
    max_size=30,
)


@given(batches=st.lists(CALLS, max_size=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_sums_are_always_those_of_the_rows(batches: list[list[Call]], sqlite_url: str) -> None:
    async def run() -> None:
        database = Database(sqlite_url)
        async with database.transaction() as tx:
            await tx.execute(sa.delete(usage_calls))
            await tx.execute(sa.delete(usage_hours))
            for batch in batches:
                if batch:
                    rows = [row_of(call, Priced(call.usage.input_tokens * 2, "v")) for call in batch]
                    await tx.run_sync(insert, rows)
        kept = await sums(database)
        hour = milliseconds(NOON) // HOUR_MS
        async with database.transaction() as tx:
            await rollups.rebuild(tx, hour, hour + 1)
        assert await sums(database) == kept
        assert sum(line["calls"] for line in kept) == len({call.id for batch in batches for call in batch})
        await database.close()

    asyncio.run(run())


async def test_sums_can_be_rebuilt_on_both_databases(ledger: Ledger, switched: Switched) -> None:
    await asyncio.gather(*(ledger.record(Call(f"call_{n}", status=200 + 300 * (n % 2))) for n in range(10)))
    kept = await sums(switched)
    hour = milliseconds(NOON) // HOUR_MS
    async with switched.transaction() as tx:
        await tx.execute(sa.update(usage_hours).values(calls=99))
        await rollups.rebuild(tx, hour, hour)
    assert await sums(switched) == kept
    assert kept[0]["errors"] == 5


async def test_two_replicas_that_write_the_same_rows_at_once_agree(
    database: Database, clock: ManualClock, tmp_path: Path
) -> None:
    ledgers = [make(database, clock, tmp_path, name) for name in "abcd"]
    await asyncio.gather(
        *(ledger.record(Call(f"call_{n}", model=f"m{n % 7}")) for ledger in ledgers for n in range(40))
    )
    assert len(await rows(database)) == 40
    assert sum(line["calls"] for line in await sums(database)) == 40
    assert sum(ledger.counts.written for ledger in ledgers) == 40


@pytest.mark.process
async def test_a_postgres_that_dies_in_mid_turn_costs_no_usage(own_postgres: PostgresServer, tmp_path: Path) -> None:
    name = await asyncio.to_thread(own_postgres.create)
    database = Database(own_postgres.url(name))
    async with database.transaction() as tx:
        await tx.run_sync(metadata.create_all)
    ledger = make(database, ManualClock(), tmp_path)
    await ledger.record(Call("call_1"))
    await asyncio.to_thread(own_postgres.kill)
    await ledger.record(Call("call_2"))
    assert ledger.counts.spilled == 1
    await asyncio.to_thread(own_postgres.start)
    assert await ledger.drain() == 1
    assert [row["id"] for row in await rows(database)] == ["call_1", "call_2"]
    assert [line["calls"] for line in await sums(database)] == [2]
    await ledger.close()
    await database.close()
