"""The history of memory stores: every change of a memory, who made it, and what was removed for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict
from claude_wrapper.sessions.resources.memorystores import WRITE, get_memory_store
from claude_wrapper.sessions.resources.values import missing, wire_time
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.resources import memories, memory_versions
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import ActorKind, Principal, owned

VERSION: Final = "memver"
OPERATIONS: Final = ("created", "modified", "deleted")


@dataclass(frozen=True, slots=True)
class Actor:
    """Who changes a memory."""

    type: str
    """`session_actor`, `api_actor` or `user_actor`."""
    id: str

    def to_wire(self) -> dict[str, str]:
        """The API's object."""
        name = {"session_actor": "session_id", "api_actor": "api_key_id", "user_actor": "user_id"}[self.type]
        return {"type": self.type, name: self.id}


def actor_of(principal: Principal) -> Actor:
    """A caller of the API: a key, a person, or a session through its worker."""
    if principal.worker is not None and principal.worker.session is not None:
        return Actor("session_actor", principal.worker.session)
    if principal.actor_kind is ActorKind.USER or principal.key_id is None:
        return Actor("user_actor", principal.user_id or "")
    return Actor("api_actor", principal.key_id)


@dataclass(frozen=True, slots=True)
class MemoryVersion:
    """One change of a memory."""

    id: str
    store_id: str
    memory_id: str
    operation: str
    path: str | None
    content: str | None
    content_size_bytes: int | None
    content_sha256: str | None
    created_by: Mapping[str, str] | None
    created_at: datetime
    redacted_at: datetime | None
    redacted_by: Mapping[str, str] | None

    def to_wire(self, *, full: bool) -> dict[str, Any]:
        """The API's object; `content` only in the full view."""
        return {
            "id": self.id,
            "type": "memory_version",
            "memory_store_id": self.store_id,
            "memory_id": self.memory_id,
            "operation": self.operation,
            "path": self.path,
            "content": self.content if full else None,
            "content_size_bytes": self.content_size_bytes,
            "content_sha256": self.content_sha256,
            "created_by": self.created_by,
            "created_at": wire_time(self.created_at),
            "redacted_at": wire_time(self.redacted_at),
            "redacted_by": self.redacted_by,
        }


@dataclass(frozen=True, slots=True)
class MemoryFilter:
    """Which versions are wanted."""

    memory_id: str | None = None
    operation: str | None = None
    actor_id: str | None = None
    """A session, key or user."""
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What a version records."""

    values: Mapping[str, Any]
    """path, and unless it was deleted content, content_size_bytes, content_sha256."""
    actor: Actor | None = None
    """None: the principal itself."""


async def add_version(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, what: tuple[str, str, str], change: Change
) -> str:
    """Write one change of a memory; `what` is (store id, memory id, operation). The id of the version."""
    by = change.actor or actor_of(principal)
    version_id = scribe.ids.new(VERSION)
    await tx.execute(
        sa.insert(memory_versions).values(
            id=version_id,
            org_id=principal.org,
            store_id=what[0],
            memory_id=what[1],
            operation=what[2],
            created_by=by.to_wire(),
            actor_id=by.id,
            created_at=scribe.now(),
            **change.values,
        )
    )
    return version_id


async def get_memory_version(
    tx: AsyncConnection, principal: Principal, store_id: str, version_id: str
) -> MemoryVersion:
    """One version. Needs `read:agents`; raises NotFound."""
    await get_memory_store(tx, principal, store_id)
    statement = sa.select(memory_versions).where(
        owned(principal, memory_versions), memory_versions.c.store_id == store_id, memory_versions.c.id == version_id
    )
    row = (await tx.execute(statement)).first()
    if row is None:
        raise missing("memory version", version_id)
    return _version(row)


async def list_memory_versions(
    tx: AsyncConnection, principal: Principal, request: PageRequest, store_id: str, wanted: MemoryFilter
) -> Page[MemoryVersion]:
    """The history of a store, newest first. Needs `read:agents`; raises NotFound."""
    await get_memory_store(tx, principal, store_id)
    table = memory_versions
    statement = sa.select(table).where(owned(principal, table), table.c.store_id == store_id)
    for column, value in (
        ("memory_id", wanted.memory_id),
        ("operation", wanted.operation),
        ("actor_id", wanted.actor_id),
    ):
        if value is not None:
            statement = statement.where(table.c[column] == value)
    if wanted.since is not None:
        statement = statement.where(table.c.created_at >= wanted.since)
    if wanted.until is not None:
        statement = statement.where(table.c.created_at <= wanted.until)
    return await fetch_page(tx, statement, (table.c.created_at, table.c.id), request, _version)


async def redact_memory_version(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, store_id: str, version_id: str
) -> MemoryVersion:
    """Remove content and path of a past version for good. Needs `write:agents`.

    The version that a memory stands at cannot be redacted (Conflict): change or delete the memory first.
    """
    principal.require(WRITE)
    present = await get_memory_version(tx, principal, store_id, version_id)
    if present.redacted_at is not None:
        return present
    live = sa.select(memories.c.id).where(owned(principal, memories), memories.c.memory_version_id == version_id)
    if (await tx.execute(live)).first() is not None:
        raise Conflict(f"memory version {version_id!r} is the present one; change or delete the memory first")
    gone = dict.fromkeys(("path", "content", "content_size_bytes", "content_sha256"))
    change = memory_versions.update().where(owned(principal, memory_versions), memory_versions.c.id == version_id)
    by = actor_of(principal).to_wire()
    await tx.execute(change.values(**gone, redacted_at=scribe.now(), redacted_by=by))
    await scribe.record(tx, principal, "memory_version.redact", ("memory_version", version_id))
    return await get_memory_version(tx, principal, store_id, version_id)


# inside ----------------------------------------------------------------------------------------------------------------


def _version(row: Any) -> MemoryVersion:
    return MemoryVersion(
        id=row.id,
        store_id=row.store_id,
        memory_id=row.memory_id,
        operation=row.operation,
        path=row.path,
        content=row.content,
        content_size_bytes=row.content_size_bytes,
        content_sha256=row.content_sha256,
        created_by=row.created_by,
        created_at=row.created_at,
        redacted_at=row.redacted_at,
        redacted_by=row.redacted_by,
    )
