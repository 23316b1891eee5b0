"""Files: what callers upload and sessions make. Bytes are sealed in the blob store, everything else is in the database.

The blob is written first and the row after it: a row always has its bytes. A server that dies between the two leaves a
blob that nobody can name.
"""

from __future__ import annotations

import hashlib
import mimetypes
import re
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import InvalidRequest, NotFound, RequestTooLarge
from claude_wrapper.sessions.resources.means import ResourceMeans
from claude_wrapper.sessions.resources.sealed import opened, sealed
from claude_wrapper.sessions.resources.values import missing, wire_time
from claude_wrapper.storage.blobs import BlobStore
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.resources import files as table
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal, owned

READ: Final = "read:files"
WRITE: Final = "write:files"
FILE: Final = "file"
MAX_BYTES: Final = 500 * 10**6
MIN_LIFE: Final = 3_600
MAX_LIFE: Final = 7_776_000
MAX_IDS: Final = 100
_FORBIDDEN: Final = re.compile(r'[<>:"|?*\\/\x00-\x1f\x7f]')
_MIME: Final = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,126}/[a-z0-9][a-z0-9!#$&^_.+-]{0,126}\Z")
_DEFAULT_MIME: Final = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class File:
    """What is known of a file."""

    id: str
    filename: str
    mime_type: str
    size_bytes: int
    sha256: str
    downloadable: bool
    scope_id: str | None
    """The session that made it; None for an upload."""
    created_at: datetime
    expires_at: datetime | None
    workspace_id: str | None
    org_id: str

    def to_wire(self) -> dict[str, Any]:
        """The API's object."""
        return {
            "id": self.id,
            "type": "file",
            "filename": self.filename,
            "mime_type": self.mime_type,
            "size_bytes": self.size_bytes,
            "downloadable": self.downloadable,
            "scope": {"type": "session", "id": self.scope_id} if self.scope_id else None,
            "created_at": wire_time(self.created_at),
            "expires_at": wire_time(self.expires_at),
        }


@dataclass(frozen=True, slots=True)
class Upload:
    """What is to be kept. `content` is read once."""

    filename: str
    content: AsyncIterable[bytes]
    mime_type: str | None = None
    scope_id: str | None = None
    downloadable: bool = True
    limit: int = MAX_BYTES


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes that are kept and have no row yet: pass it to `add_file`, or to `discard`."""

    id: str
    filename: str
    mime_type: str
    size_bytes: int
    sha256: str
    upload: Upload


async def store_bytes(means: ResourceMeans, principal: Principal, scribe: Scribe, upload: Upload) -> Stored:
    """Seal and keep the bytes of a new file. Needs `write:files`; raises RequestTooLarge, and then nothing is kept."""
    principal.require(WRITE)
    mime_type = clean_mime(upload.mime_type)
    filename = clean_filename(upload.filename, mime_type)
    file_id = scribe.ids.new(FILE)
    keys = await means.keys.of(principal.org)
    measured = _Measured(upload.content, upload.limit)
    await means.blobs.put(_key(principal.org, file_id), sealed(keys, table.name, file_id, measured.read()))
    return Stored(file_id, filename, mime_type, measured.size, measured.digest.hexdigest(), upload)


async def add_file(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, stored: Stored, *, expires_in_seconds: int | None = None
) -> File:
    """The row of a stored file. Needs `write:files`; raises InvalidRequest for a life that is too short or too long."""
    principal.require(WRITE)
    now = scribe.now()
    if expires_in_seconds is not None and not MIN_LIFE <= expires_in_seconds <= MAX_LIFE:
        raise InvalidRequest(f"must be from {MIN_LIFE} to {MAX_LIFE}", field="expires_in_seconds")
    await tx.execute(
        sa.insert(table).values(
            id=stored.id,
            org_id=principal.org,
            workspace_id=principal.workspace,
            filename=stored.filename,
            mime_type=stored.mime_type,
            size_bytes=stored.size_bytes,
            sha256=stored.sha256,
            downloadable=stored.upload.downloadable,
            scope_id=stored.upload.scope_id,
            created_at=now,
            expires_at=None if expires_in_seconds is None else now + timedelta(seconds=expires_in_seconds),
        )
    )
    await scribe.record(tx, principal, "file.create", (FILE, stored.id), after={"size_bytes": stored.size_bytes})
    return await get_file(tx, principal, scribe.clock, stored.id)


async def discard(means: ResourceMeans, principal: Principal, stored: Stored) -> None:
    """Forget bytes that got no row."""
    await means.blobs.delete(_key(principal.org, stored.id))


async def create_file(
    means: ResourceMeans, principal: Principal, scribe: Scribe, upload: Upload, *, expires_in_seconds: int | None = None
) -> File:
    """Keep a new file: what the server itself does with what a session made. Raises as the two steps do."""
    stored = await store_bytes(means, principal, scribe, upload)

    async def add(tx: AsyncConnection) -> File:
        return await add_file(tx, principal, scribe, stored, expires_in_seconds=expires_in_seconds)

    try:
        return await means.db.run(add)
    except BaseException:
        await discard(means, principal, stored)
        raise


async def get_file(tx: AsyncConnection, principal: Principal, clock: Clock, file_id: str) -> File:
    """What is known of a file. Needs `read:files`; raises NotFound (`file_expired` for one whose time is over)."""
    principal.require(READ)
    row = (await tx.execute(sa.select(table).where(owned(principal, table), table.c.id == file_id))).first()
    if row is None:
        raise missing("file", file_id)
    file = _file(row)
    if file.expires_at is not None and file.expires_at <= clock.now():
        raise NotFound(f"file {file_id!r} has expired", details={"error_code": "file_expired"})
    return file


async def list_files(
    tx: AsyncConnection,
    principal: Principal,
    clock: Clock,
    request: PageRequest,
    *,
    only: Sequence[str] | None = None,
    scope_id: str | None = None,
) -> Page[File]:
    """Files that have not expired, newest first; `only` (at most 100 ids) gives one page. Needs `read:files`."""
    principal.require(READ)
    alive = sa.or_(table.c.expires_at.is_(None), table.c.expires_at > clock.now())
    statement = sa.select(table).where(owned(principal, table), alive)
    if scope_id is not None:
        statement = statement.where(table.c.scope_id == scope_id)
    if only is not None:
        wanted = list(dict.fromkeys(only))
        if len(wanted) > MAX_IDS:
            raise InvalidRequest(f"at most {MAX_IDS}", field="ids")
        statement = statement.where(table.c.id.in_(wanted))
        request = PageRequest(limit=MAX_IDS)
    return await fetch_page(tx, statement, (table.c.created_at, table.c.id), request, _file)


async def open_file(means: ResourceMeans, file: File, *, download: bool = False) -> AsyncIterator[bytes]:
    """The bytes of a file that `get_file` returned, in pieces.

    `download` is for callers of the API: raises InvalidRequest (`file_not_downloadable`) where it is not allowed.
    Raises NotFound if the bytes are gone, and Unreadable while they are read if they were damaged.
    """
    if download and not file.downloadable:
        raise InvalidRequest(f"file {file.id!r} cannot be downloaded", details={"error_code": "file_not_downloadable"})
    frames = await means.blobs.stream(_key(file.org_id, file.id))
    if frames is None:
        raise missing("file", file.id)
    return opened(means.keys, file.org_id, table.name, file.id, frames)


async def delete_file(means: ResourceMeans, principal: Principal, scribe: Scribe, file_id: str) -> None:
    """Delete a file and its bytes; an expired one, too. Needs `write:files`; raises NotFound."""
    principal.require(WRITE)

    async def delete(tx: AsyncConnection) -> None:
        done = await tx.execute(table.delete().where(owned(principal, table), table.c.id == file_id))
        if not done.rowcount:
            raise missing("file", file_id)
        await scribe.record(tx, principal, "file.delete", (FILE, file_id))

    await means.db.run(delete)
    await means.blobs.delete(_key(principal.org, file_id))


# tenant-scope: upkeep goes over all organisations; a row names its own
async def purge_expired(db: Database, blobs: BlobStore, clock: Clock, *, most: int = 500) -> int:
    """Delete files whose time is over; how many. Call it now and then: an expired file is unreadable already."""

    async def due(tx: AsyncConnection) -> list[tuple[str, str]]:
        statement = sa.select(table.c.org_id, table.c.id).where(table.c.expires_at <= clock.now())
        return [(row.org_id, row.id) for row in await tx.execute(statement.order_by(table.c.expires_at).limit(most))]

    gone = await db.query(due)
    # Bytes first: a row whose bytes are gone is found again by the next call.
    await blobs.delete(*(_key(org, file_id) for org, file_id in gone))

    async def delete(tx: AsyncConnection) -> None:
        await tx.execute(table.delete().where(table.c.id.in_([file_id for _, file_id in gone])))

    if gone:
        await db.run(delete, idempotent=True)
    return len(gone)


def clean_filename(value: str, mime_type: str) -> str:
    """The last part of a path, without what file systems refuse; `unnamed` and an extension if nothing is left. Pure."""
    name = value.replace("\\", "/").rsplit("/", 1)[-1]
    name = _FORBIDDEN.sub("_", "".join(character for character in name if character.isprintable())).strip()
    if name in {"", ".", ".."}:
        known = mime_type != _DEFAULT_MIME
        return "unnamed" + ((mimetypes.guess_extension(mime_type) or "") if known else "")
    return name[:500]


def clean_mime(value: str | None) -> str:
    """A media type without parameters; `application/octet-stream` for what is none. Pure."""
    mime = (value or "").partition(";")[0].strip().lower()
    return mime if _MIME.match(mime) else _DEFAULT_MIME


class _Measured:
    """Bytes as they pass: their number, bounded, and their digest."""

    def __init__(self, source: AsyncIterable[bytes], limit: int) -> None:
        self._source = source
        self._limit = limit
        self.size = 0
        self.digest = hashlib.sha256()

    async def read(self) -> AsyncIterator[bytes]:
        async for part in self._source:
            self.size += len(part)
            if self.size > self._limit:
                raise RequestTooLarge(f"a file has at most {self._limit} bytes")
            self.digest.update(part)
            yield part


def _key(org: str, file_id: str) -> str:
    return f"files/{org}/{file_id}"


def _file(row: Any) -> File:
    return File(
        id=row.id,
        filename=row.filename,
        mime_type=row.mime_type,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        downloadable=row.downloadable,
        scope_id=row.scope_id,
        created_at=row.created_at,
        expires_at=row.expires_at,
        workspace_id=row.workspace_id,
        org_id=row.org_id,
    )
