"""Where the ledger is copied to: a directory, an object store, a data warehouse.

A part is all calls of one organisation that began in one hour, or a numbered piece of them. Writing a part again replaces
it: the exporter does so when rows came late (drained from a spill), so a sink must not append.
"""

from __future__ import annotations

import asyncio
import enum
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Protocol

from claude_wrapper.usage import forms
from claude_wrapper.usage.entries import EPOCH, Row


@dataclass(frozen=True, slots=True)
class Part:
    """One organisation, one hour (hours since 1970, UTC), piece `index` from 0."""

    org: str
    hour: int
    index: int = 0

    @property
    def begins(self) -> datetime:
        return EPOCH + timedelta(hours=self.hour)

    def name(self, ending: str) -> str:
        """A path that query engines read as partitions: `org=…/date=2026-01-31/hour=07/part-0000.parquet`."""
        return (
            f"org={self.org or 'none'}/date={self.begins:%Y-%m-%d}/hour={self.begins:%H}/part-{self.index:04d}.{ending}"
        )


class LedgerSink(Protocol):
    """Takes parts. Raises whatever its store raises: the exporter stops and tries again later."""

    @property
    def name(self) -> str:
        """Names what was exported in the database: two sinks need two names."""
        ...

    async def write(self, part: Part, rows: Sequence[Row]) -> None:
        """Keep a part, replacing what it was before. When this returns it is kept."""
        ...


class Form(enum.Enum):
    """How rows become a file: ending and writer."""

    CSV = "csv"
    JSON_LINES = "ndjson"
    PARQUET = "parquet"

    @property
    def write(self) -> Callable[[forms.Table], bytes]:
        return _WRITERS[self]


_WRITERS: Final[Mapping[Form, Callable[[forms.Table], bytes]]] = {
    Form.CSV: forms.to_csv,
    Form.JSON_LINES: forms.to_json_lines,
    Form.PARQUET: forms.to_parquet,
}


class DirectorySink:
    """Files under a directory; each appears whole or not at all."""

    def __init__(self, name: str, directory: Path, form: Form = Form.CSV) -> None:
        self._name = name
        self._directory = directory
        self._form = form

    @property
    def name(self) -> str:
        return self._name

    async def write(self, part: Part, rows: Sequence[Row]) -> None:
        await asyncio.to_thread(self._write, part, rows)

    def _write(self, part: Part, rows: Sequence[Row]) -> None:
        path = self._directory / part.name(self._form.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        with new.open("wb") as out:
            out.write(self._form.write(rows))
            out.flush()
            os.fsync(out.fileno())
        new.replace(path)


class ObjectWriter(Protocol):
    """What is needed of `storage.blobs.BlobStore`."""

    async def put(self, key: str, content: bytes, /) -> None:
        """Write an object, replacing what was there."""
        ...


class ObjectSink:
    """Objects in S3, GCS, Azure or a directory, through the server's blob store."""

    def __init__(self, name: str, store: ObjectWriter, *, prefix: str = "usage/", form: Form = Form.PARQUET) -> None:
        self._name = name
        self._store = store
        self._prefix = prefix
        self._form = form

    @property
    def name(self) -> str:
        return self._name

    async def write(self, part: Part, rows: Sequence[Row]) -> None:
        data = await asyncio.to_thread(self._form.write, rows)
        await self._store.put(self._prefix + part.name(self._form.value), data)


class RowLoader(Protocol):
    """A warehouse that takes rows by key: BigQuery's `tabledata.insertAll`, whose `insertId` is the row's key.

    No adapter for Google's library comes with the server (it would bring grpc, protobuf and pandas-sized wheels): implement
    this with `google-cloud-bigquery` as `client.insert_rows_json(table, rows, row_ids=keys)` and raise if it returns
    errors. BigQuery forgets row ids after about a minute: make the table's readers take one row per `id`, or load the
    Parquet objects of `ObjectSink` instead, which needs no such care.
    """

    async def load(self, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
        """Take rows; a key that is known replaces or is ignored. Raises if any row was refused."""
        ...


class WarehouseSink:
    """Rows into a table, keyed by call id."""

    def __init__(self, name: str, loader: RowLoader, *, batch: int = 500) -> None:
        """`batch` rows per load: BigQuery recommends 500 and takes 50 000."""
        self._name = name
        self._loader = loader
        self._batch = batch

    @property
    def name(self) -> str:
        return self._name

    async def write(self, part: Part, rows: Sequence[Row]) -> None:
        for start in range(0, len(rows), self._batch):
            some = rows[start : start + self._batch]
            await self._loader.load(some, [row["id"] for row in some])
