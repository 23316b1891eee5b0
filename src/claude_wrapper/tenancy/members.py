"""Members of workspaces: what a person may do in one workspace beyond what their organisation role allows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict, NotFound
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.tenancy import org_members
from claude_wrapper.storage.tables.tenancy import workspace_members as table
from claude_wrapper.tenancy.announcements import announce_change
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.locking import bump
from claude_wrapper.tenancy.principal import Principal, owned, require_grantable
from claude_wrapper.tenancy.scopes import Role, scopes_of
from claude_wrapper.tenancy.workspaces import get_workspace

_KIND = "workspace_member"


@dataclass(frozen=True, slots=True)
class WorkspaceMember:
    """A person in a workspace."""

    workspace_id: str
    user_id: str
    role: Role
    added_at: datetime
    version: int


async def add_member(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, workspace_id: str, *, user_id: str, role: Role
) -> WorkspaceMember:
    """Add a member of the organisation to a workspace. Needs `write:workspaces`; raises Conflict if they are in it."""
    principal.require("write:workspaces")
    require_grantable(principal, scopes_of(role), what=f"the role {role}")
    workspace = await get_workspace(tx, principal, workspace_id)
    if workspace.archived_at is not None:
        raise Conflict(f"workspace {workspace_id!r} is archived")
    belongs = sa.select(org_members.c.user_id).where(owned(principal, org_members), org_members.c.user_id == user_id)
    if (await tx.execute(belongs)).first() is None:
        raise NotFound(f"there is no user {user_id!r} in this organisation")
    if await _find(tx, principal, workspace_id, user_id) is not None:
        raise Conflict(f"user {user_id!r} is a member of this workspace already")
    row = {"workspace_id": workspace_id, "user_id": user_id, "role": str(role), "added_at": scribe.now()}
    await tx.execute(sa.insert(table).values(org_id=principal.org, **row))
    await _changed(tx, principal, scribe, "add", workspace_id, user_id=user_id, after={"role": str(role)})
    return await get_member(tx, principal, workspace_id, user_id)


async def get_member(tx: AsyncConnection, principal: Principal, workspace_id: str, user_id: str) -> WorkspaceMember:
    """One member. Needs `read:workspaces`; raises NotFound."""
    principal.require("read:workspaces")
    row = await _find(tx, principal, workspace_id, user_id)
    if row is None:
        raise NotFound(f"there is no member {user_id!r} in workspace {workspace_id!r}")
    return _member(row)


async def list_members(
    tx: AsyncConnection, principal: Principal, workspace_id: str, request: PageRequest
) -> Page[WorkspaceMember]:
    """The members of a workspace, newest first. Needs `read:workspaces`; raises NotFound."""
    await get_workspace(tx, principal, workspace_id)
    statement = sa.select(table).where(owned(principal, table), table.c.workspace_id == workspace_id)
    return await fetch_page(tx, statement, (table.c.added_at, table.c.user_id), request, _member)


async def update_member(
    tx: AsyncConnection,
    principal: Principal,
    scribe: Scribe,
    workspace_id: str,
    *,
    user_id: str,
    role: Role,
    expected_version: int | None = None,
) -> WorkspaceMember:
    """Give a member another role. Needs `write:workspaces` and both roles' scopes."""
    principal.require("write:workspaces")
    before = await get_member(tx, principal, workspace_id, user_id)
    if before.role is role:
        return before
    require_grantable(principal, scopes_of(before.role) | scopes_of(role), what=f"the role {role}")
    where = (owned(principal, table), table.c.workspace_id == workspace_id, table.c.user_id == user_id)
    await bump(tx, table, where, {"role": str(role)}, expected_version or before.version, what=f"member {user_id!r}")
    was, now = {"role": str(before.role)}, {"role": str(role)}
    await _changed(tx, principal, scribe, "update", workspace_id, user_id=user_id, before=was, after=now)
    return await get_member(tx, principal, workspace_id, user_id)


async def remove_member(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, workspace_id: str, *, user_id: str
) -> WorkspaceMember:
    """Take a member out of a workspace. Needs `write:workspaces`; raises NotFound."""
    principal.require("write:workspaces")
    before = await get_member(tx, principal, workspace_id, user_id)
    require_grantable(principal, scopes_of(before.role), what=f"the removal of {before.role}s")
    gone = table.delete().where(
        owned(principal, table), table.c.workspace_id == workspace_id, table.c.user_id == user_id
    )
    await tx.execute(gone)
    was = {"role": str(before.role)}
    await _changed(tx, principal, scribe, "remove", workspace_id, user_id=user_id, before=was)
    return before


async def _find(tx: AsyncConnection, principal: Principal, workspace_id: str, user_id: str) -> Any:
    found = sa.select(table).where(
        owned(principal, table), table.c.workspace_id == workspace_id, table.c.user_id == user_id
    )
    return (await tx.execute(found)).first()


async def _changed(
    tx: AsyncConnection,
    principal: Principal,
    scribe: Scribe,
    verb: str,
    workspace_id: str,
    *,
    user_id: str,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> None:
    announce_change(tx, org=principal.org, user=user_id)
    target = (_KIND, f"{workspace_id}/{user_id}")
    await scribe.record(tx, principal, f"{_KIND}.{verb}", target, before=before, after=after)


def _member(row: Any) -> WorkspaceMember:
    return WorkspaceMember(row.workspace_id, row.user_id, Role(row.role), row.added_at, row.version)
