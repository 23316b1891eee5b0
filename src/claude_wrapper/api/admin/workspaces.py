"""`/v1/organizations/workspaces` and their members."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response

from claude_wrapper.api.admin import views
from claude_wrapper.api.admin.http import AdminRoute, Asked, json, page
from claude_wrapper.errors import InvalidRequest
from claude_wrapper.tenancy import members, workspaces
from claude_wrapper.tenancy.scopes import Role, parse_role
from claude_wrapper.tenancy.workspaces import WorkspaceChange

_NOT_HERE = ("data_residency", "external_key_id", "user_profile_id")


class _Elsewhere(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What the real API offers and this server does not: taken only when it asks for nothing."""

    data_residency: Any = None
    external_key_id: Any = None
    user_profile_id: Any = None

    def refuse(self) -> None:
        for name in _NOT_HERE:
            if getattr(self, name) is not None:
                raise InvalidRequest("is not offered by this server", field=name)


class NewWorkspace(_Elsewhere, forbid_unknown_fields=True, kw_only=True):
    """A workspace to be made."""

    name: str
    display_color: str | None = None
    tags: dict[str, str] | None = None


class ChangedWorkspace(_Elsewhere, forbid_unknown_fields=True, kw_only=True):
    """What to change; a tag that is null is removed."""

    name: str | None = None
    display_color: str | None = None
    tags: dict[str, str | None] | None = None
    version: int | None = None


class NewMember(msgspec.Struct, forbid_unknown_fields=True):
    """Who joins a workspace, as what."""

    user_id: str
    workspace_role: str


class ChangedMember(msgspec.Struct, forbid_unknown_fields=True):
    """A member's new role."""

    workspace_role: str
    version: int | None = None


async def list_workspaces(asked: Asked) -> Response:
    """List workspaces, newest first."""
    found = await asked.see(
        workspaces.list_workspaces,
        asked.page(),
        only=asked.many("ids"),
        include_archived=asked.flag("include_archived"),
        include_default=asked.flag("include_default", default=True),
    )
    return page(found, views.workspace)


async def create_workspace(asked: Asked) -> Response:
    """Create a workspace."""
    body = await asked.body(NewWorkspace)
    body.refuse()
    more = {} if body.display_color is None else {"display_color": body.display_color}

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        made = await workspaces.create_workspace(tx, asked.principal, asked.scribe, body.name, tags=body.tags, **more)
        return views.workspace(made)

    return await asked.create(work)


async def get_workspace(asked: Asked) -> Response:
    """One workspace."""
    return json(views.workspace(await asked.see(workspaces.get_workspace, asked.path("workspace_id"))))


async def update_workspace(asked: Asked) -> Response:
    """Rename or tag a workspace."""
    body = await asked.body(ChangedWorkspace)
    body.refuse()
    change = WorkspaceChange(
        name=body.name, display_color=body.display_color, tags=body.tags, expected_version=body.version
    )
    return json(views.workspace(await asked.do(workspaces.update_workspace, asked.path("workspace_id"), change)))


async def archive_workspace(asked: Asked) -> Response:
    """Archive a workspace and its API keys."""
    return json(views.workspace(await asked.do(workspaces.archive_workspace, asked.path("workspace_id"))))


async def list_members(asked: Asked) -> Response:
    """List the members of a workspace, newest first."""
    return page(await asked.see(members.list_members, asked.path("workspace_id"), asked.page()), views.member)


async def add_member(asked: Asked) -> Response:
    """Add a member of the organisation to a workspace."""
    body = await asked.body(NewMember)
    role = _role(body.workspace_role)

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        made = await members.add_member(
            tx, asked.principal, asked.scribe, asked.path("workspace_id"), user_id=body.user_id, role=role
        )
        return views.member(made)

    return await asked.create(work)


async def get_member(asked: Asked) -> Response:
    """One member of a workspace."""
    return json(views.member(await asked.see(members.get_member, asked.path("workspace_id"), asked.path("user_id"))))


async def update_member(asked: Asked) -> Response:
    """Give a member of a workspace another role."""
    body = await asked.body(ChangedMember)
    changed = await asked.do(
        members.update_member,
        asked.path("workspace_id"),
        user_id=asked.path("user_id"),
        role=_role(body.workspace_role),
        expected_version=body.version,
    )
    return json(views.member(changed))


async def remove_member(asked: Asked) -> Response:
    """Take a member out of a workspace."""
    gone = await asked.do(members.remove_member, asked.path("workspace_id"), user_id=asked.path("user_id"))
    return json({"type": "workspace_member_deleted", "workspace_id": gone.workspace_id, "user_id": gone.user_id})


def _role(value: str) -> Role:
    role = parse_role(value, field="workspace_role")
    if role is Role.OWNER:
        raise InvalidRequest("a workspace has no owner; use workspace_admin", field="workspace_role")
    return role


_ALL = "/v1/organizations/workspaces"
_ONE = _ALL + "/{workspace_id}"
_MEMBER = _ONE + "/members/{user_id}"
_PAGE = ("limit", "after_id", "before_id")

ROUTES = (
    AdminRoute(
        "GET", _ALL, "read:workspaces", list_workspaces, query=(*_PAGE, "ids[]", "include_archived", "include_default")
    ),
    AdminRoute("POST", _ALL, "write:workspaces", create_workspace, NewWorkspace),
    AdminRoute("GET", _ONE, "read:workspaces", get_workspace),
    AdminRoute("POST", _ONE, "write:workspaces", update_workspace, ChangedWorkspace),
    AdminRoute("POST", _ONE + "/archive", "write:workspaces", archive_workspace),
    AdminRoute("GET", _ONE + "/members", "read:workspaces", list_members, query=_PAGE),
    AdminRoute("POST", _ONE + "/members", "write:workspaces", add_member, NewMember),
    AdminRoute("GET", _MEMBER, "read:workspaces", get_member),
    AdminRoute("POST", _MEMBER, "write:workspaces", update_member, ChangedMember),
    AdminRoute("DELETE", _MEMBER, "write:workspaces", remove_member),
)
