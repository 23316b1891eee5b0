"""What a session is given beside its agent: files, repositories and memory stores. Here they are read and kept; how they
get into the workspace is `sessions.content`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.ids import Ids
from claude_wrapper.sessions.content import places
from claude_wrapper.sessions.eventlog import rfc3339
from claude_wrapper.sessions.resources.files import get_file
from claude_wrapper.sessions.resources.memorystores import WRITE as MEMORY_WRITE
from claude_wrapper.sessions.resources.memorystores import get_memory_store
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
    kind = fields.one_of("type", *((only,) if only else ("file", "memory_store")))
    return _READERS[kind](fields)


def _file(fields: Fields) -> Mount:
    fields.only("type", "file_id", "mount_path")
    file_id = id_of(fields.data.get("file_id"), fields.at("file_id"), "file")
    path = fields.maybe_text("mount_path", most=1024, least=1) or f"{places.UPLOADS}/{file_id}"
    places.check_mount_path(path, fields.at("mount_path"))
    return Mount("file", {"type": "file", "file_id": file_id, "mount_path": path}, fields.path)


def _memory_store(fields: Fields) -> Mount:
    fields.only("type", "memory_store_id", "access", "instructions")
    store_id = id_of(fields.data.get("memory_store_id"), fields.at("memory_store_id"), "memstore")
    access = fields.one_of("access", *_ACCESS) if fields.given("access") else _ACCESS[0]
    instructions = fields.maybe_text("instructions", most=4096)
    body = {"type": "memory_store", "memory_store_id": store_id, "access": access, "instructions": instructions}
    return Mount("memory_store", body, fields.path)


_ACCESS: Final = ("read_write", "read_only")
_READERS: Final[Mapping[str, Callable[[Fields], Mount]]] = {"file": _file, "memory_store": _memory_store}


async def check(
    tx: AsyncConnection, principal: Principal, mounted: Sequence[Mount], clock: Clock, *, present: Sequence[str] = ()
) -> list[Mount]:
    """The resources, complete: memory stores with their names and places.

    `present` are mount paths that are taken. Raises NotFound for what the caller does not have, InvalidRequest for a
    place that is taken or a store that is mounted twice, PermissionDenied for memory that the caller may not write.
    """
    done: list[Mount] = []
    taken = set(present)
    for one in mounted:
        body = one.body
        if one.type == "file":
            await get_file(tx, principal, clock, body["file_id"])
        elif one.type == "memory_store":
            body = await _complete_store(tx, principal, one, done)
        path = str(body["mount_path"])
        if any(path == other or path.startswith(f"{other}/") or other.startswith(f"{path}/") for other in taken):
            raise InvalidRequest("is taken by another resource", field=f"{one.path}.mount_path".lstrip("."))
        taken.add(path)
        done.append(replace(one, body=body))
    return done


async def _complete_store(
    tx: AsyncConnection, principal: Principal, mount: Mount, others: Sequence[Mount]
) -> dict[str, Any]:
    store_id = mount.body["memory_store_id"]
    store = await get_memory_store(tx, principal, store_id)
    stores = [one.body for one in others if one.type == "memory_store"]
    if any(one["memory_store_id"] == store_id for one in stores):
        raise InvalidRequest("is mounted twice", field=f"{mount.path}.memory_store_id")
    if mount.body["access"] == "read_write":
        principal.require(MEMORY_WRITE)
        if store.archived_at is not None:
            raise InvalidRequest("is archived: mount it with access read_only", field=f"{mount.path}.memory_store_id")
    used = {one["mount_path"] for one in stores}
    names = (store.slug, *(f"{store.slug}-{number}" for number in range(2, MAX_RESOURCES + 2)))
    path = next(found for name in names if (found := f"{places.MEMORY}/{name[:200]}") not in used)
    return {**mount.body, "name": store.name, "description": store.description, "mount_path": path}


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
