"""What a session is given beside its agent: files, repositories and memory stores. Here they are read and kept; how they
get into the workspace is `sessions.content`'s."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlsplit

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.sessions.content import places
from claude_wrapper.sessions.content.acting import SCOPES
from claude_wrapper.sessions.content.repositories import TOKEN, check_name
from claude_wrapper.sessions.eventlog import rfc3339
from claude_wrapper.sessions.resources.files import get_file
from claude_wrapper.sessions.resources.memorystores import WRITE as MEMORY_WRITE
from claude_wrapper.sessions.resources.memorystores import get_memory_store
from claude_wrapper.sessions.resources.values import Fields, id_of, url_of
from claude_wrapper.storage.pagination import MAX_LIMIT, Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.sessions import session_resources
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal, owned
from claude_wrapper.vault.secretstore import SecretStore

MAX_RESOURCES: Final = 100
_PREFIX: Final = "sesrsc"


@dataclass(frozen=True, slots=True)
class Mount:
    """One resource, checked."""

    type: str
    body: dict[str, Any]
    path: str
    """Where it was in the request."""
    id: str = ""
    """The resource's id, once it has one."""
    token: str | None = field(default=None, repr=False)
    """Of a repository; kept apart, sealed."""


def read_resources(fields: Fields) -> list[Mount]:
    """`resources` of a create."""
    return [read_resource(one) for one in fields.objects("resources", most=MAX_RESOURCES)]


def read_resource(fields: Fields, *, only: str | None = None) -> Mount:
    """One resource. `only`: the one kind that can be added later."""
    kind = fields.one_of("type", *((only,) if only else ("file", "memory_store", "github_repository")))
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


def _repository(fields: Fields) -> Mount:
    fields.only("type", "url", "authorization_token", "mount_path", "checkout")
    url = url_of(fields.data.get("url"), fields.at("url"))
    name = re.sub(r"[^A-Za-z0-9._-]", "-", urlsplit(url).path.rstrip("/").rpartition("/")[2].removesuffix(".git"))
    path = (
        fields.maybe_text("mount_path", most=1024, least=1) or f"{places.WORKSPACE}/{name.strip('.') or 'repository'}"
    )
    places.check_mount_path(path, fields.at("mount_path"))
    token = fields.maybe_text("authorization_token", most=4096, least=1)
    body: dict[str, Any] = {"type": "github_repository", "url": url, "mount_path": path}
    if (checkout := fields.maybe_object("checkout")) is not None:
        body["checkout"] = _checkout(checkout)
    return Mount("github_repository", body, fields.path, token=None if token is None else read_token(token, fields))


def read_token(token: str, fields: Fields) -> str:
    """A token as it can be sent: visible characters alone. Raises InvalidRequest."""
    if not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidRequest("must be visible ASCII characters", field=fields.at("authorization_token"))
    return token


def _checkout(fields: Fields) -> dict[str, str]:
    kind = fields.one_of("type", "branch", "commit")
    if kind == "branch":
        name = fields.only("type", "name").text("name", most=255)
        return {"type": kind, "name": check_name(name, fields.at("name"))}
    sha = fields.only("type", "sha").text("sha", most=64)
    if not _SHA.match(sha):
        raise InvalidRequest("must be 7 to 64 lower-case hexadecimal digits", field=fields.at("sha"))
    return {"type": kind, "sha": sha}


async def keep_tokens(secrets: SecretStore, principal: Principal, mounted: Sequence[Mount]) -> None:
    """Seal the tokens of new resources, before they are rows. Whoever may make the session gave them."""
    for one in mounted:
        if one.token is not None:
            await secrets.put(replace(principal, scopes=SCOPES), TOKEN, one.id, {"token": one.token})


async def forget_tokens(secrets: SecretStore, principal: Principal, resources: Sequence[str]) -> None:
    """Delete the tokens of resources that are gone; one that had none is no error."""
    for resource in resources:
        await secrets.delete(replace(principal, scopes=SCOPES), TOKEN, resource)


_SHA: Final = re.compile(r"[0-9a-f]{7,64}\Z")
_ACCESS: Final = ("read_write", "read_only")
_READERS: Final[Mapping[str, Callable[[Fields], Mount]]] = {
    "file": _file,
    "memory_store": _memory_store,
    "github_repository": _repository,
}


async def check(
    tx: AsyncConnection,
    principal: Principal,
    mounted: Sequence[Mount],
    scribe: Scribe,
    *,
    present: Sequence[Mapping[str, Any]] = (),
) -> list[Mount]:
    """The resources, complete: with ids, memory stores with their names and places.

    `present` are those that the session has. Raises NotFound for what the caller does not have, InvalidRequest for a
    place that is taken or a store that is mounted twice, PermissionDenied for memory that the caller may not write.
    """
    done: list[Mount] = []
    taken = {str(one["mount_path"]): str(one["type"]) for one in present}
    for one in mounted:
        body = one.body
        if one.type == "file":
            await get_file(tx, principal, scribe.clock, body["file_id"])
        elif one.type == "memory_store":
            body = await _complete_store(tx, principal, one, done)
        path = str(body["mount_path"])
        if any(_in_the_way(path, one.type, other, kind) for other, kind in taken.items()):
            raise InvalidRequest("is taken by another resource", field=f"{one.path}.mount_path".lstrip("."))
        taken[path] = one.type
        done.append(replace(one, body=body, id=scribe.ids.new(_PREFIX)))
    return done


def _in_the_way(path: str, kind: str, other: str, other_kind: str) -> bool:
    """Whether two resources cannot lie there at once: one in the other is a file in a repository, or impossible."""
    if path.startswith(f"{other}/"):
        return (kind, other_kind) != ("file", "github_repository")
    if other.startswith(f"{path}/"):
        return (other_kind, kind) != ("file", "github_repository")
    return path == other


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
    tx: AsyncConnection, principal: Principal, session: str, mount: Mount, *, now: datetime
) -> dict[str, Any]:
    """Keep a resource that was checked; its wire form."""
    resource = mount.id
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


async def touch(tx: AsyncConnection, principal: Principal, session: str, resource: str, now: datetime) -> None:
    """Note that a resource was changed."""
    table = session_resources
    mine = (owned(principal, table), table.c.session_id == session, table.c.id == resource)
    await tx.execute(sa.update(table).where(*mine).values(updated_at=now))


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
