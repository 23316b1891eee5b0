"""Transactions, reads and failures of the database handle, on SQLite and on Postgres."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from claude_wrapper.storage import Database

pytestmark = pytest.mark.anyio


async def test_a_block_that_raises_leaves_nothing_behind(empty_database: Database) -> None:
    db = empty_database
    async with db.transaction() as tx:
        await tx.execute(sa.text("CREATE TABLE t (a int PRIMARY KEY)"))

    async def fail() -> None:
        async with db.transaction() as tx:
            await tx.execute(sa.text("INSERT INTO t VALUES (1)"))
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    async with db.read() as tx:
        assert (await tx.execute(sa.text("SELECT count(*) FROM t"))).scalar() == 0
