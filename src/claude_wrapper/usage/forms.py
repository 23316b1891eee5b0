"""A report or a part of the ledger as a file: CSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from claude_wrapper.usage import parquet
from claude_wrapper.usage.parquet import Column, Kind

Table = Sequence[Mapping[str, Any]]
"""Flat rows that all have the same names in the same order."""

_DANGEROUS: Final = ("=", "+", "-", "@", "\t", "\r")


def to_csv(rows: Table) -> bytes:
    """RFC 4180 with a header, UTF-8. A text that a spreadsheet would run as a formula gets an apostrophe in front."""
    out = io.StringIO()
    if rows:
        writer = csv.writer(out)
        writer.writerow(rows[0])
        writer.writerows([_cell(value) for value in row.values()] for row in rows)
    return out.getvalue().encode()


def to_json_lines(rows: Table) -> bytes:
    """One object per line."""
    return b"".join(json.dumps(dict(row), separators=(",", ":")).encode() + b"\n" for row in rows)


def to_parquet(rows: Table) -> bytes:
    """One row group; whole numbers as INT64, truth values as BOOLEAN, all else as text. No rows: no columns, a valid file."""
    names = list(rows[0]) if rows else []
    return parquet.write([_column(name, [row[name] for row in rows]) for name in names], len(rows))


def _column(name: str, values: list[Any]) -> Column:
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, bool) for value in given):
        return Column(name, Kind.BOOLEAN, values)
    if given and all(isinstance(value, int) and not isinstance(value, bool) for value in given):
        return Column(name, Kind.INT64, values)
    return Column(name, Kind.TEXT, [None if value is None else str(value) for value in values])


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.startswith(_DANGEROUS):
        return "'" + value
    return value
