"""Bytes of any length under an organisation's key: read and written in pieces, never whole in memory.

A sealed stream is a row of frames, each `length (4, big endian) | sealed piece`. A piece is bound to its record, its
number and whether it is the last, so pieces cannot be left out, swapped, moved to another record or cut off at the end
without being noticed. An empty stream is one empty last piece.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterable, AsyncIterator
from typing import Final

from claude_wrapper.vault.envelope import OVERHEAD, DataKeys, Unreadable
from claude_wrapper.vault.orgkeys import OrgKeys

PIECE: Final = 256 * 1024
_LENGTH: Final = struct.Struct(">I")


async def sealed(keys: DataKeys, table: str, record: str, source: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The frames of `source`, which may come in pieces of any size."""
    pending, number = bytearray(), 0
    async for part in source:
        pending += part
        # One piece is always kept back: the last one is sealed as the last.
        while len(pending) > PIECE:
            yield _frame(keys, table, record, _place(number, last=False), bytes(pending[:PIECE]))
            del pending[:PIECE]
            number += 1
    yield _frame(keys, table, record, _place(number, last=True), bytes(pending))


async def opened(
    keys: OrgKeys, org: str, table: str, record: str, frames: AsyncIterable[bytes]
) -> AsyncIterator[bytes]:
    """The reverse. Raises Unreadable at the first piece that is damaged, and at the end if the last one is missing."""
    pending, number, data_keys = bytearray(), 0, None
    kept: bytes | None = None
    async for part in frames:
        pending += part
        while (piece := _take(pending)) is not None:
            if data_keys is None:
                data_keys = await keys.of(org, opening=piece)
            if kept is not None:
                yield data_keys.open(kept, table=table, record=record, field=_place(number, last=False))
                number += 1
            kept = piece
    if pending or kept is None or data_keys is None:
        raise Unreadable(f"{table} {record} ends in the middle: it was damaged")
    yield data_keys.open(kept, table=table, record=record, field=_place(number, last=True))


def _frame(keys: DataKeys, table: str, record: str, place: str, plain: bytes) -> bytes:
    piece = keys.seal(plain, table=table, record=record, field=place)
    return _LENGTH.pack(len(piece)) + piece


def _take(pending: bytearray) -> bytes | None:
    if len(pending) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(pending)
    if not OVERHEAD <= length <= PIECE + OVERHEAD:
        raise Unreadable("a sealed stream has a frame of an impossible length: it was damaged")
    if len(pending) < _LENGTH.size + length:
        return None
    piece = bytes(pending[_LENGTH.size : _LENGTH.size + length])
    del pending[: _LENGTH.size + length]
    return piece


def _place(number: int, *, last: bool) -> str:
    return f"{number}{' last' if last else ''}"
