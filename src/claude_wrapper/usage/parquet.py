"""Writes a flat table as a Parquet file, by itself: pyarrow would weigh more than the rest of the server together.

What is written is the oldest and plainest part of the format (parquet-format 2.x, "Apache Parquet" specification), which
every reader knows: one row group, one data page (version 1) per column, PLAIN encoding, GZIP. Columns are optional; the
definition levels are one RLE/bit-packed hybrid run list. Metadata is Thrift's compact protocol. Checked against pyarrow and
DuckDB by hand (see docs/decisions/usage-2-parquet.md); tests read the files back with a small reader of their own.
"""

from __future__ import annotations

import enum
import gzip
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

MAGIC: Final = b"PAR1"
_CREATED_BY: Final = "claude-wrapper"


class Kind(enum.Enum):
    """What a column holds; the value is Parquet's physical type."""

    BOOLEAN = 0
    INT64 = 2
    TEXT = 6


@dataclass(frozen=True, slots=True)
class Column:
    """A name and its values; None is null."""

    name: str
    kind: Kind
    values: Sequence[Any]


def write(columns: Sequence[Column], rows: int) -> bytes:
    """The file. Every column has `rows` values."""
    out = bytearray(MAGIC)
    chunks: list[bytes] = []
    total = 0
    for column in columns:
        offset = len(out)
        page = _page(column)
        packed = gzip.compress(page, compresslevel=6, mtime=0)  # same rows, same bytes
        header = _page_header(len(page), len(packed), rows)
        out += header + packed
        size = len(header) + len(page)
        total += size
        chunks.append(_column_chunk(column, rows, offset, size, len(header) + len(packed)))
    footer = _footer(columns, chunks, rows, total)
    return bytes(out + footer + struct.pack("<I", len(footer)) + MAGIC)


def _page(column: Column) -> bytes:
    levels = _runs([value is not None for value in column.values])
    return struct.pack("<I", len(levels)) + levels + _plain(column)


def _runs(present: Sequence[bool]) -> bytes:
    """Definition levels (0 null, 1 given) as RLE runs: header varint(length << 1), then the value in one byte."""
    out = bytearray()
    for value, run in itertools.groupby(present):
        out += _varint(sum(1 for _ in run) << 1) + bytes([value])
    return bytes(out)


def _plain(column: Column) -> bytes:
    given = [value for value in column.values if value is not None]
    if column.kind is Kind.INT64:
        return struct.pack(f"<{len(given)}q", *given)
    if column.kind is Kind.BOOLEAN:
        packed = bytearray((len(given) + 7) // 8)
        for index, value in enumerate(given):
            packed[index // 8] |= bool(value) << (index % 8)
        return bytes(packed)
    texts = (value.encode() for value in given)
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


# Thrift's compact protocol: as much of it as the metadata needs ----------------------------------------------------------

_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12
_STOP: Final = b"\x00"


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _zigzag(value: int) -> bytes:
    return _varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _struct(*fields: tuple[int, int, bytes]) -> bytes:
    """(field number, type, encoded value), in rising order of numbers that are at most 15 apart."""
    out, last = bytearray(), 0
    for number, kind, value in fields:
        out += bytes([(number - last) << 4 | kind]) + value
        last = number
    return bytes(out) + _STOP


def _i32(number: int, value: int) -> tuple[int, int, bytes]:
    return number, _I32, _zigzag(value)


def _i64(number: int, value: int) -> tuple[int, int, bytes]:
    return number, _I64, _zigzag(value)


def _text(number: int, value: str) -> tuple[int, int, bytes]:
    return number, _BINARY, _bytes(value)


def _bytes(value: str) -> bytes:
    encoded = value.encode()
    return _varint(len(encoded)) + encoded


def _list(number: int, kind: int, items: Sequence[bytes]) -> tuple[int, int, bytes]:
    size = bytes([len(items) << 4 | kind]) if len(items) < 15 else bytes([0xF0 | kind]) + _varint(len(items))
    return number, _LIST, size + b"".join(items)


# Parquet's metadata; field numbers from parquet.thrift -------------------------------------------------------------------

_PLAIN, _RLE = 0, 3
_GZIP: Final = 2
_OPTIONAL: Final = 1
_UTF8: Final = 0


def _page_header(size: int, packed: int, rows: int) -> bytes:
    data = _struct(_i32(1, rows), _i32(2, _PLAIN), _i32(3, _RLE), _i32(4, _RLE))
    return _struct(_i32(1, 0), _i32(2, size), _i32(3, packed), (5, _STRUCT, data))


def _column_chunk(column: Column, rows: int, offset: int, size: int, packed: int) -> bytes:
    meta = _struct(
        _i32(1, column.kind.value),
        _list(2, _I32, [_zigzag(_PLAIN), _zigzag(_RLE)]),
        _list(3, _BINARY, [_bytes(column.name)]),
        _i32(4, _GZIP),
        _i64(5, rows),
        _i64(6, size),
        _i64(7, packed),
        _i64(9, offset),
    )
    return _struct(_i64(2, offset), (3, _STRUCT, meta))


def _footer(columns: Sequence[Column], chunks: Sequence[bytes], rows: int, total: int) -> bytes:
    root = _struct(_text(4, "schema"), _i32(5, len(columns)))
    schema = [root, *(_schema_element(column) for column in columns)]
    group = _struct(_list(1, _STRUCT, chunks), _i64(2, total), _i64(3, rows))
    groups = [group] if columns else []
    return _struct(
        _i32(1, 1), _list(2, _STRUCT, schema), _i64(3, rows), _list(4, _STRUCT, groups), _text(6, _CREATED_BY)
    )


def _schema_element(column: Column) -> bytes:
    fields = [_i32(1, column.kind.value), _i32(3, _OPTIONAL), _text(4, column.name)]
    if column.kind is Kind.TEXT:
        fields.append(_i32(6, _UTF8))
    return _struct(*fields)
