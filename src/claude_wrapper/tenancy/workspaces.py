"""Workspaces: groups of keys and sessions inside an organisation. They are archived, never deleted one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper import ids
from claude_wrapper.errors import Conflict, InvalidRequest, NotFound, PermissionDenied
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.tenancy import api_keys
from claude_wrapper.storage.tables.tenancy import workspaces as table
from claude_wrapper.tenancy.announcements import announce_change
from claude_wrapper.tenancy.audit import Scribe, changes
from claude_wrapper.tenancy.locking import bump
from claude_wrapper.tenancy.principal import Principal, owned
from claude_wrapper.tenancy.values import clean_color, clean_name, clean_tags

MAX_IDS = 100


@dataclass(frozen=True, slots=True)
class Workspace:
    """A group of keys and sessions."""

    id: str
    org_id: str
    name: str
    display_color: str
    tags: Mapping[str, str]
    is_default: bool
    created_at: datetime
    archived_at: datetime | None
    version: int


@dataclass(frozen=True, slots=True)
class WorkspaceChange:
    """What to change; None leaves a field as it is."""

    name: str | None = None
    display_color: str | None = None
    tags: Mapping[str, str | None] | None = None
    """Merged into the present ones; a value None removes its key."""
    expected_version: int | None = None


async def create_workspace(
    tx: AsyncConnection,
    principal: Principal,
    scribe: Scribe,
    name: str,
    *,
    display_color: str = "#6C5BB9",
    tags: Mapping[str, str] | None = None,
) -> Workspace:
    """A new workspace. Needs `write:workspaces`; a key that belongs to a workspace cannot."""
    principal.require("write:workspaces")
    if principal.workspace is not None:
        raise PermissionDenied("a key that belongs to a workspace cannot create others")
    workspace_id = scribe.ids.new(ids.WORKSPACE)
    await tx.execute(
        sa.insert(table).values(
            id=workspace_id,
            org_id=principal.org,
            name=clean_name(name),
            display_color=clean_color(display_color),
            tags=clean_tags(tags or {}),
            created_at=scribe.now(),
        )
    )
    workspace = await get_workspace(tx, principal, workspace_id)
    after = {"name": workspace.name, "display_color": workspace.display_color, "tags": dict(workspace.tags)}
    await scribe.record(tx, principal, "workspace.create", ("workspace", workspace_id), after=after)
    return workspace


async def get_workspace(tx: AsyncConnection, principal: Principal, workspace_id: str) -> Workspace:
    """One workspace. Needs `read:workspaces`; raises NotFound."""
    principal.require("read:workspaces")
    row = (await tx.execute(sa.select(table).where(owned(principal, table), table.c.id == workspace_id))).first()
    if row is None:
        raise NotFound(f"there is no workspace {workspace_id!r}")
    return _workspace(row)


async def default_workspace(tx: AsyncConnection, principal: Principal) -> Workspace:
    """The organisation's default workspace; raises NotFound. Needs no scope: everything happens in some workspace."""
    row = (await tx.execute(sa.select(table).where(owned(principal, table), table.c.is_default))).first()
    if row is None:
        raise NotFound("this organisation has no default workspace that you can see")
    return _workspace(row)


async def list_workspaces(
    tx: AsyncConnection,
    principal: Principal,
    request: PageRequest,
    *,
    only: Sequence[str] | None = None,
    include_archived: bool = False,
    include_default: bool = True,
) -> Page[Workspace]:
    """The organisation's workspaces, newest first; `only` names at most 100. Needs `read:workspaces`."""
    principal.require("read:workspaces")
    statement = sa.select(table).where(owned(principal, table))
    if only is not None:
        if len(only) > MAX_IDS:
            raise InvalidRequest(f"at most {MAX_IDS}", field="ids")
        statement = statement.where(table.c.id.in_(only))
    if not include_archived:
        statement = statement.where(table.c.archived_at.is_(None))
    if not include_default:
        statement = statement.where(sa.not_(table.c.is_default))
    return await fetch_page(tx, statement, (table.c.created_at, table.c.id), request, _workspace)


async def update_workspace(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, workspace_id: str, change: WorkspaceChange
) -> Workspace:
    """Change a workspace. Needs `write:workspaces`; raises Conflict if it is archived or somebody was quicker."""
    principal.require("write:workspaces")
    before = await get_workspace(tx, principal, workspace_id)
    if before.archived_at is not None:
        raise Conflict(f"workspace {workspace_id!r} is archived and cannot be changed")
    values: dict[str, Any] = {}
    if change.name is not None:
        values["name"] = clean_name(change.name)
    if change.display_color is not None:
        values["display_color"] = clean_color(change.display_color)
    if change.tags is not None:
        merged = {**before.tags, **change.tags}
        values["tags"] = clean_tags({name: value for name, value in merged.items() if value is not None})
    if not values:
        return before
    await _change(tx, principal, before, values, change.expected_version)
    after = await get_workspace(tx, principal, workspace_id)
    old, new = changes(before, after, "name", "display_color", "tags")
    await scribe.record(tx, principal, "workspace.update", ("workspace", workspace_id), before=old, after=new)
    return after


async def archive_workspace(tx: AsyncConnection, principal: Principal, scribe: Scribe, workspace_id: str) -> Workspace:
    """Archive a workspace and, with it, its API keys. Doing it twice is no error; the default one cannot be."""
    principal.require("write:workspaces")
    before = await get_workspace(tx, principal, workspace_id)
    if before.is_default:
        raise Conflict("the default workspace cannot be archived")
    if before.archived_at is not None:
        return before
    now = scribe.now()
    await _change(tx, principal, before, {"archived_at": now}, None)
    live = api_keys.update().where(
        owned(principal, api_keys), api_keys.c.workspace_id == workspace_id, api_keys.c.status != "archived"
    )
    keys = await tx.execute(live.values(status="archived", revoked_at=now, version=api_keys.c.version + 1))
    after = {"archived_at": now, "archived_keys": keys.rowcount}
    target = ("workspace", workspace_id)
    await scribe.record(tx, principal, "workspace.archive", target, before={"archived_at": None}, after=after)
    return await get_workspace(tx, principal, workspace_id)


async def _change(
    tx: AsyncConnection, principal: Principal, before: Workspace, values: dict[str, Any], expected: int | None
) -> None:
    where = (owned(principal, table), table.c.id == before.id)
    await bump(tx, table, where, values, expected or before.version, what=f"workspace {before.id!r}")
    announce_change(tx, org=before.org_id, workspace=before.id)


def _workspace(row: Any) -> Workspace:
    return Workspace(
        id=row.id,
        org_id=row.org_id,
        name=row.name,
        display_color=row.display_color,
        tags=row.tags or {},
        is_default=row.is_default,
        created_at=row.created_at,
        archived_at=row.archived_at,
        version=row.version,
    )
