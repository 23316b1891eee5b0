"""What the command line looks up: organisations by name, people by address, keys."""

from __future__ import annotations

from claude_wrapper.app.offline import Offline
from claude_wrapper.errors import Conflict, NotFound
from claude_wrapper.storage.pagination import MAX_LIMIT, PageRequest
from claude_wrapper.tenancy.apikeys import list_api_keys
from claude_wrapper.tenancy.environmentkeys import EnvironmentKey, list_environment_keys
from claude_wrapper.tenancy.keyrecords import ApiKey
from claude_wrapper.tenancy.orgs import Organization, list_organizations
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.tenancy.users import list_users


async def organizations(offline: Offline) -> list[Organization]:
    """All organisations that are open, newest first."""
    found: list[Organization] = []
    cursor: str | None = None
    while True:
        request = PageRequest(limit=MAX_LIMIT, cursor=cursor)
        page = await offline.database.query(lambda tx, r=request: list_organizations(tx, offline.operator, r))  # type: ignore[misc]
        found += page.data
        cursor = page.next_page
        if cursor is None:
            return found


async def organization(offline: Offline, name: str) -> Organization:
    """The one with this id or this name. Raises NotFound, or Conflict when several have the name."""
    everyone = await organizations(offline)
    found = [one for one in everyone if one.id == name] or [one for one in everyone if one.name == name]
    if not found:
        raise NotFound(f"there is no organisation {name!r}; `claude-wrapper admin org list` shows them")
    if len(found) > 1:
        raise Conflict(f"{len(found)} organisations are named {name!r}: use the id ({', '.join(o.id for o in found)})")
    return found[0]


async def user_id(offline: Offline, principal: Principal, name: str | None) -> str | None:
    """The member with this id or address."""
    if name is None or "@" not in name:
        return name
    page = await offline.database.query(lambda tx: list_users(tx, principal, PageRequest(), email=name))
    if not page.data:
        raise NotFound(f"there is no user {name!r} in this organisation")
    return page.data[0].id


async def api_keys(offline: Offline, principal: Principal) -> list[ApiKey]:
    """The newest thousand keys of an organisation."""
    now = offline.scribe.now()
    page = await offline.database.query(lambda tx: list_api_keys(tx, principal, PageRequest(limit=MAX_LIMIT), now=now))
    return list(page.data)


async def environment_keys(
    offline: Offline, principal: Principal, environment_id: str | None
) -> list[tuple[EnvironmentKey, str]]:
    """The newest thousand keys of self-hosted environments, each with its status."""
    page = await offline.database.query(
        lambda tx: list_environment_keys(tx, principal, PageRequest(limit=MAX_LIMIT), environment_id=environment_id)
    )
    return [(one, one.status(offline.scribe.now())) for one in page.data]
