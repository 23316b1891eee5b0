"""`/v1/organizations`: one's own organisation, and for the operator all of them: create, close, open again, erase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response

from claude_wrapper.api.admin import views
from claude_wrapper.api.admin.erasing import erasers
from claude_wrapper.api.admin.http import OPERATOR, AdminRoute, Asked, acting, json, page
from claude_wrapper.broker.egresslists import EGRESS_HOSTS, check_org_hosts
from claude_wrapper.sandbox.security import SETTING as SECURITY_LEVEL
from claude_wrapper.sandbox.security import SecurityLevels
from claude_wrapper.tenancy import deletion, orgs
from claude_wrapper.tenancy.audit import list_audit_entries
from claude_wrapper.tenancy.orgs import OrganizationChange


class NewOrganization(msgspec.Struct, forbid_unknown_fields=True):
    """An organisation to be made. Staff may fall back on the operator's own upstream credential."""

    name: str
    is_staff: bool = False


class ChangedOrganization(msgspec.Struct, forbid_unknown_fields=True):
    """What to change; a setting that is null is removed. `is_staff` is the operator's to change."""

    name: str | None = None
    settings: dict[str, Any] | None = None
    is_staff: bool | None = None
    version: int | None = None


async def get_me(asked: Asked) -> Response:
    """The organisation that the key belongs to."""
    return json(views.organization(await asked.see(orgs.get_organization)))


async def list_organizations(asked: Asked) -> Response:
    """List all organisations (operator)."""
    found = await asked.see(orgs.list_organizations, asked.page(), include_deleted=asked.flag("include_deleted"))
    return page(found, views.organization)


async def create_organization(asked: Asked) -> Response:
    """Create an organisation with its default workspace (operator)."""
    body = await asked.body(NewOrganization)

    async def work(tx: AsyncConnection) -> dict[str, Any]:
        made = await orgs.create_organization(tx, asked.principal, asked.scribe, body.name, is_staff=body.is_staff)
        return views.organization(made)

    return await asked.create(work)


async def _inside(asked: Asked) -> Asked:
    """The same request, acting in the organisation that its path names."""
    return replace(asked, principal=await acting(asked.deps, asked.principal, asked.path("organization_id")))


async def get_organization(asked: Asked) -> Response:
    """One organisation: one's own; the operator any."""
    return await get_me(await _inside(asked))


async def update_organization(asked: Asked) -> Response:
    """Rename an organisation, change its settings."""
    inside = await _inside(asked)
    body = await asked.body(ChangedOrganization)
    _check(body.settings or {}, asked.deps.security_levels)
    change = OrganizationChange(
        name=body.name, settings=body.settings, is_staff=body.is_staff, expected_version=body.version
    )
    return json(views.organization(await inside.do(orgs.update_organization, change)))


def _check(settings: Mapping[str, Any], levels: SecurityLevels) -> None:
    """Settings that turns read must be right when they are written. Raises InvalidRequest naming the setting."""
    if (level := settings.get(SECURITY_LEVEL)) is not None:
        levels.require(str(level))
    if (hosts := settings.get(EGRESS_HOSTS)) is not None:
        check_org_hosts(hosts)


async def delete_organization(asked: Asked) -> Response:
    """Close an organisation: its keys stop working at once, its data is kept. The operator can restore it."""
    inside = await _inside(asked)
    return json(views.organization(await inside.do(deletion.delete_organization)))


async def restore_organization(asked: Asked) -> Response:
    """Open a deleted organisation again (operator)."""
    inside = await _inside(asked)
    return json(views.organization(await inside.do(deletion.restore_organization)))


async def purge_organization(asked: Asked) -> Response:
    """Erase a deleted organisation for good and say what was erased (operator)."""
    inside = await _inside(asked)
    report = await deletion.purge_organization(
        asked.db, inside.principal, asked.scribe, erasers(asked.deps, inside.principal)
    )
    return json(
        {
            "id": report.org,
            "type": "organization_purged",
            "erased": dict(report.erased),
            "kept": list(report.kept),
        }
    )


async def list_audit(asked: Asked) -> Response:
    """The audit log, newest first: who changed what, from where, before and after."""
    found = await asked.see(
        list_audit_entries,
        asked.page(),
        action=asked.one("action"),
        target_id=asked.one("target_id"),
        actor_id=asked.one("actor_id"),
        since=asked.moment("starting_at"),
        until=asked.moment("ending_at"),
    )
    return page(found, views.audit_entry)


_ALL = "/v1/organizations"
_ONE = _ALL + "/{organization_id}"
_PAGE = ("limit", "after_id", "before_id", "page")

ROUTES = (
    AdminRoute("GET", _ALL + "/me", "read:organization", get_me),
    AdminRoute(
        "GET",
        _ALL + "/audit_log",
        "read:audit",
        list_audit,
        query=(*_PAGE, "action", "target_id", "actor_id", "starting_at", "ending_at"),
    ),
    AdminRoute("GET", _ALL, OPERATOR, list_organizations, query=(*_PAGE, "include_deleted")),
    AdminRoute("POST", _ALL, OPERATOR, create_organization, NewOrganization),
)
BY_ID = (
    AdminRoute("GET", _ONE, "read:organization", get_organization),
    AdminRoute("POST", _ONE, "write:organization", update_organization, ChangedOrganization),
    AdminRoute("DELETE", _ONE, "delete:organization", delete_organization),
    AdminRoute("POST", _ONE + "/restore", OPERATOR, restore_organization),
    AdminRoute("POST", _ONE + "/purge", OPERATOR, purge_organization),
)
"""After all others: their path takes any name."""
