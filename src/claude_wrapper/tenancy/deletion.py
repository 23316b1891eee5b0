"""The end of an organisation: soft deletion that can be undone, and the purge that cannot.

A deleted organisation keeps its data and loses all access at once. The purge erases what lies outside of the database
first (workspaces on disk, snapshots, credentials: one `Eraser` each), then its rows, and reports what it erased. A purge
that fails half-way leaves the organisation deleted and can be run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.schema import metadata
from claude_wrapper.storage.tables.tenancy import api_keys, audit_log, org_members, organizations, users
from claude_wrapper.tenancy.announcements import announce_change
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.orgs import Organization, get_organization
from claude_wrapper.tenancy.principal import Principal, owned, require_operator

# Kept by a purge: the proof of what was done and the ledger that bills are made from. Retention is the operator's matter.
KEPT = frozenset({audit_log.name, "usage_calls", "usage_hours", "usage_exports"})


class Eraser(Protocol):
    """Erases one kind of thing that an organisation owns outside of the tenancy tables."""

    name: str

    async def erase(self, org: str) -> int:
        """Erase everything of this organisation; how many things. May be called again for what is already gone."""
        ...


@dataclass(frozen=True, slots=True)
class PurgeReport:
    """What a purge erased."""

    org: str
    erased: Mapping[str, int] = field(default_factory=dict)
    """By eraser and by table: how many."""
    kept: tuple[str, ...] = ()
    """Tables whose rows were kept."""


async def delete_organization(tx: AsyncConnection, principal: Principal, scribe: Scribe) -> Organization:
    """Close the principal's organisation; its keys stop working at once. Needs `delete:organization`."""
    principal.require("delete:organization")
    before = await get_organization(tx, principal)
    if before.deleted_at is not None:
        return before
    if principal.is_operator and before.is_staff and principal.key_id is not None:
        await _require_other_org(tx, principal)
    return await _set_deleted(tx, principal, scribe, before, verb="delete")


async def restore_organization(tx: AsyncConnection, principal: Principal, scribe: Scribe) -> Organization:
    """Open a deleted organisation again, with all its keys. Only the operator may: its own keys no longer work."""
    require_operator(principal)
    before = await get_organization(tx, principal)
    if before.deleted_at is None:
        return before
    return await _set_deleted(tx, principal, scribe, before, verb="restore")


async def purge_organization(
    db: Database, principal: Principal, scribe: Scribe, erasers: Sequence[Eraser]
) -> PurgeReport:
    """Erase a deleted organisation for good. Only the operator may, acting in it; raises Conflict if it is not deleted."""
    require_operator(principal)
    async with db.read() as tx:
        if (await get_organization(tx, principal)).deleted_at is None:
            raise Conflict("delete the organisation first; only a deleted one can be purged")
    # Outside first: while the row exists a purge that broke off can be repeated.
    erased = {eraser.name: await eraser.erase(principal.org) for eraser in erasers}
    async with db.transaction() as tx:
        erased |= await _erase_rows(tx, principal)
        announce_change(tx, org=principal.org)
        await scribe.record(tx, principal, "organization.purge", ("organization", principal.org), after=erased)
    return PurgeReport(principal.org, erased, tuple(sorted(str(name) for name in KEPT & metadata.tables.keys())))


# tenant-scope: every statement names the principal's organisation; people are those found by it
async def _erase_rows(tx: AsyncConnection, principal: Principal) -> dict[str, int]:
    """Delete the organisation's rows, children first; how many by table."""
    counts: dict[str, int] = {}
    # People who belong to no other organisation go too.
    elsewhere = org_members.alias("elsewhere")
    alone = sa.select(org_members.c.user_id).where(
        owned(principal, org_members),
        ~sa.exists().where(elsewhere.c.user_id == org_members.c.user_id, elsewhere.c.org_id != principal.org),
    )
    people = list((await tx.execute(alone)).scalars())
    for table in reversed(metadata.sorted_tables):
        if table.name in KEPT or table is organizations or "org_id" not in table.c:
            continue
        done = await tx.execute(table.delete().where(table.c.org_id == principal.org))
        if done.rowcount:
            counts[str(table.name)] = done.rowcount  # SQLAlchemy's names are a kind of text that JSON encoders refuse
    if people:
        leaving = users.delete().where(users.c.id.in_(people), sa.not_(users.c.is_operator))
        counts[str(users.name)] = (await tx.execute(leaving)).rowcount
    done = await tx.execute(organizations.delete().where(owned(principal, organizations)))
    counts[str(organizations.name)] = done.rowcount
    return counts


async def _require_other_org(tx: AsyncConnection, principal: Principal) -> None:
    """An operator's key cannot close the organisation that it belongs to: nobody could open it again."""
    from_key = sa.select(api_keys.c.org_id).where(api_keys.c.id == principal.key_id)
    if (await tx.execute(from_key)).scalar() == principal.org:
        raise Conflict("this key belongs to the organisation; use another operator key to delete it")


async def _set_deleted(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, before: Organization, *, verb: str
) -> Organization:
    deleted_at = scribe.now() if verb == "delete" else None
    values: dict[str, Any] = {"deleted_at": deleted_at, "version": before.version + 1}
    changed = organizations.update().where(owned(principal, organizations), organizations.c.version == before.version)
    if (await tx.execute(changed.values(**values))).rowcount != 1:
        raise Conflict(f"organisation {before.id!r} was changed by somebody else meanwhile; repeat your change")
    announce_change(tx, org=before.id)
    was, now = {"deleted_at": before.deleted_at}, {"deleted_at": deleted_at}
    target = ("organization", before.id)
    await scribe.record(tx, principal, f"organization.{verb}", target, before=was, after=now)
    return await get_organization(tx, principal)
