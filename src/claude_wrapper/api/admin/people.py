"""`/v1/organizations/users` and `/invites`."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response

from claude_wrapper.api.admin import views
from claude_wrapper.api.admin.http import OPEN, AdminRoute, Asked, json, page
from claude_wrapper.errors import InvalidRequest
from claude_wrapper.tenancy import invites, users
from claude_wrapper.tenancy.invites import InviteStatus
from claude_wrapper.tenancy.scopes import Role, parse_role


class NewUser(msgspec.Struct, forbid_unknown_fields=True):
    """A person to be made a member without an invitation."""

    email: str
    role: str
    name: str = ""


class ChangedUser(msgspec.Struct, forbid_unknown_fields=True):
    """A member's new role."""

    role: str
    version: int | None = None


class NewInvite(msgspec.Struct, forbid_unknown_fields=True):
    """Who is to be invited, as what."""

    email: str
    role: str
    rbac_group_ids: list[str] = []


class Acceptance(msgspec.Struct, forbid_unknown_fields=True):
    """The token of an invitation."""

    token: str
    name: str = ""


def _roles(asked: Asked) -> list[Role] | None:
    given = asked.many("roles")
    return None if given is None else [parse_role(role, field="roles") for role in given]


async def list_users(asked: Asked) -> Response:
    """List the organisation's members, newest first."""
    found = await asked.see(users.list_users, asked.page(), email=asked.one("email"), roles=_roles(asked))
    return page(found, views.user)


async def add_user(asked: Asked) -> Response:
    """Make a person a member without an invitation."""
    body = await asked.body(NewUser)
    role = parse_role(body.role)

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        made = await users.add_user(tx, asked.principal, asked.scribe, email=body.email, name=body.name, role=role)
        return views.user(made)

    return await asked.create(work)


async def get_user(asked: Asked) -> Response:
    """One member."""
    return json(views.user(await asked.see(users.get_user, asked.path("user_id"))))


async def update_user(asked: Asked) -> Response:
    """Give a member another role."""
    body = await asked.body(ChangedUser)
    changed = await asked.do(
        users.update_user, asked.path("user_id"), role=parse_role(body.role), expected_version=body.version
    )
    return json(views.user(changed))


async def remove_user(asked: Asked) -> Response:
    """Take a member out of the organisation and revoke the keys that act for them."""
    gone = await asked.do(users.remove_user, asked.path("user_id"))
    return json({"id": gone.id, "type": "user_deleted"})


async def list_invites(asked: Asked) -> Response:
    """List invitations, newest first."""
    given = asked.many("statuses")
    found = await asked.see(
        invites.list_invites,
        asked.page(),
        now=asked.scribe.now(),
        email=asked.one("email"),
        roles=_roles(asked),
        statuses=None if given is None else [_status(value) for value in given],
    )
    return page(found, views.invite)


async def create_invite(asked: Asked) -> Response:
    """Invite somebody; the answer is the only one that holds the token, which is to be sent to them."""
    body = await asked.body(NewInvite)
    if body.rbac_group_ids:
        raise InvalidRequest("there are no such groups here; use the role", field="rbac_group_ids")
    role = parse_role(body.role)

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        made = await invites.create_invite(tx, asked.principal, asked.scribe, email=body.email, role=role)
        return {**views.invite(made.invite), "token": made.token}

    return await asked.create(work)


async def get_invite(asked: Asked) -> Response:
    """One invitation."""
    return json(views.invite(await asked.see(invites.get_invite, asked.path("invite_id"), now=asked.scribe.now())))


async def delete_invite(asked: Asked) -> Response:
    """Withdraw an invitation."""
    gone = await asked.do(invites.delete_invite, asked.path("invite_id"))
    return json({"id": gone.id, "type": "invite_deleted"})


async def accept_invite(asked: Asked) -> Response:
    """Become a member: the token alone proves the right to."""
    body = await asked.body(Acceptance)
    org, user_id = await asked.db.run(
        lambda tx: invites.accept_invite(tx, asked.scribe, body.token, name=body.name), idempotent=False
    )
    return json({"type": "membership", "organization_id": org, "user_id": user_id})


def _status(value: str) -> InviteStatus:
    try:
        return InviteStatus(value)
    except ValueError:
        raise InvalidRequest(f"use one of {', '.join(InviteStatus)}", field="statuses") from None


_PAGE = ("limit", "after_id", "before_id", "email", "roles[]")
_USER = "/v1/organizations/users/{user_id}"
_INVITE = "/v1/organizations/invites/{invite_id}"

ROUTES = (
    AdminRoute("GET", "/v1/organizations/users", "read:members", list_users, query=_PAGE),
    AdminRoute("POST", "/v1/organizations/users", "write:members", add_user, NewUser),
    AdminRoute("GET", _USER, "read:members", get_user),
    AdminRoute("POST", _USER, "write:members", update_user, ChangedUser),
    AdminRoute("DELETE", _USER, "write:members", remove_user),
    AdminRoute("GET", "/v1/organizations/invites", "read:members", list_invites, query=(*_PAGE, "statuses[]")),
    AdminRoute("POST", "/v1/organizations/invites", "write:members", create_invite, NewInvite),
    AdminRoute("POST", "/v1/organizations/invites/accept", OPEN, accept_invite, Acceptance),
    AdminRoute("GET", _INVITE, "read:members", get_invite),
    AdminRoute("DELETE", _INVITE, "write:members", delete_invite),
)
