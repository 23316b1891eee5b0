"""People and their place in an organisation. A person is one row for all organisations; membership gives the role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper import ids
from claude_wrapper.errors import Conflict, NotFound
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.tenancy import api_keys, org_members, users, workspace_members
from claude_wrapper.tenancy.announcements import announce_change
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.locking import bump
from claude_wrapper.tenancy.principal import Principal, owned, require_grantable
from claude_wrapper.tenancy.scopes import Role, scopes_of
from claude_wrapper.tenancy.values import clean_email, clean_name


@dataclass(frozen=True, slots=True)
class User:
    """A person as a member of one organisation."""

    id: str
    org_id: str
    email: str
    name: str
    role: Role
    added_at: datetime
    disabled_at: datetime | None
    version: int


async def add_user(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, *, email: str, name: str = "", role: Role
) -> User:
    """Make a person a member, without an invitation. Needs `write:members`; raises Conflict if they are one already."""
    principal.require("write:members")
    require_grantable(principal, scopes_of(role), what=f"the role {role}")
    user_id = await ensure_user(tx, scribe, email=email, name=name)
    present = sa.select(org_members.c.role).where(owned(principal, org_members), org_members.c.user_id == user_id)
    if (await tx.execute(present)).first() is not None:
        raise Conflict(f"{clean_email(email)} is a member of this organisation already")
    await tx.execute(
        sa.insert(org_members).values(org_id=principal.org, user_id=user_id, role=str(role), added_at=scribe.now())
    )
    announce_change(tx, org=principal.org, user=user_id)
    await scribe.record(tx, principal, "user.add", ("user", user_id), after={"role": str(role)})
    return await _member(tx, principal, user_id)


async def get_user(tx: AsyncConnection, principal: Principal, user_id: str) -> User:
    """One member. Needs `read:members`; raises NotFound."""
    principal.require("read:members")
    return await _member(tx, principal, user_id)


async def list_users(
    tx: AsyncConnection,
    principal: Principal,
    request: PageRequest,
    *,
    email: str | None = None,
    roles: Sequence[Role] | None = None,
) -> Page[User]:
    """The organisation's members, newest first. Needs `read:members`."""
    principal.require("read:members")
    statement = _members().where(owned(principal, org_members))
    if email is not None:
        statement = statement.where(users.c.email == clean_email(email))
    if roles is not None:
        statement = statement.where(org_members.c.role.in_([str(role) for role in roles]))
    return await fetch_page(tx, statement, (org_members.c.added_at, org_members.c.user_id), request, _user)


async def update_user(
    tx: AsyncConnection,
    principal: Principal,
    scribe: Scribe,
    user_id: str,
    *,
    role: Role,
    expected_version: int | None = None,
) -> User:
    """Give a member another role. Needs `write:members` and both roles' scopes; the last owner stays one."""
    principal.require("write:members")
    before = await _member(tx, principal, user_id)
    if before.role is role:
        return before
    require_grantable(principal, scopes_of(before.role) | scopes_of(role), what=f"the role {role}")
    if before.role is Role.OWNER:
        await _require_other_owner(tx, principal, user_id)
    where = (owned(principal, org_members), org_members.c.user_id == user_id)
    version = expected_version or before.version
    await bump(tx, org_members, where, {"role": str(role)}, version, what=f"user {user_id!r}")
    announce_change(tx, org=principal.org, user=user_id)
    was, now = {"role": str(before.role)}, {"role": str(role)}
    await scribe.record(tx, principal, "user.update", ("user", user_id), before=was, after=now)
    return await _member(tx, principal, user_id)


async def remove_user(tx: AsyncConnection, principal: Principal, scribe: Scribe, user_id: str) -> User:
    """Take a member out of the organisation, its workspaces, and revoke the keys that act for them."""
    principal.require("write:members")
    before = await _member(tx, principal, user_id)
    require_grantable(principal, scopes_of(before.role), what=f"the removal of {before.role}s")
    if before.role is Role.OWNER:
        await _require_other_owner(tx, principal, user_id)
    for table in (workspace_members, org_members):
        await tx.execute(table.delete().where(owned(principal, table), table.c.user_id == user_id))
    live = api_keys.update().where(
        owned(principal, api_keys), api_keys.c.user_id == user_id, api_keys.c.status != "archived"
    )
    keys = await tx.execute(live.values(status="archived", revoked_at=scribe.now(), version=api_keys.c.version + 1))
    announce_change(tx, org=principal.org, user=user_id)
    gone = {"email": before.email, "role": str(before.role)}
    after = {"archived_keys": keys.rowcount}
    await scribe.record(tx, principal, "user.remove", ("user", user_id), before=gone, after=after)
    return before


# tenant-scope: people belong to no organisation; only their membership does
async def ensure_user(tx: AsyncConnection, scribe: Scribe, *, email: str, name: str = "") -> str:
    """The identifier of the person with this address, made if unknown."""
    address = clean_email(email)
    found = (await tx.execute(sa.select(users.c.id).where(users.c.email == address))).scalar()
    if found is not None:
        return str(found)
    user_id = scribe.ids.new(ids.USER)
    display = clean_name(name) if name else address.partition("@")[0]
    await tx.execute(sa.insert(users).values(id=user_id, email=address, name=display, created_at=scribe.now()))
    return user_id


# inside ----------------------------------------------------------------------------------------------------------------


# tenant-scope: a part of a statement; each use adds the principal's clause
def _members() -> sa.Select[Any]:
    return sa.select(org_members, users.c.email, users.c.name, users.c.disabled_at).join(
        users, users.c.id == org_members.c.user_id
    )


async def _member(tx: AsyncConnection, principal: Principal, user_id: str) -> User:
    statement = _members().where(owned(principal, org_members), org_members.c.user_id == user_id)
    row = (await tx.execute(statement)).first()
    if row is None:
        raise NotFound(f"there is no user {user_id!r} in this organisation")
    return _user(row)


async def _require_other_owner(tx: AsyncConnection, principal: Principal, user_id: str) -> None:
    others = (
        sa.select(org_members.c.user_id)
        .where(owned(principal, org_members), org_members.c.role == str(Role.OWNER), org_members.c.user_id != user_id)
        .with_for_update()  # two owners who demote each other at once must not both succeed; SQLite ignores it
    )
    if (await tx.execute(others)).first() is None:
        raise Conflict("an organisation keeps at least one owner; make somebody else owner first")


def _user(row: Any) -> User:
    return User(
        id=row.user_id,
        org_id=row.org_id,
        email=row.email,
        name=row.name,
        role=Role(row.role),
        added_at=row.added_at,
        disabled_at=row.disabled_at,
        version=row.version,
    )
