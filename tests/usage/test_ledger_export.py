"""Copies of the ledger in directories, object stores and warehouses: each hour once, again if rows came late."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from parquet_reader import read
from usage_world import NOON, Call

from claude_wrapper.storage import Database
from claude_wrapper.storage.blobs import open_directory
from claude_wrapper.testing.clock import ManualClock
from claude_wrapper.usage import DirectorySink, Exporter, Form, ObjectSink, Part, WarehouseSink, export
from claude_wrapper.usage.entries import Priced, row_of
from claude_wrapper.usage.ledger import insert

pytestmark = pytest.mark.anyio

HOUR = timedelta(hours=1)
PART = "org=org_1/date=2026-11-20/hour=12/part-0000"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOON)


async def add(db: Database, *calls: Call) -> None:
    await db.write(lambda tx: insert(tx, [row_of(call, Priced(7, "v")) for call in calls]))


class Bucket:
    """An object store in a dict."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.writes = 0

    async def put(self, key: str, data: bytes) -> None:
        self.objects[key] = data
        self.writes += 1


class Warehouse:
    """BigQuery as its port describes it: rows by key; fails when told."""

    def __init__(self) -> None:
        self.table: dict[str, Mapping[str, Any]] = {}
        self.failing = False

    async def load(self, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
        if self.failing:
            raise ConnectionError("quota")
        self.table.update(zip(keys, rows, strict=True))


async def test_an_hour_is_exported_when_it_is_over_and_only_once(
    database: Database, clock: ManualClock, tmp_path: Path
) -> None:
    await add(database, Call("call_1"), Call("call_2"))
    out = tmp_path / "out"
    exporter = Exporter(database, DirectorySink("files", out), clock)
    assert await exporter.run() == 0
    clock.jump(1800)
    assert await exporter.run() == 1
    assert await exporter.run() == 0
    written = list(csv.DictReader(io.StringIO((out / f"{PART}.csv").read_text())))
    assert [row["id"] for row in written] == ["call_1", "call_2"]
    assert written[0]["cost_micros"] == "7"
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["part-0000.csv"]


async def test_rows_that_come_late_make_the_hour_be_written_again(database: Database, clock: ManualClock) -> None:
    bucket = Bucket()
    exporter = Exporter(database, ObjectSink("lake", bucket), clock)
    await add(database, Call("call_2"), Call("call_9", org=None))
    clock.jump(3600)
    assert await exporter.run() == 2
    await add(database, Call("call_1"))
    assert await exporter.run() == 1
    assert sorted(bucket.objects) == [
        "usage/org=none/date=2026-11-20/hour=12/part-0000.parquet",
        f"usage/{PART}.parquet",
    ]
    count, columns = read(bucket.objects[f"usage/{PART}.parquet"])
    assert (count, columns["id"], columns["complete"]) == (2, ["call_1", "call_2"], [True, True])
    assert columns["error_type"] == [None, None]


async def test_the_servers_own_blob_store_takes_the_parts(
    database: Database, clock: ManualClock, tmp_path: Path
) -> None:
    await add(database, Call("call_1"))
    clock.jump(3600)
    blobs = open_directory(tmp_path / "blobs")
    assert await Exporter(database, ObjectSink("lake", blobs), clock).run() == 1
    stored = await blobs.get(f"usage/{PART}.parquet")
    assert stored is not None
    assert read(stored)[0] == 1


async def test_each_sink_keeps_its_own_account(database: Database, clock: ManualClock, tmp_path: Path) -> None:
    await add(database, Call("call_1"))
    clock.jump(3600)
    for name in ("a", "b"):
        sink = DirectorySink(name, tmp_path / name, Form.JSON_LINES)
        assert await Exporter(database, sink, clock).run() == 1
        assert (tmp_path / name / f"{PART}.ndjson").exists()


async def test_a_sink_that_fails_is_tried_again_from_where_it_stopped(database: Database, clock: ManualClock) -> None:
    warehouse = Warehouse()
    exporter = Exporter(database, WarehouseSink("warehouse", warehouse, batch=2), clock)
    await add(database, *(Call(f"call_{n}") for n in range(5)), Call("call_5", started_at=NOON - HOUR))
    clock.jump(3600)
    warehouse.failing = True
    with pytest.raises(ConnectionError):
        await exporter.run()
    warehouse.failing = False
    assert await exporter.run() == 2
    assert sorted(warehouse.table) == [f"call_{n}" for n in range(6)]


async def test_a_large_hour_is_written_in_pieces(
    database: Database, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PIECE", 2)
    bucket = Bucket()
    await add(database, *(Call(f"call_{n}") for n in range(5)))
    clock.jump(3600)
    assert await Exporter(database, ObjectSink("lake", bucket, form=Form.CSV), clock).run() == 1
    assert [key[-8:] for key in sorted(bucket.objects)] == ["0000.csv", "0001.csv", "0002.csv"]


async def test_hours_that_are_too_old_are_left_alone(database: Database, clock: ManualClock, tmp_path: Path) -> None:
    await add(database, Call("call_1"))
    clock.jump(40 * 86_400)
    assert await Exporter(database, DirectorySink("files", tmp_path), clock).run() == 0


def test_a_part_is_named_after_its_hour() -> None:
    assert Part("org_1", 0, 3).name("csv") == "org=org_1/date=1970-01-01/hour=00/part-0003.csv"
