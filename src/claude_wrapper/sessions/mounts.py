"""What a session is given beside its agent: files, repositories and memory stores."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.ids import Ids
from claude_wrapper.sessions.eventlog import rfc3339
from claude_wrapper.sessions.resources.files import get_file
from claude_wrapper.sessions.resources.values import Fields, id_of
from claude_wrapper.storage.pagination import MAX_LIMIT, Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.sessions import session_resources
from claude_wrapper.tenancy.principal import Principal, owned

MAX_RESOURCES: Final = 100
_PREFIX: Final = "sesrsc"


@dataclass(frozen=True, slots=True)
class Mount:
    """One resource, checked."""

    type: str
    body: dict[str, Any]
    path: str
    """Where it was in the request."""


def read_resources(fields: Fields) -> list[Mount]:
    """`resources` of a create."""
    return [read_resource(one) for one in fields.objects("resources", most=MAX_RESOURCES)]


def read_resource(fields: Fields, *, only: str | None = None) -> Mount:
    """One resource. `only`: the one kind that can be added later."""
    kinds = (only,) if only else ("file",)
    if fields.data.get("type") in {"github_repository", "memory_store"} and only is None:
        raise InvalidRequest(
            "repositories and memory stores are not mounted into sessions by this server yet", field=fields.at("type")
        )
    fields.one_of("type", *kinds)
    fields.only("type", "file_id", "mount_path")
    file_id = id_of(fields.data.get("file_id"), fields.at("file_id"), "file")
    path = fields.maybe_text("mount_path", most=1024, least=1) or f"/mnt/session/uploads/{file_id}"
    if not path.startswith("/") or posixpath.normpath(path) != path.rstrip("/") or "\x00" in path:
        raise InvalidRequest("must be an absolute path without . and ..", field=fields.at("mount_path"))
    return Mount("file", {"type": "file", "file_id": file_id, "mount_path": path}, fields.path)


async def check(tx: AsyncConnection, principal: Principal, mounted: Sequence[Mount], clock: Clock) -> None:
    """Raises NotFound for a file that the caller does not have."""
    for one in mounted:
        await get_file(tx, principal, clock, one.body["file_id"])


async def add(
    tx: AsyncConnection, principal: Principal, session: str, mount: Mount, *, ids: Ids, now: datetime
) -> dict[str, Any]:
    """Keep a resource; its wire form."""
    resource = ids.new(_PREFIX)
    values = {"body": mount.body, "created_at": now, "updated_at": now}
    owner = {"id": resource, "session_id": session, "org_id": principal.org, "type": mount.type}
    await tx.execute(sa.insert(session_resources).values(**owner, **values))
    return await one(tx, principal, session, resource)


async def all_of(tx: AsyncConnection, principal: Principal, session: str) -> list[dict[str, Any]]:
    """All resources of a session, in the order in which they were given."""
    table = session_resources
    query = sa.select(table).where(owned(principal, table), table.c.session_id == session)
    rows = (await tx.execute(query.order_by(table.c.created_at, table.c.id))).all()
    return [_shown(row) for row in rows]


async def page_of(
    tx: AsyncConnection, principal: Principal, session: str, page: PageRequest, *, everything: bool
) -> Page[dict[str, Any]]:
    """A page of them; `everything`: as many as a page can hold."""
    table = session_resources
    query = sa.select(table).where(owned(principal, table), table.c.session_id == session)
    limit = MAX_LIMIT if everything else page.limit
    asked = PageRequest(limit, cursor=page.cursor, newest_first=False)
    return await fetch_page(tx, query, (table.c.created_at, table.c.id), asked, _shown)


async def one(tx: AsyncConnection, principal: Principal, session: str, resource: str) -> dict[str, Any]:
    """Raises NotFound."""
    table = session_resources
    query = sa.select(table).where(owned(principal, table), table.c.session_id == session, table.c.id == resource)
    row = (await tx.execute(query)).first()
    if row is None:
        raise NotFound(f"session {session} has no resource {resource[:128]!r}")
    return _shown(row)


async def remove(tx: AsyncConnection, principal: Principal, session: str, resource: str) -> None:
    """Raises NotFound."""
    await one(tx, principal, session, resource)
    table = session_resources
    await tx.execute(
        sa.delete(table).where(owned(principal, table), table.c.session_id == session, table.c.id == resource)
    )


def _shown(row: Any) -> dict[str, Any]:
    times = {"created_at": rfc3339(row.created_at), "updated_at": rfc3339(row.updated_at)}
    return {"id": row.id, **row.body, **times}
