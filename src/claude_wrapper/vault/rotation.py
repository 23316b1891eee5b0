"""Changing the master key: every data key is wrapped anew; no record is touched, nothing stops.

1. Start all replicas with the new key first and the old one beside it.
2. `rotate_master` wraps every data key with the new one. It may be interrupted and run again.
3. Start all replicas without the old key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.tables.vault import vault_master_checks, vault_org_keys
from claude_wrapper.tenancy.principal import Principal, require_operator
from claude_wrapper.vault.keys import MasterKey, Wrapped
from claude_wrapper.vault.orgkeys import key_context, write_check

BATCH: Final = 100


@dataclass(frozen=True, slots=True)
class Rotation:
    """What was done."""

    primary: str
    rewrapped: int
    retired: tuple[str, ...]
    """Master keys that nothing needs any more: they may be taken out of the settings."""


async def rotate_master(
    db: Database,
    principal: Principal,
    master: MasterKey,
    clock: Clock,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Rotation:
    """Wrap every data key with the primary master key; only the operator may. `progress` is told the count so far.

    Raises VaultSealed when a data key needs a master key that is not readable; what was done until then stays done.
    """
    require_operator(principal)
    await write_check(db, master, clock)
    done = 0
    while rows := await db.query(lambda tx: _not_yet(tx, master.primary)):
        for row in rows:
            context = key_context(row.org_id, row.key_version)
            plain = await master.unwrap(Wrapped(row.master_key_id, row.wrapped), context)
            fresh = await master.wrap(plain, context)
            done += await db.run(partial(_replace, row=row, fresh=fresh), idempotent=True)
        progress(done)
    retired = await db.run(lambda tx: _retire(tx, master.primary), idempotent=True)
    return Rotation(master.primary, done, retired)


# tenant-scope: rotation of the master key goes over all organisations
async def _not_yet(tx: AsyncConnection, primary: str) -> list[Any]:
    statement = sa.select(vault_org_keys).where(vault_org_keys.c.master_key_id != primary)
    return list(await tx.execute(statement.order_by(vault_org_keys.c.org_id).limit(BATCH)))


# tenant-scope: rotation of the master key goes over all organisations
async def _replace(tx: AsyncConnection, row: Any, fresh: Wrapped) -> int:
    table = vault_org_keys
    done = await tx.execute(
        table.update()
        .where(
            table.c.org_id == row.org_id,
            table.c.key_version == row.key_version,
            table.c.master_key_id == row.master_key_id,
        )
        .values(master_key_id=fresh.key_id, wrapped=fresh.blob)
    )
    return done.rowcount


# tenant-scope: master keys belong to the server
async def _retire(tx: AsyncConnection, primary: str) -> tuple[str, ...]:
    table = vault_master_checks
    used = sa.select(vault_org_keys.c.master_key_id)
    gone = sa.and_(table.c.master_key_id != primary, table.c.master_key_id.not_in(used))
    retired = tuple(await tx.scalars(sa.select(table.c.master_key_id).where(gone)))
    await tx.execute(table.delete().where(gone))
    return retired
