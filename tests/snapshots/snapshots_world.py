"""A snapshot store with two organisations, a blob store that fails on demand, and trees to save and compare."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.ids import RandomIds
from claude_wrapper.sandbox.files import remove_tree
from claude_wrapper.sessions.snapshots import Restored, Snapshot, SnapshotSettings, SnapshotStore
from claude_wrapper.storage import Database
from claude_wrapper.storage.blobs import Blob, BlobStore
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.vault.keys import KeyMaterial, LocalMasterKey
from claude_wrapper.vault.orgkeys import OrgKeys
from tenants import HandClock

OURS, THEIRS, SESSION = "org_ours", "org_theirs", "sesn_one"
UUID = "11111111-2222-4333-8444-555555555555"


@dataclass
class FaultyBlobs:
    """Passes everything on, until it is told to fail, hang or lie."""

    inner: BlobStore
    calls: int = 0
    fail_at: int | None = None
    """The number of the call from which on everything fails."""
    hang: asyncio.Event | None = None
    puts: dict[str, int] = field(default_factory=dict)
    gets: list[str] = field(default_factory=list)

    async def _step(self) -> None:
        self.calls += 1
        if self.fail_at is not None and self.calls >= self.fail_at:
            raise StorageUnavailable("the blob store could not write: no space left")
        if self.hang is not None:
            await self.hang.wait()

    async def put(self, key: str, content: bytes | AsyncIterable[bytes]) -> None:
        await self._step()
        assert isinstance(content, bytes)
        self.puts[key] = len(content)
        await self.inner.put(key, content)

    async def create(self, key: str, content: bytes) -> bool:
        await self._step()
        return await self.inner.create(key, content)

    async def get(self, key: str, *, limit: int = 64 << 20) -> bytes | None:
        await self._step()
        self.gets.append(key)
        return await self.inner.get(key, limit=limit)

    async def stream(self, key: str, *, chunk: int = 1 << 20) -> AsyncIterator[bytes] | None:
        return await self.inner.stream(key, chunk=chunk)

    async def head(self, key: str) -> Blob | None:
        return await self.inner.head(key)

    async def list(self, prefix: str) -> AsyncIterator[Blob]:
        await self._step()
        async for blob in self.inner.list(prefix):
            yield blob

    async def delete(self, *keys: str) -> None:
        await self._step()
        await self.inner.delete(*keys)


@dataclass
class Bench:
    """What a test works with."""

    db: Database
    blobs: FaultyBlobs
    clock: HandClock
    keys: OrgKeys
    root: Path
    store: SnapshotStore

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def work(self) -> Path:
        return self.root / "work"

    def with_settings(self, **settings: Any) -> SnapshotStore:
        return SnapshotStore(
            self.db, self.blobs, self.keys, self.clock, RandomIds(), settings=SnapshotSettings(**settings)
        )

    async def save(self, org: str = OURS, session: str = SESSION, **kw: Any) -> Snapshot:
        return await self.store.save(org, session, self.home, self.work, cli_uuid=UUID, **kw)

    async def restore(self, name: str = "back", org: str = OURS, session: str = SESSION) -> Restored | None:
        return await self.store.restore(org, session, self.root / name)

    async def keys_below(self, prefix: str = "snapshots") -> set[str]:
        return {blob.key async for blob in self.blobs.inner.list(prefix)}

    async def damage(self, key: str, at: int = -1) -> None:
        content = bytearray(await self.blobs.inner.get(key) or b"")
        content[at] ^= 1
        await self.blobs.inner.put(key, bytes(content))

    def fresh_trees(self) -> None:
        for path in (self.home, self.work, self.root / "back"):
            if path.exists():
                remove_tree(path)
        self.home.mkdir()
        self.work.mkdir()


async def bench(db: Database, blobs: BlobStore, root: Path) -> Bench:
    async with db.transaction() as tx:
        for org in (OURS, THEIRS):
            row = {column.name: value for column in organizations.c if (value := _value(column, org)) is not None}
            await tx.execute(sa.insert(organizations).values(**row))
    # The store's clock is the real one: `modified` of a blob is compared with it.
    # A little ahead of it, so that what a test has just written does not count as written during the scan.
    clock = HandClock(wall=datetime.now(UTC) + timedelta(minutes=10))
    keys = OrgKeys(db, LocalMasterKey([KeyMaterial(b"m" * 32)]), clock)
    faulty = FaultyBlobs(blobs)
    one = Bench(db, faulty, clock, keys, root, SnapshotStore(db, faulty, keys, clock, RandomIds()))
    one.fresh_trees()
    return one


def _value(column: sa.Column[Any], org: str) -> Any:
    if column.name in {"id", "name", "slug"}:
        return org
    if column.nullable or column.server_default is not None:
        return None
    if isinstance(column.type, sa.String):
        return "x"
    return {} if isinstance(column.type, sa.JSON) else datetime.now(UTC) if column.name.endswith("_at") else 0


def write(root: Path, relpath: str | bytes, content: bytes, mode: int = 0o644) -> Path:
    path = root / os.fsdecode(relpath)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    os.utime(path, ns=(10**18, 10**18))
    return path


def tree(root: Path) -> dict[str, tuple[Any, ...]]:
    """Paths, kinds, modes, bytes and link targets."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        name, mode = str(path.relative_to(root)), stat.S_IMODE(status.st_mode)
        if stat.S_ISLNK(status.st_mode):
            found[name] = ("link", os.readlink(path))
        elif stat.S_ISDIR(status.st_mode):
            found[name] = ("directory", mode)
        else:
            found[name] = ("file", mode, path.read_bytes(), status.st_mtime_ns)
    return found


def copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
