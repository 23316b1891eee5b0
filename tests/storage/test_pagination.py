"""Pages: both styles of the wire, stable while rows are added, and cursors that nobody can bend."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.storage import Database
from claude_wrapper.storage.dialects import UtcDateTime
from claude_wrapper.storage.pagination import Page, PageRequest, Position, decode_cursor, encode_cursor, fetch_page

START = datetime(2026, 1, 1, tzinfo=UTC)

things = sa.Table(
    "things", sa.MetaData(), sa.Column("id", sa.String(20), primary_key=True), sa.Column("at", UtcDateTime())
)


@pytest.fixture
async def db(empty_database: Database) -> Database:
    async with empty_database.transaction() as tx:
        await tx.run_sync(things.create)
        # Three rows share each time: the id decides among them.
        rows = [{"id": f"t{n:02d}", "at": START + timedelta(seconds=n // 3)} for n in range(25)]
        await tx.execute(things.insert(), rows)
    return empty_database


async def page(db: Database, **kw: object) -> Page[str]:
    async with db.read() as tx:
        request = PageRequest(**kw)  # type: ignore[arg-type]
        return await fetch_page(tx, sa.select(things), (things.c.at, things.c.id), request, lambda row: row.id)


NEWEST = [f"t{n:02d}" for n in reversed(range(25))]


@pytest.mark.anyio
@pytest.mark.parametrize("limit", [1, 7, 24, 25, 26])
async def test_following_the_cursor_gives_every_row_once_in_order(db: Database, limit: int) -> None:
    found: list[str] = []
    cursor: str | None = None
    while True:
        got = await page(db, limit=limit, cursor=cursor)
        found += got.data
        assert got.has_more == (got.next_page is not None)
        cursor = got.next_page
        if cursor is None:
            break
    assert found == NEWEST


@pytest.mark.anyio
async def test_following_ids_forwards_gives_every_row_once(db: Database) -> None:
    got = await page(db, limit=10)
    found = [*got.data]
    while got.has_more:
        got = await page(db, limit=10, after_id=got.last_id)
        found += got.data
    assert found == NEWEST


@pytest.mark.anyio
async def test_going_back_gives_the_page_before_in_the_same_order(db: Database) -> None:
    first = await page(db, limit=10)
    second = await page(db, limit=10, cursor=first.next_page)
    assert first.prev_page is None
    assert (await page(db, limit=10, cursor=second.prev_page)).data == first.data
    before = await page(db, limit=5, before_id=second.first_id)
    assert (before.data, before.has_more) == (tuple(NEWEST[5:10]), True)
    assert not (await page(db, limit=5, before_id=NEWEST[5])).has_more


@pytest.mark.anyio
async def test_oldest_first_is_the_other_way_round(db: Database) -> None:
    got = await page(db, limit=20, newest_first=False)
    assert got.data == tuple(reversed(NEWEST))[:20]
    rest = await page(db, limit=20, newest_first=False, cursor=got.next_page)
    assert rest.data == tuple(reversed(NEWEST))[20:]


@pytest.mark.anyio
async def test_a_row_that_is_added_meanwhile_moves_no_page(db: Database) -> None:
    first = await page(db, limit=10)
    async with db.transaction() as tx:
        await tx.execute(things.insert(), {"id": "new", "at": START + timedelta(days=1)})
    assert (await page(db, limit=10, cursor=first.next_page)).data == tuple(NEWEST[10:20])


@pytest.mark.anyio
async def test_an_id_that_is_not_in_the_list_is_refused_by_name(db: Database) -> None:
    with pytest.raises(InvalidRequest, match=r"^after_id"):
        await page(db, after_id="nothing")
    with pytest.raises(InvalidRequest, match=r"^before_id"):
        await page(db, before_id="nothing")


@pytest.mark.anyio
async def test_an_empty_list_is_an_empty_page(empty_database: Database) -> None:
    async with empty_database.transaction() as tx:
        await tx.run_sync(things.create)
    assert await page(empty_database) == Page(())


@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_a_limit_out_of_range_is_refused(limit: int) -> None:
    with pytest.raises(InvalidRequest, match=r"^limit"):
        PageRequest(limit=limit)


def test_two_places_to_start_from_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="only one"):
        PageRequest(after_id="a", cursor="page_x")


@given(
    st.datetimes(timezones=st.just(UTC), min_value=datetime(1970, 1, 2), max_value=datetime(2999, 1, 1)),  # noqa: DTZ001
    st.text(max_size=50),
    st.booleans(),
)
def test_a_cursor_gives_back_exactly_what_went_in(at: datetime, row_id: str, backwards: bool) -> None:
    cursor = encode_cursor(Position(at, row_id), backwards=backwards)
    assert cursor.startswith("page_")
    assert decode_cursor(cursor) == (Position(at, row_id), backwards)


@given(
    st.one_of(
        st.text(max_size=200), st.binary(max_size=200).map(lambda b: "page_" + base64.urlsafe_b64encode(b).decode())
    )
)
def test_anything_else_is_refused_and_never_breaks(cursor: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^page"):
        decode_cursor(cursor)


@pytest.mark.parametrize(
    "packed", [b"[]", b"[1,2,3]", b'[1,"a",5]', b'[1e400,"a",0]', b'[99999999999999999999,"a",0]', b"{}", b"[" * 150]
)
def test_a_forged_cursor_is_refused(packed: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_cursor("page_" + base64.urlsafe_b64encode(packed).decode())
