"""A small reader of what `usage.parquet` writes: enough of Thrift's compact protocol and of the format to check it."""

from __future__ import annotations

import gzip
import struct
from typing import Any


class Compact:
    """Thrift compact protocol, read into dicts by field number."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def varint(self) -> int:
        shift = value = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    def zigzag(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (3, 4, 5, 6):
            return self.zigzag()
        if kind == 8:
            size = self.varint()
            self.at += size
            return self.data[self.at - size : self.at]
        if kind == 9:
            head = self.data[self.at]
            self.at += 1
            size = self.varint() if head >> 4 == 15 else head >> 4
            return [self.value(head & 15) for _ in range(size)]
        assert kind == 12, kind
        return self.struct()

    def struct(self) -> dict[int, Any]:
        found, last = {}, 0
        while (head := self.data[self.at]) != 0:
            self.at += 1
            last = last + (head >> 4) if head >> 4 else self.zigzag()
            found[last] = self.value(head & 15)
        self.at += 1
        return found


def read(data: bytes) -> tuple[int, dict[str, list[Any]]]:
    """Number of rows, and columns by name."""
    assert data[:4] == data[-4:] == b"PAR1"
    (size,) = struct.unpack("<I", data[-8:-4])
    footer = Compact(data[-8 - size : -8]).struct()
    root, *elements = footer[2]
    assert root[5] == len(elements)
    columns: dict[str, list[Any]] = {}
    for group in footer[4]:
        assert group[3] == footer[3]
        for chunk, element in zip(group[1], elements, strict=True):
            meta = chunk[3]
            assert meta[1] == element[1]
            assert meta[3] == [element[4]]
            columns[element[4].decode()] = _column(data, meta)
    return footer[3], columns


def _column(data: bytes, meta: dict[int, Any]) -> list[Any]:
    reader = Compact(data, meta[9])
    header = reader.struct()
    packed = data[reader.at : reader.at + header[3]]
    assert reader.at + header[3] == meta[9] + meta[7], "the chunk ends where its metadata says"
    page = gzip.decompress(packed)
    assert len(page) == header[2]
    (levels,) = struct.unpack("<I", page[:4])
    runs, present = Compact(page[4 : 4 + levels]), []
    while runs.at < levels:
        run = runs.varint()
        assert run & 1 == 0, "only RLE runs"
        present += [bool(runs.data[runs.at])] * (run >> 1)
        runs.at += 1
    assert len(present) == header[5][1] == meta[5]
    given = _values(page[4 + levels :], meta[1], sum(present))
    return [given.pop(0) if there else None for there in present]


def _values(body: bytes, kind: int, count: int) -> list[Any]:
    if kind == 0:
        return [bool(body[index // 8] >> index % 8 & 1) for index in range(count)]
    if kind == 2:
        return list(struct.unpack(f"<{count}q", body))
    texts, at = [], 0
    for _ in range(count):
        (size,) = struct.unpack_from("<I", body, at)
        texts.append(body[at + 4 : at + 4 + size].decode())
        at += 4 + size
    assert at == len(body)
    return texts
