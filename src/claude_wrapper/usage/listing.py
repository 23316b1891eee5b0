"""The ledger call by call, for the organisation that it belongs to: what an export by hand reads."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.storage.tables.usage import usage_calls
from claude_wrapper.tenancy.principal import Principal, require_operator
from claude_wrapper.usage.entries import milliseconds

MOST_CALLS: Final = 50_000
"""Rows per page: about 15 MB in memory."""
_COSTS: Final = ("cost_micros", "price_version")


async def list_calls(
    tx: AsyncConnection,
    principal: Principal,
    start: datetime,
    end: datetime,
    *,
    after: tuple[int, str] | None = None,
    limit: int = MOST_CALLS,
) -> list[dict[str, Any]]:
    """Calls that began in [start, end), oldest first, as flat rows. Needs `read:usage`; costs need `read:costs`.

    `after` is (started_ms, id) of the last row of the page before. Only the operator, acting in no organisation, sees
    more than one.
    """
    principal.require("read:usage")
    if not 1 <= limit <= MOST_CALLS:
        raise InvalidRequest(f"must be from 1 to {MOST_CALLS}", field="limit")
    hidden = () if principal.may("read:costs") else _COSTS
    columns = [column for column in usage_calls.c if column.name not in hidden]
    statement = sa.select(*columns).where(
        _mine(principal), usage_calls.c.started_ms >= milliseconds(start), usage_calls.c.started_ms < milliseconds(end)
    )
    if after is not None:
        place = sa.tuple_(usage_calls.c.started_ms, usage_calls.c.id)
        statement = statement.where(place > sa.tuple_(sa.literal(after[0], sa.BigInteger), sa.literal(after[1])))
    ordered = statement.order_by(usage_calls.c.started_ms, usage_calls.c.id).limit(limit)
    rows: Sequence[Any] = (await tx.execute(ordered)).mappings().all()
    return [dict(row) for row in rows]


def _mine(principal: Principal) -> sa.ColumnElement[bool]:
    if not principal.org:
        require_operator(principal)
        return sa.true()
    mine = usage_calls.c.org_id == principal.org
    if principal.workspace is None:
        return mine
    return sa.and_(mine, usage_calls.c.workspace_id == principal.workspace)
