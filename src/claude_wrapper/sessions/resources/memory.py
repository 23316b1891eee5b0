"""Memory stores: text documents at paths, with a history of every change.

Paths are files of a directory tree, as sessions mount them: no memory lies below another one.
"""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import InvalidRequest, MemoryPathConflict, MemoryPreconditionFailed
from claude_wrapper.sessions.resources.memorystores import WRITE, get_memory_store, locked_store
from claude_wrapper.sessions.resources.memoryversions import Actor, Change, add_version
from claude_wrapper.sessions.resources.values import Fields, missing, text_of, wire_time
from claude_wrapper.storage.failures import conflict_when_duplicate
from claude_wrapper.storage.pagination import Page, PageRequest
from claude_wrapper.storage.tables.resources import memories
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal, owned

MEMORY: Final = "mem"
MAX_CONTENT: Final = 102_400
MAX_PATH: Final = 1_024
MAX_SEGMENTS: Final = 20
MAX_MEMORIES: Final = 10_000
_HASH: Final = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Memory:
    """One document."""

    id: str
    store_id: str
    path: str
    content: str
    content_size_bytes: int
    content_sha256: str
    memory_version_id: str
    created_at: datetime
    updated_at: datetime

    def to_wire(self, *, full: bool) -> dict[str, Any]:
        """The API's object; `content` only in the full view."""
        return {
            "id": self.id,
            "type": "memory",
            "memory_store_id": self.store_id,
            "path": self.path,
            "content": self.content if full else None,
            "content_size_bytes": self.content_size_bytes,
            "content_sha256": self.content_sha256,
            "memory_version_id": self.memory_version_id,
            "created_at": wire_time(self.created_at),
            "updated_at": wire_time(self.updated_at),
        }


@dataclass(frozen=True, slots=True)
class Directory:
    """In a listing by directory: one or more memories below `path`, which ends with a slash."""

    path: str

    def to_wire(self, *, full: bool) -> dict[str, Any]:
        """The API's object."""
        del full
        return {"type": "memory_prefix", "path": self.path}


async def create_memory(
    tx: AsyncConnection,
    principal: Principal,
    scribe: Scribe,
    store_id: str,
    fields: Fields,
    *,
    actor: Actor | None = None,
) -> Memory:
    """A new memory. Needs `write:agents`; raises NotFound, Conflict (archived store), MemoryPathConflict."""
    principal.require(WRITE)
    fields.only("path", "content")
    path = clean_path(fields.data.get("path"), fields.at("path"))
    content = _content(fields.data.get("content", None), fields.at("content"))
    await locked_store(tx, principal, store_id)
    await _require_free(tx, principal, store_id, path)
    counted = sa.select(sa.func.count(memories.c.id)).where(owned(principal, memories), memories.c.store_id == store_id)
    total = await tx.execute(counted)
    if (total.scalar() or 0) >= MAX_MEMORIES:
        raise InvalidRequest(f"a memory store has at most {MAX_MEMORIES} memories")
    memory_id, now = scribe.ids.new(MEMORY), scribe.now()
    measured = _measured(content)
    version_id = await add_version(
        tx,
        principal,
        scribe,
        (store_id, memory_id, "created"),
        Change({"path": path, "content": content, **measured}, actor),
    )
    with conflict_when_duplicate(f"there is a memory at {path!r} already"):
        await tx.execute(
            sa.insert(memories).values(
                id=memory_id,
                org_id=principal.org,
                store_id=store_id,
                path=path,
                content=content,
                memory_version_id=version_id,
                created_at=now,
                updated_at=now,
                **measured,
            )
        )
    return await get_memory(tx, principal, store_id, memory_id)


async def get_memory(tx: AsyncConnection, principal: Principal, store_id: str, memory_id: str) -> Memory:
    """One memory. Needs `read:agents`; raises NotFound."""
    await get_memory_store(tx, principal, store_id)
    statement = sa.select(memories).where(
        owned(principal, memories), memories.c.store_id == store_id, memories.c.id == memory_id
    )
    row = (await tx.execute(statement)).first()
    if row is None:
        raise missing("memory", memory_id)
    return _memory(row)


async def list_memories(
    tx: AsyncConnection,
    principal: Principal,
    request: PageRequest,
    store_id: str,
    *,
    path_prefix: str = "/",
    depth: int = 0,
) -> Page[Memory | Directory]:
    """Memories by path. With `depth` 1 those deeper than the prefix's own level are rolled up into directories."""
    store = await get_memory_store(tx, principal, store_id)
    if not path_prefix.startswith("/") or not path_prefix.endswith("/"):
        raise InvalidRequest("must begin and end with /", field="path_prefix")
    # Not LIKE: SQLite's does not tell cases apart.
    below = sa.func.substr(memories.c.path, 1, len(path_prefix)) == path_prefix
    statement = sa.select(memories.c.path).where(owned(principal, memories), memories.c.store_id == store.id, below)
    paths = sorted((await tx.execute(statement)).scalars())
    names = paths if not depth else list(dict.fromkeys(_rolled_up(path, path_prefix) for path in paths))
    after = _name_after(request.cursor) if request.cursor is not None else ""
    left = sorted(name for name in names if name > after)
    page = left[: request.limit]
    found = await _at_paths(tx, principal, store.id, page)
    data = tuple(found.get(name) or Directory(name) for name in page)
    more = len(left) > len(page)
    return Page(data, has_more=more, next_page=_cursor_after(page[-1]) if more else None)


async def update_memory(
    tx: AsyncConnection,
    principal: Principal,
    scribe: Scribe,
    place: tuple[str, str],
    fields: Fields,
    *,
    actor: Actor | None = None,
) -> Memory:
    """Change content or path; `place` is (store id, memory id). Needs `write:agents`.

    Raises NotFound, Conflict (archived store), MemoryPreconditionFailed, MemoryPathConflict.
    """
    principal.require(WRITE)
    fields.only("content", "path", "precondition")
    store_id, memory_id = place
    await locked_store(tx, principal, store_id)
    present = await get_memory(tx, principal, store_id, memory_id)
    if (precondition := fields.maybe_object("precondition")) is not None:
        precondition.only("type", "content_sha256").one_of("type", "content_sha256")
        given = precondition.data.get("content_sha256")
        require_hash(present, given, precondition.at("content_sha256"))
    path = clean_path(fields.data["path"], fields.at("path")) if fields.given("path") else present.path
    content = _content(fields.data["content"], fields.at("content")) if fields.given("content") else present.content
    if (path, content) == (present.path, present.content):
        return present
    if path != present.path:
        await _require_free(tx, principal, store_id, path, besides=memory_id)
    values = {"path": path, "content": content, **_measured(content)}
    version_id = await add_version(tx, principal, scribe, (store_id, memory_id, "modified"), Change(values, actor))
    change = memories.update().where(owned(principal, memories), memories.c.id == memory_id)
    with conflict_when_duplicate(f"there is a memory at {path!r} already"):
        await tx.execute(change.values(**values, memory_version_id=version_id, updated_at=scribe.now()))
    return await get_memory(tx, principal, store_id, memory_id)


async def delete_memory(
    tx: AsyncConnection,
    principal: Principal,
    scribe: Scribe,
    place: tuple[str, str],
    *,
    expected_sha256: str | None = None,
    actor: Actor | None = None,
) -> None:
    """Delete a memory; its history stays. Needs `write:agents`. Raises as `update_memory` does."""
    principal.require(WRITE)
    store_id, memory_id = place
    await locked_store(tx, principal, store_id)
    present = await get_memory(tx, principal, store_id, memory_id)
    if expected_sha256 is not None:
        require_hash(present, expected_sha256, "expected_content_sha256")
    await add_version(tx, principal, scribe, (store_id, memory_id, "deleted"), Change({"path": present.path}, actor))
    await tx.execute(memories.delete().where(owned(principal, memories), memories.c.id == memory_id))


def clean_path(value: Any, field: str) -> str:
    """`/` and 1 to 20 segments, in Unicode's form C, at most 1,024 bytes. Pure; raises InvalidRequest."""
    path = text_of(value, field, most=MAX_PATH)
    segments = path.split("/")
    if segments[0] != "" or not 1 <= len(segments) - 1 <= MAX_SEGMENTS:
        raise InvalidRequest(f"must begin with / and have 1 to {MAX_SEGMENTS} segments", field=field)
    if any(segment in {"", ".", ".."} for segment in segments[1:]):
        raise InvalidRequest("must not have empty segments, . or ..", field=field)
    if any(unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for character in path):
        raise InvalidRequest("must not have control or format characters", field=field)
    if not unicodedata.is_normalized("NFC", path):
        raise InvalidRequest("must be in Unicode Normalization Form C", field=field)
    if len(path.encode()) > MAX_PATH:
        raise InvalidRequest(f"has at most {MAX_PATH} bytes", field=field)
    return path


def require_hash(memory: Memory, expected: Any, field: str) -> None:
    """Raise MemoryPreconditionFailed unless the memory has this content; InvalidRequest for what is no SHA-256."""
    if not isinstance(expected, str) or not _HASH.match(expected):
        raise InvalidRequest("must be 64 lower-case hexadecimal digits", field=field)
    if expected != memory.content_sha256:
        raise MemoryPreconditionFailed(
            f"memory {memory.id!r} has other content than expected; read it again",
            details={"content_sha256": memory.content_sha256},
        )


# inside ----------------------------------------------------------------------------------------------------------------


def _cursor_after(name: str) -> str:
    # By path, not by time and id: directories have neither.
    return "page_" + base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def _name_after(cursor: str) -> str:
    try:
        packed = cursor.removeprefix("page_")
        return base64.b64decode(packed + "=" * (-len(packed) % 4), altchars=b"-_", validate=True).decode()
    except ValueError:
        raise InvalidRequest("this is not a cursor of ours; start again without it", field="page") from None


def _content(value: Any, field: str) -> str:
    if value is None:
        raise InvalidRequest("is required; the empty string makes an empty memory", field=field)
    content = text_of(value, field, most=MAX_CONTENT, least=0)
    if len(content.encode()) > MAX_CONTENT:
        raise InvalidRequest(f"has at most {MAX_CONTENT} bytes", field=field)
    return content


def _measured(content: str) -> dict[str, Any]:
    data = content.encode()
    return {"content_size_bytes": len(data), "content_sha256": hashlib.sha256(data).hexdigest()}


def _rolled_up(path: str, prefix: str) -> str:
    head, slash, _ = path[len(prefix) :].partition("/")
    return prefix + head + slash


async def _at_paths(tx: AsyncConnection, principal: Principal, store_id: str, paths: list[str]) -> dict[str, Memory]:
    statement = sa.select(memories).where(
        owned(principal, memories), memories.c.store_id == store_id, memories.c.path.in_(paths)
    )
    return {row.path: _memory(row) for row in await tx.execute(statement)}


async def _require_free(
    tx: AsyncConnection, principal: Principal, store_id: str, path: str, *, besides: str = ""
) -> None:
    """Nothing stands at the path, above it or below it. The store is locked, so this stays true."""
    parts = path.split("/")
    above = ["/".join(parts[:length]) for length in range(2, len(parts) + 1)]
    below = sa.func.substr(memories.c.path, 1, len(path) + 1) == f"{path}/"
    statement = sa.select(memories.c.id, memories.c.path).where(
        owned(principal, memories),
        memories.c.store_id == store_id,
        sa.or_(memories.c.path.in_(above), below),
        memories.c.id != besides,
    )
    other = (await tx.execute(statement.limit(1))).first()
    if other is not None:
        raise MemoryPathConflict(
            f"there is a memory at {other.path!r} already",
            details={"conflicting_path": other.path, "conflicting_memory_id": other.id},
        )


def _memory(row: Any) -> Memory:
    return Memory(
        id=row.id,
        store_id=row.store_id,
        path=row.path,
        content=row.content,
        content_size_bytes=row.content_size_bytes,
        content_sha256=row.content_sha256,
        memory_version_id=row.memory_version_id,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
