"""`/v1/memory_stores`, their memories and their history."""

from __future__ import annotations

from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api.managed.resource_common import Call, answer, delete, get, page_answer, post
from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions.resources import memory, memorystores, memoryversions
from claude_wrapper.sessions.resources.memory import Directory, Memory
from claude_wrapper.sessions.resources.memorystores import MemoryStore
from claude_wrapper.sessions.resources.memoryversions import OPERATIONS, MemoryFilter, MemoryVersion
from claude_wrapper.storage.pagination import Page, PageRequest

MAX_FULL: Final = 20


def _store(call: Call) -> str:
    return call.id("store_id", "memory store")


def _place(call: Call) -> tuple[str, str]:
    return _store(call), call.id("memory_id", "memory")


def _full(call: Call, *, default: bool) -> bool:
    view = call.query.one_of("view", "basic", "full")
    return default if view is None else view == "full"


def _page(call: Call) -> PageRequest:
    """With contents, a page has at most 20 members, whatever was asked for."""
    request = call.query.page()
    if _full(call, default=False) and request.limit > MAX_FULL:
        return PageRequest(limit=MAX_FULL, cursor=request.cursor)
    return request


async def create_store(call: Call) -> Response:
    """A new memory store."""
    fields = await call.fields()

    async def work(tx: AsyncConnection) -> MemoryStore:
        return await memorystores.create_memory_store(tx, call.principal, call.scribe, fields)

    return answer((await call.write(work)).to_wire())


async def get_store(call: Call) -> Response:
    """One memory store."""

    async def work(tx: AsyncConnection) -> MemoryStore:
        return await memorystores.get_memory_store(tx, call.principal, _store(call))

    return answer((await call.read(work)).to_wire())


async def list_stores(call: Call) -> Response:
    """A page of memory stores."""
    query = call.query

    async def work(tx: AsyncConnection) -> Page[MemoryStore]:
        return await memorystores.list_memory_stores(
            tx,
            call.principal,
            query.page(),
            include_archived=query.boolean("include_archived"),
            since=query.bound("created_at", "gte"),
            until=query.bound("created_at", "lte"),
        )

    return page_answer(await call.read(work))


async def update_store(call: Call) -> Response:
    """Change a memory store."""
    fields = await call.fields()

    async def work(tx: AsyncConnection) -> MemoryStore:
        return await memorystores.update_memory_store(tx, call.principal, call.scribe, _store(call), fields)

    return answer((await call.write(work)).to_wire())


async def archive_store(call: Call) -> Response:
    """Archive a memory store."""

    async def work(tx: AsyncConnection) -> MemoryStore:
        return await memorystores.archive_memory_store(tx, call.principal, call.scribe, _store(call))

    return answer((await call.write(work)).to_wire())


async def delete_store(call: Call) -> Response:
    """Delete a memory store with everything in it."""
    store_id = _store(call)

    async def work(tx: AsyncConnection) -> None:
        await memorystores.delete_memory_store(tx, call.principal, call.scribe, store_id)

    await call.write(work)
    return answer({"id": store_id, "type": "memory_store_deleted"})


async def create_memory(call: Call) -> Response:
    """A new memory."""
    fields = await call.fields()

    async def work(tx: AsyncConnection) -> Memory:
        return await memory.create_memory(tx, call.principal, call.scribe, _store(call), fields)

    return answer((await call.write(work)).to_wire(full=_full(call, default=False)))


async def get_memory(call: Call) -> Response:
    """One memory."""

    async def work(tx: AsyncConnection) -> Memory:
        return await memory.get_memory(tx, call.principal, *_place(call))

    return answer((await call.read(work)).to_wire(full=_full(call, default=True)))


async def list_memories(call: Call) -> Response:
    """A page of memories, by path."""
    query = call.query
    prefix = query.text("path_prefix") or "/"
    depth = query.integer("depth", least=0, most=1) or 0

    async def work(tx: AsyncConnection) -> Page[Memory | Directory]:
        return await memory.list_memories(
            tx, call.principal, _page(call), _store(call), path_prefix=prefix, depth=depth
        )

    return page_answer(await call.read(work), full=_full(call, default=False))


async def update_memory(call: Call) -> Response:
    """Change or move a memory."""
    fields = await call.fields()

    async def work(tx: AsyncConnection) -> Memory:
        return await memory.update_memory(tx, call.principal, call.scribe, _place(call), fields)

    return answer((await call.write(work)).to_wire(full=_full(call, default=False)))


async def delete_memory(call: Call) -> Response:
    """Delete a memory."""
    place = _place(call)
    expected = call.query.text("expected_content_sha256")

    async def work(tx: AsyncConnection) -> None:
        await memory.delete_memory(tx, call.principal, call.scribe, place, expected_sha256=expected)

    await call.write(work)
    return answer({"id": place[1], "type": "memory_deleted"})


async def get_version(call: Call) -> Response:
    """One change of a memory."""

    async def work(tx: AsyncConnection) -> MemoryVersion:
        version_id = call.id("version_id", "memory version")
        return await memoryversions.get_memory_version(tx, call.principal, _store(call), version_id)

    return answer((await call.read(work)).to_wire(full=_full(call, default=True)))


async def list_versions(call: Call) -> Response:
    """A page of a store's history."""
    query = call.query
    actors = [value for name in ("session_id", "api_key_id", "service_account_id") if (value := query.text(name))]
    if len(actors) > 1:
        raise InvalidRequest("give only one of session_id, api_key_id and service_account_id", field="session_id")
    wanted = MemoryFilter(
        memory_id=query.text("memory_id"),
        operation=query.one_of("operation", *OPERATIONS),
        actor_id=actors[0] if actors else None,
        since=query.bound("created_at", "gte"),
        until=query.bound("created_at", "lte"),
    )

    async def work(tx: AsyncConnection) -> Page[MemoryVersion]:
        return await memoryversions.list_memory_versions(tx, call.principal, _page(call), _store(call), wanted)

    return page_answer(await call.read(work), full=_full(call, default=False))


async def redact_version(call: Call) -> Response:
    """Remove what a past version held."""

    async def work(tx: AsyncConnection) -> MemoryVersion:
        version_id = call.id("version_id", "memory version")
        return await memoryversions.redact_memory_version(tx, call.principal, call.scribe, _store(call), version_id)

    return answer((await call.write(work)).to_wire(full=True))


_ONE: Final = "/v1/memory_stores/{store_id}"
_MEMORY: Final = _ONE + "/memories/{memory_id}"
_VERSION: Final = _ONE + "/memory_versions/{version_id}"

ROUTES: Final[tuple[Route, ...]] = (
    post("/v1/memory_stores", create_store),
    get("/v1/memory_stores", list_stores),
    get(_ONE, get_store),
    post(_ONE, update_store),
    delete(_ONE, delete_store),
    post(_ONE + "/archive", archive_store),
    post(_ONE + "/memories", create_memory),
    get(_ONE + "/memories", list_memories),
    get(_MEMORY, get_memory),
    post(_MEMORY, update_memory),
    delete(_MEMORY, delete_memory),
    get(_ONE + "/memory_versions", list_versions),
    get(_VERSION, get_version),
    post(_VERSION + "/redact", redact_version),
)
