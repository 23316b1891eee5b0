"""The row that says which snapshot of a session is current: read, replaced only by who saw the last one, removed.

The server itself saves and restores, for the organisation that owns the session: there is no principal, and every
statement names the organisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict
from claude_wrapper.sessions.snapshots.values import Guard
from claude_wrapper.storage.dialects import insert_ignore
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.tables.snapshots import session_snapshots as table


@dataclass(frozen=True, slots=True)
class Current:
    """What is current."""

    manifest: str
    previous: str | None
    created_at: datetime
    bytes_logical: int
    bytes_stored: int
    cli_uuid: str
    cli_version: str


# tenant-scope: the server acts for the organisation that it names
async def current(db: Database, org: str, session: str) -> Current | None:
    """The current snapshot, or None. Raises StorageUnavailable."""

    async def read(tx: AsyncConnection) -> Current | None:
        found = await tx.execute(sa.select(table).where(table.c.org_id == org, table.c.session_id == session))
        row = found.one_or_none()
        return None if row is None else _current(row)

    return await db.query(read)


# tenant-scope: the server acts for the organisation that it names
async def all_current(db: Database, org: str) -> dict[str, Current]:
    """The current snapshot of each session of an organisation."""

    async def read(tx: AsyncConnection) -> dict[str, Current]:
        found = await tx.execute(sa.select(table).where(table.c.org_id == org))
        return {row.session_id: _current(row) for row in found}

    return await db.query(read)


# tenant-scope: the server acts for the organisation that it names
async def replace(
    db: Database, org: str, session: str, new: Current, *, seen: str | None, guard: Guard | None = None
) -> None:
    """Make a snapshot current, if the one that was `seen` (None: none) still is.

    Raises Conflict if it is not, and whatever `guard` raises in the same transaction.
    """
    values: Mapping[str, Any] = {
        "manifest_id": new.manifest,
        "previous_manifest_id": new.previous,
        "created_at": new.created_at,
        "bytes_logical": new.bytes_logical,
        "bytes_stored": new.bytes_stored,
        "cli_uuid": new.cli_uuid,
        "cli_version": new.cli_version,
    }
    mine = (table.c.org_id == org, table.c.session_id == session)

    async def write(tx: AsyncConnection) -> bool:
        if guard is not None:
            await guard(tx)
        if seen is None:
            insert = insert_ignore(db.dialect, table, ["org_id", "session_id"])
            await tx.execute(insert.values(org_id=org, session_id=session, **values))
        else:
            await tx.execute(sa.update(table).where(*mine, table.c.manifest_id == seen).values(**values))
        # Read back, for a repetition after a commit of unknown outcome finds its own work done.
        stored = await tx.execute(sa.select(table.c.manifest_id).where(*mine))
        return stored.scalar_one_or_none() == new.manifest

    if not await db.run(write, idempotent=True):
        raise Conflict(
            f"another snapshot of session {session} was made current in the meantime: this one is dropped",
            details={"session": session},
        )


# tenant-scope: the server acts for the organisation that it names
async def remove(db: Database, org: str, session: str | None) -> None:
    """Forget the snapshots of a session, or of all sessions of the organisation."""
    conditions = [table.c.org_id == org]
    if session is not None:
        conditions.append(table.c.session_id == session)

    async def write(tx: AsyncConnection) -> None:
        await tx.execute(sa.delete(table).where(*conditions))

    await db.run(write, idempotent=True)


def _current(row: Any) -> Current:
    return Current(
        row.manifest_id,
        row.previous_manifest_id,
        row.created_at,
        row.bytes_logical,
        row.bytes_stored,
        row.cli_uuid,
        row.cli_version,
    )
