"""Invitations: an address, a role, and a token that makes whoever holds it a member, once."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper import ids
from claude_wrapper.errors import Conflict, NotFound
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.tenancy import invites, org_members, organizations, users
from claude_wrapper.tenancy.announcements import announce_change
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.keyformat import mint_token, token_digest
from claude_wrapper.tenancy.principal import ActorKind, Principal, owned, require_grantable
from claude_wrapper.tenancy.scopes import Role, scopes_of
from claude_wrapper.tenancy.users import ensure_user
from claude_wrapper.tenancy.values import clean_email

VALID_FOR = timedelta(days=21)


class InviteStatus(enum.StrEnum):
    """Follows from the times; nothing is stored."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    EXPIRED = "expired"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Invite:
    """An invitation without its token."""

    id: str
    org_id: str
    email: str
    role: Role
    status: InviteStatus
    invited_at: datetime
    expires_at: datetime
    accepted_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewInvite:
    """An invitation with its token, which is to be sent to the address and is shown this once."""

    invite: Invite
    token: str = field(repr=False)


async def create_invite(
    tx: AsyncConnection,
    principal: Principal,
    scribe: Scribe,
    *,
    email: str,
    role: Role,
    valid_for: timedelta = VALID_FOR,
) -> NewInvite:
    """Invite somebody. Needs `write:members` and the role's scopes; raises Conflict for a member or a pending invite."""
    principal.require("write:members")
    require_grantable(principal, scopes_of(role), what=f"the role {role}")
    address, now = clean_email(email), scribe.now()
    member = (
        sa.select(users.c.id)
        .join(org_members, org_members.c.user_id == users.c.id)
        .where(owned(principal, org_members), users.c.email == address)
    )
    if (await tx.execute(member)).first() is not None:
        raise Conflict(f"{address} is a member of this organisation already")
    pending = sa.select(invites.c.id).where(owned(principal, invites), invites.c.email == address, _is_pending(now))
    if (await tx.execute(pending)).first() is not None:
        raise Conflict(f"{address} has a pending invite already; delete it first")
    invite_id, token = scribe.ids.new(ids.INVITE), mint_token()
    await tx.execute(
        sa.insert(invites).values(
            id=invite_id,
            org_id=principal.org,
            email=address,
            role=str(role),
            digest=token_digest(token),
            invited_by=principal.actor_id,
            created_at=now,
            expires_at=now + valid_for,
        )
    )
    after = {"email": address, "role": str(role)}
    await scribe.record(tx, principal, "invite.create", ("invite", invite_id), after=after)
    return NewInvite(await get_invite(tx, principal, invite_id, now=now), token)


async def get_invite(tx: AsyncConnection, principal: Principal, invite_id: str, *, now: datetime) -> Invite:
    """One invitation. Needs `read:members`; raises NotFound."""
    principal.require("read:members")
    row = (await tx.execute(sa.select(invites).where(owned(principal, invites), invites.c.id == invite_id))).first()
    if row is None:
        raise NotFound(f"there is no invite {invite_id!r}")
    return _invite(row, now)


async def list_invites(
    tx: AsyncConnection,
    principal: Principal,
    request: PageRequest,
    *,
    now: datetime,
    email: str | None = None,
    roles: Sequence[Role] | None = None,
    statuses: Sequence[InviteStatus] | None = None,
) -> Page[Invite]:
    """The organisation's invitations, newest first, without deleted ones unless asked for. Needs `read:members`."""
    principal.require("read:members")
    statement = sa.select(invites).where(owned(principal, invites))
    if email is not None:
        statement = statement.where(invites.c.email == clean_email(email))
    if roles is not None:
        statement = statement.where(invites.c.role.in_([str(role) for role in roles]))
    wanted = statuses or (InviteStatus.PENDING, InviteStatus.ACCEPTED, InviteStatus.EXPIRED)
    statement = statement.where(sa.or_(*(_has_status(status, now) for status in wanted)))
    key = (invites.c.created_at, invites.c.id)
    return await fetch_page(tx, statement, key, request, lambda row: _invite(row, now))


async def delete_invite(tx: AsyncConnection, principal: Principal, scribe: Scribe, invite_id: str) -> Invite:
    """Withdraw an invitation; an accepted one cannot be. Needs `write:members`."""
    principal.require("write:members")
    now = scribe.now()
    before = await get_invite(tx, principal, invite_id, now=now)
    if before.status is InviteStatus.ACCEPTED:
        raise Conflict("this invite was accepted; remove the user instead")
    if before.status is InviteStatus.DELETED:
        return before
    gone = invites.update().where(owned(principal, invites), invites.c.id == invite_id)
    await tx.execute(gone.values(deleted_at=now))
    was = {"email": before.email, "role": str(before.role)}
    await scribe.record(tx, principal, "invite.delete", ("invite", invite_id), before=was)
    return await get_invite(tx, principal, invite_id, now=now)


# tenant-scope: the token is what proves the right to join; nobody is signed in yet
async def accept_invite(tx: AsyncConnection, scribe: Scribe, token: str, *, name: str = "") -> tuple[str, str]:
    """Become a member; the organisation and the user. Raises NotFound for a token that is unknown, used or out of date."""
    now = scribe.now()
    statement = (
        sa.select(invites)
        .join(organizations, organizations.c.id == invites.c.org_id)
        .where(invites.c.digest == token_digest(token), _is_pending(now), organizations.c.deleted_at.is_(None))
    )
    row = (await tx.execute(statement)).first()
    if row is None:
        raise NotFound("this invite is unknown, was used, or has expired; ask for a new one")
    taken = invites.update().where(invites.c.id == row.id, invites.c.accepted_at.is_(None))
    if (await tx.execute(taken.values(accepted_at=now))).rowcount != 1:
        raise NotFound("this invite is unknown, was used, or has expired; ask for a new one")
    user_id = await ensure_user(tx, scribe, email=row.email, name=name)
    role = Role(row.role)
    joined = Principal(row.org_id, None, ActorKind.USER, None, user_id, role, scopes_of(role))
    present = sa.select(org_members.c.role).where(owned(joined, org_members), org_members.c.user_id == user_id)
    if (await tx.execute(present)).first() is None:
        member = {"org_id": row.org_id, "user_id": user_id, "role": row.role, "added_at": now}
        await tx.execute(sa.insert(org_members).values(**member))
    announce_change(tx, org=row.org_id, user=user_id)
    after = {"user_id": user_id, "role": row.role}
    await scribe.record(tx, joined, "invite.accept", ("invite", row.id), after=after)
    return row.org_id, user_id


def _is_pending(now: datetime) -> sa.ColumnElement[bool]:
    return sa.and_(invites.c.accepted_at.is_(None), invites.c.deleted_at.is_(None), invites.c.expires_at > now)


def _has_status(status: InviteStatus, now: datetime) -> sa.ColumnElement[bool]:
    if status is InviteStatus.ACCEPTED:
        return invites.c.accepted_at.is_not(None)
    if status is InviteStatus.DELETED:
        return sa.and_(invites.c.accepted_at.is_(None), invites.c.deleted_at.is_not(None))
    if status is InviteStatus.PENDING:
        return _is_pending(now)
    return sa.and_(invites.c.accepted_at.is_(None), invites.c.deleted_at.is_(None), invites.c.expires_at <= now)


def _invite(row: Any, now: datetime) -> Invite:
    if row.accepted_at is not None:
        status = InviteStatus.ACCEPTED
    elif row.deleted_at is not None:
        status = InviteStatus.DELETED
    else:
        status = InviteStatus.PENDING if row.expires_at > now else InviteStatus.EXPIRED
    return Invite(
        id=row.id,
        org_id=row.org_id,
        email=row.email,
        role=Role(row.role),
        status=status,
        invited_at=row.created_at,
        expires_at=row.expires_at,
        accepted_at=row.accepted_at,
    )
