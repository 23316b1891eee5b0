"""Whether something that a limit or a budget is to be set for exists in the principal's organisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import NotFound
from claude_wrapper.storage.tables.tenancy import api_keys, org_members, organizations, workspaces
from claude_wrapper.tenancy.principal import Principal, owned

_COLUMNS: Final[Mapping[str, sa.Column[str]]] = {
    "key": api_keys.c.id,
    "user": org_members.c.user_id,
    "workspace": workspaces.c.id,
    "organization": organizations.c.id,
}


async def require_subject(tx: AsyncConnection, principal: Principal, kind: str, ident: str) -> None:
    """Raise NotFound unless there is such a `key`, `user`, `workspace` or `organization`. Needs no scope.

    A `session` is let pass: a budget may be set before the caller begins the session that it names, and it only ever
    counts for sessions of this organisation.
    """
    if kind == "session":
        return
    column = _COLUMNS[kind]
    found = sa.select(column).where(owned(principal, column.table), column == ident)
    if (await tx.execute(found)).first() is None:
        raise NotFound(f"there is no {kind} {ident!r}")
