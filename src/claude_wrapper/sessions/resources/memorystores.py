"""Memory stores themselves: their name and description, which the agent reads, and their end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict
from claude_wrapper.sessions.resources.values import (
    Fields,
    merged_metadata,
    metadata_of,
    missing,
    name_of,
    wire_time,
)
from claude_wrapper.storage.dialects import for_update
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.resources import memory_stores as table
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal, owned

READ: Final = "read:agents"
WRITE: Final = "write:agents"
STORE: Final = "memstore"
MAX_DESCRIPTION: Final = 1_024


@dataclass(frozen=True, slots=True)
class MemoryStore:
    """One store."""

    id: str
    name: str
    description: str
    metadata: Mapping[str, str]
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None
    workspace_id: str | None

    @property
    def slug(self) -> str:
        """The store's directory below `/mnt/memory/`."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "store"

    def to_wire(self) -> dict[str, Any]:
        """The API's object."""
        return {
            "id": self.id,
            "type": "memory_store",
            "name": self.name,
            "description": self.description,
            "metadata": dict(self.metadata),
            "created_at": wire_time(self.created_at),
            "updated_at": wire_time(self.updated_at),
            "archived_at": wire_time(self.archived_at),
        }


async def create_memory_store(tx: AsyncConnection, principal: Principal, scribe: Scribe, fields: Fields) -> MemoryStore:
    """A new, empty store. Needs `write:agents`; raises InvalidRequest naming the field."""
    principal.require(WRITE)
    fields.only("name", "description", "metadata")
    store_id, now = scribe.ids.new(STORE), scribe.now()
    name = name_of(fields.text("name", most=255), fields.at("name"))
    await tx.execute(
        sa.insert(table).values(
            id=store_id,
            org_id=principal.org,
            workspace_id=principal.workspace,
            name=name,
            description=fields.maybe_text("description", most=MAX_DESCRIPTION) or "",
            metadata=metadata_of(fields),
            created_at=now,
            updated_at=now,
        )
    )
    await scribe.record(tx, principal, "memory_store.create", ("memory_store", store_id), after={"name": name})
    return await get_memory_store(tx, principal, store_id)


async def get_memory_store(tx: AsyncConnection, principal: Principal, store_id: str) -> MemoryStore:
    """One store. Needs `read:agents`; raises NotFound."""
    principal.require(READ)
    row = (await tx.execute(sa.select(table).where(owned(principal, table), table.c.id == store_id))).first()
    if row is None:
        raise missing("memory store", store_id)
    return _store(row)


async def list_memory_stores(
    tx: AsyncConnection,
    principal: Principal,
    request: PageRequest,
    *,
    include_archived: bool = False,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Page[MemoryStore]:
    """Stores, newest first; `since` and `until` are inclusive. Needs `read:agents`."""
    principal.require(READ)
    statement = sa.select(table).where(owned(principal, table))
    if not include_archived:
        statement = statement.where(table.c.archived_at.is_(None))
    if since is not None:
        statement = statement.where(table.c.created_at >= since)
    if until is not None:
        statement = statement.where(table.c.created_at <= until)
    return await fetch_page(tx, statement, (table.c.created_at, table.c.id), request, _store)


async def update_memory_store(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, store_id: str, fields: Fields
) -> MemoryStore:
    """Change name, description or metadata. Needs `write:agents`; raises Conflict if the store is archived."""
    principal.require(WRITE)
    fields.only("name", "description", "metadata")
    present = await locked_store(tx, principal, store_id)
    values: dict[str, Any] = {}
    if fields.given("name"):
        values["name"] = name_of(fields.data["name"], fields.at("name"))
    if fields.has("description"):
        values["description"] = fields.maybe_text("description", most=MAX_DESCRIPTION) or ""
    if (patch := fields.maybe_object("metadata")) is not None:
        values["metadata"] = merged_metadata(present.metadata, patch)
    if values:
        change = table.update().where(owned(principal, table), table.c.id == store_id)
        await tx.execute(change.values(**values, updated_at=scribe.now()))
        after = {"fields": sorted(values)}
        await scribe.record(tx, principal, "memory_store.update", ("memory_store", store_id), after=after)
    return await get_memory_store(tx, principal, store_id)


async def archive_memory_store(tx: AsyncConnection, principal: Principal, scribe: Scribe, store_id: str) -> MemoryStore:
    """Archive a store: it can be read and no longer changed. Doing it twice is no error. Needs `write:agents`."""
    principal.require(WRITE)
    present = await get_memory_store(tx, principal, store_id)
    if present.archived_at is None:
        now = scribe.now()
        change = table.update().where(owned(principal, table), table.c.id == store_id)
        await tx.execute(change.values(archived_at=now, updated_at=now))
        after = {"archived_at": now}
        await scribe.record(tx, principal, "memory_store.archive", ("memory_store", store_id), after=after)
    return await get_memory_store(tx, principal, store_id)


async def delete_memory_store(tx: AsyncConnection, principal: Principal, scribe: Scribe, store_id: str) -> None:
    """Delete a store with all memories and their history. Needs `write:agents`; raises NotFound."""
    principal.require(WRITE)
    done = await tx.execute(table.delete().where(owned(principal, table), table.c.id == store_id))
    if not done.rowcount:
        raise missing("memory store", store_id)
    await scribe.record(tx, principal, "memory_store.delete", ("memory_store", store_id))


async def locked_store(tx: AsyncConnection, principal: Principal, store_id: str) -> MemoryStore:
    """A store that is about to be changed, locked. Raises NotFound, and Conflict if it is archived."""
    statement = sa.select(table.c.id).where(owned(principal, table), table.c.id == store_id)
    await tx.execute(for_update(tx.dialect.name, statement))
    store = await get_memory_store(tx, principal, store_id)
    if store.archived_at is not None:
        raise Conflict(f"memory store {store_id!r} is archived and cannot be changed")
    return store


def _store(row: Any) -> MemoryStore:
    return MemoryStore(
        id=row.id,
        name=row.name,
        description=row.description,
        metadata=row.metadata,
        created_at=row.created_at,
        updated_at=row.updated_at,
        archived_at=row.archived_at,
        workspace_id=row.workspace_id,
    )
