"""Organisations: the tenants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper import ids
from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.tenancy import organizations, workspaces
from claude_wrapper.tenancy import policies
from claude_wrapper.tenancy.announcements import announce_change
from claude_wrapper.tenancy.audit import Scribe, changes
from claude_wrapper.tenancy.locking import bump
from claude_wrapper.tenancy.principal import Principal, owned, require_operator
from claude_wrapper.tenancy.values import clean_name


@dataclass(frozen=True, slots=True)
class Organization:
    """A tenant."""

    id: str
    name: str
    is_staff: bool
    settings: Mapping[str, Any]
    created_at: datetime
    deleted_at: datetime | None
    version: int


@dataclass(frozen=True, slots=True)
class OrganizationChange:
    """What to change; None leaves a field as it is."""

    name: str | None = None
    settings: Mapping[str, Any] | None = None
    """Merged into the present ones; a value None removes its key."""
    is_staff: bool | None = None
    """Only the operator may change it."""
    expected_version: int | None = None


async def create_organization(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, name: str, *, is_staff: bool = False
) -> Organization:
    """A new organisation with its default workspace. Only the operator may."""
    require_operator(principal)
    now, org = scribe.now(), scribe.ids.new(ids.ORG)
    name = clean_name(name)
    await tx.execute(sa.insert(organizations).values(id=org, name=name, is_staff=is_staff, created_at=now))
    await tx.execute(
        sa.insert(workspaces).values(
            id=scribe.ids.new(ids.WORKSPACE), org_id=org, name="Default", is_default=True, created_at=now
        )
    )
    inside = principal.acting_in(org)
    after = {"name": name, "is_staff": is_staff}
    await scribe.record(tx, inside, "organization.create", ("organization", org), after=after)
    return await get_organization(tx, inside)


async def get_organization(tx: AsyncConnection, principal: Principal) -> Organization:
    """The principal's organisation. Needs `read:organization`."""
    principal.require("read:organization")
    row = (await tx.execute(sa.select(organizations).where(owned(principal, organizations)))).first()
    if row is None:
        raise NotFound(f"there is no organisation {principal.org!r}")
    return read_organization(row)


# tenant-scope: only the operator sees more than one organisation
async def list_organizations(
    tx: AsyncConnection, principal: Principal, request: PageRequest, *, include_deleted: bool = False
) -> Page[Organization]:
    """All organisations, newest first. Only the operator may."""
    require_operator(principal)
    statement = sa.select(organizations)
    if not include_deleted:
        statement = statement.where(organizations.c.deleted_at.is_(None))
    key = (organizations.c.created_at, organizations.c.id)
    return await fetch_page(tx, statement, key, request, read_organization)


async def update_organization(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, change: OrganizationChange
) -> Organization:
    """Change the principal's organisation. Needs `write:organization`; raises Conflict if somebody was quicker."""
    principal.require("write:organization")
    before = await get_organization(tx, principal)
    values: dict[str, Any] = {}
    if change.name is not None:
        values["name"] = clean_name(change.name)
    if change.settings is not None:
        check_settings(change.settings)
        merged = {**before.settings, **change.settings}
        values["settings"] = {name: value for name, value in merged.items() if value is not None}
    if change.is_staff is not None:
        require_operator(principal)
        values["is_staff"] = change.is_staff
    if not values:
        return before
    where = (owned(principal, organizations),)
    version = change.expected_version or before.version
    await bump(tx, organizations, where, values, version, what=f"organisation {before.id!r}")
    announce_change(tx, org=before.id)
    after = await get_organization(tx, principal)
    old, new = changes(before, after, "name", "settings", "is_staff")
    await scribe.record(tx, principal, "organization.update", ("organization", before.id), before=old, after=new)
    return after


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for a setting that means something to the server and cannot be read."""
    kept = settings.get(policies.SETTING)
    if kept is None:
        return
    if not isinstance(kept, Mapping):
        raise InvalidRequest("must be an object", field=f"settings.{policies.SETTING}")
    policies.parse(kept)


def read_organization(row: Any) -> Organization:
    """The record of a row."""
    return Organization(
        id=row.id,
        name=row.name,
        is_staff=row.is_staff,
        settings=row.settings or {},
        created_at=row.created_at,
        deleted_at=row.deleted_at,
        version=row.version,
    )
