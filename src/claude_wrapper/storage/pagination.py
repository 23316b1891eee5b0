"""Pages of rows by keyset, in the two styles of the wire: opaque cursors and neighbouring ids.

A position is the pair (time, id) of a row, so pages stay stable while rows are added. Cursors are opaque, not secret:
they only move within what the caller's own WHERE clause allows.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import InvalidRequest

T = TypeVar("T")

DEFAULT_LIMIT = 20
MAX_LIMIT = 1000
_PREFIX = "page_"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_CURSOR = 512


@dataclass(frozen=True, slots=True)
class Position:
    """Where a row stands in the order."""

    at: datetime
    id: str


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Which rows are wanted. At most one of `after_id`, `before_id`, `cursor`."""

    limit: int = DEFAULT_LIMIT
    after_id: str | None = None
    before_id: str | None = None
    cursor: str | None = None
    newest_first: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= MAX_LIMIT:
            raise InvalidRequest(f"must be from 1 to {MAX_LIMIT}", field="limit")
        if sum(value is not None for value in (self.after_id, self.before_id, self.cursor)) > 1:
            raise InvalidRequest("give only one of after_id, before_id and page", field="page")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Rows in the order that was asked for.

    Id style: `has_more` in the direction of travel, `first_id`, `last_id`. Cursor style: `next_page` and `prev_page`,
    None at the ends.
    """

    data: tuple[T, ...]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None
    next_page: str | None = None
    prev_page: str | None = None


def encode_cursor(position: Position, *, backwards: bool = False) -> str:
    """`page_…` for the rows after (or before) this position."""
    microseconds = (position.at - _EPOCH) // timedelta(microseconds=1)
    packed = json.dumps([microseconds, position.id, int(backwards)], separators=(",", ":")).encode()
    return _PREFIX + base64.urlsafe_b64encode(packed).rstrip(b"=").decode()


def decode_cursor(cursor: str) -> tuple[Position, bool]:
    """The position and whether to go backwards; raises InvalidRequest for anything that we did not make."""
    try:
        if not cursor.startswith(_PREFIX) or len(cursor) > _MAX_CURSOR:
            raise ValueError(cursor)
        packed = cursor.removeprefix(_PREFIX)
        microseconds, row_id, backwards = json.loads(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)))
        if not isinstance(microseconds, int) or not isinstance(row_id, str) or backwards not in (0, 1):
            raise ValueError(cursor)
        return Position(_EPOCH + timedelta(microseconds=microseconds), row_id), bool(backwards)
    except (ValueError, TypeError, OverflowError, RecursionError, binascii.Error):
        raise InvalidRequest("this is not a cursor of ours; start again without it", field="page") from None


async def fetch_page(
    tx: AsyncConnection,
    statement: sa.Select[Any],
    key: tuple[sa.ColumnElement[Any], sa.ColumnElement[Any]],
    request: PageRequest,
    make: Callable[[Any], T],
) -> Page[T]:
    """One page of `statement`, which is already narrowed to what the caller may see.

    `key` is (time column, id column), unique together and indexed behind the tenant. `make` turns a row into a record.
    An unknown `after_id` or `before_id` raises InvalidRequest.
    """
    position, backwards = await _start(tx, statement, key, request)
    descending = request.newest_first != backwards
    narrowed = statement
    if position is not None:
        here, there = sa.tuple_(*key), sa.tuple_(sa.literal(position.at, key[0].type), sa.literal(position.id))
        narrowed = narrowed.where(here < there if descending else here > there)
    order = [column.desc() if descending else column.asc() for column in key]
    # One row more than asked tells whether there is a next page.
    rows = list((await tx.execute(narrowed.order_by(None).order_by(*order).limit(request.limit + 1))).all())
    more = len(rows) > request.limit
    rows = rows[: request.limit]
    if backwards:
        rows.reverse()
    if not rows:
        return Page(())
    first, last = _position(rows[0], key), _position(rows[-1], key)
    has_next = more if not backwards else True
    has_previous = more if backwards else position is not None
    return Page(
        data=tuple(make(row) for row in rows),
        has_more=more,
        first_id=first.id,
        last_id=last.id,
        next_page=encode_cursor(last) if has_next else None,
        prev_page=encode_cursor(first, backwards=True) if has_previous else None,
    )


async def _start(
    tx: AsyncConnection,
    statement: sa.Select[Any],
    key: tuple[sa.ColumnElement[Any], sa.ColumnElement[Any]],
    request: PageRequest,
) -> tuple[Position | None, bool]:
    if request.cursor is not None:
        return decode_cursor(request.cursor)
    for field, row_id, backwards in (("after_id", request.after_id, False), ("before_id", request.before_id, True)):
        if row_id is not None:
            row = (await tx.execute(statement.where(key[1] == row_id).limit(1))).first()
            if row is None:
                raise InvalidRequest(f"there is no {row_id!r} in this list", field=field)
            return _position(row, key), backwards
    return None, False


def _position(row: Any, key: tuple[sa.ColumnElement[Any], sa.ColumnElement[Any]]) -> Position:
    mapping = row._mapping  # noqa: SLF001 (SQLAlchemy's public name for it)
    return Position(mapping[key[0]], mapping[key[1]])
