"""Optimistic locking: an update names the version that its editor read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict


# tenant-scope: the caller's WHERE clause carries the principal
async def bump(
    tx: AsyncConnection,
    table: sa.Table,
    where: Sequence[sa.ColumnElement[bool]],
    values: dict[str, Any],
    version: int,
    *,
    what: str,
) -> None:
    """Update the one row that `where` names and raise its version; raises Conflict if it is not at `version` any more."""
    statement = table.update().where(*where, table.c.version == version)
    done = await tx.execute(statement.values(**values, version=version + 1))
    if done.rowcount != 1:
        raise Conflict(f"{what} was changed by somebody else meanwhile; read it again and repeat your change")
