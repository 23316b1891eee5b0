"""Snapshots of a session's home and workspace in the blob store.

Blobs, below `snapshots/<org>/<session>/`: `packs/<id>` (sealed chunks) and `manifests/<id>`. Both are written once under
a fresh id and never changed, so whoever removes an old one cannot hit a new one of the same name. A snapshot refers to
packs of the snapshot before it and to packs that it wrote itself, to nothing else; therefore everything that neither the
current nor the previous manifest names, and that is older than any save may take, can be removed at any time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import structlog

from claude_wrapper.clock import Clock
from claude_wrapper.errors import Conflict, InvalidRequest, RequestTooLarge, SnapshotCorrupted, StorageUnavailable
from claude_wrapper.ids import Ids, well_formed
from claude_wrapper.sandbox.files import remove_tree
from claude_wrapper.sessions.snapshots import packing, restoring, rows
from claude_wrapper.sessions.snapshots.manifest import VERSION as FORMAT
from claude_wrapper.sessions.snapshots.manifest import (
    Chunk,
    Head,
    Manifest,
    Pack,
    Skipped,
    check,
    cut,
    decode,
    encode,
    join,
)
from claude_wrapper.sessions.snapshots.rows import Current
from claude_wrapper.sessions.snapshots.scan import Scan, look_again, scan
from claude_wrapper.sessions.snapshots.values import (
    Collected,
    Guard,
    OnProgress,
    Position,
    Progress,
    Restored,
    Snapshot,
    SnapshotSettings,
)
from claude_wrapper.sessions.snapshots.work import each, in_thread, within
from claude_wrapper.storage.blobs import Blob, BlobStore
from claude_wrapper.storage.engine import Database
from claude_wrapper.vault.envelope import OVERHEAD, DataKeys
from claude_wrapper.vault.orgkeys import OrgKeys

log = structlog.get_logger(__name__)

MANIFEST: Final = "snap"
PACK: Final = "pack"
_MAX_PACK: Final = 2 * packing.PORTION_BYTES + packing.PORTION_FILES * (OVERHEAD + 64)
_MORE_LOOKS: Final = 2
"""How often a file that changed while it was read is read again."""
_TORN: Final = "changed while it was read"
_MOVED_BYTES: Final = 64 << 20
"""Stored bytes that one save moves out of worn packs at most."""


@dataclass(slots=True)
class _Counter:
    total: int
    tell: OnProgress | None
    done: int = 0

    def add(self, count: int) -> None:
        self.done += count
        if self.tell is not None:
            self.tell(Progress(self.done, self.total))


@dataclass(frozen=True, slots=True)
class _Start:
    cli_uuid: str
    cli_version: str
    progress: OnProgress | None
    position: Position
    guard: Guard | None


@dataclass(slots=True)
class _Saving:
    """One save on its way."""

    org: str
    session: str
    keys: DataKeys
    roots: tuple[Path, Path]
    scan: Scan
    index: packing.Index
    count: _Counter
    read: list[packing.Portion] = field(default_factory=list)
    written: int = 0


class SnapshotStore:
    """Saves and restores. One instance per server."""

    def __init__(
        self,
        db: Database,
        blobs: BlobStore,
        org_keys: OrgKeys,
        clock: Clock,
        ids: Ids,
        *,
        settings: SnapshotSettings | None = None,
    ) -> None:
        self._db = db
        self._blobs = blobs
        self._org_keys = org_keys
        self._clock = clock
        self._ids = ids
        self._settings = settings or SnapshotSettings()
        self._orders: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    # Saving -----------------------------------------------------------------------------------------------------------

    async def save(
        self,
        org: str,
        session: str,
        home: Path,
        work: Path,
        *,
        cli_uuid: str,
        cli_version: str = "",
        position: Position | None = None,
        progress: OnProgress | None = None,
        guard: Guard | None = None,
    ) -> Snapshot:
        """Store what changed since the last snapshot and make this one current; nothing if nothing changed.

        Until its last step, one database write, the last snapshot stays current; `guard` runs in that transaction. A
        file that changes while it is read is read again; one that keeps changing is stored and named in `torn`. Raises RequestTooLarge (more than the
        bounds), NotFound (no such directory), Conflict (another save of this session was first), StorageUnavailable,
        VaultSealed.
        """
        _check_ids(org, session)
        async with self._order(org, session):
            try:
                async with asyncio.timeout(self._settings.save_seconds):
                    start = _Start(cli_uuid, cli_version, progress, position or Position(), guard)
                    try:
                        return await self._save(org, session, (home, work), start)
                    except SnapshotCorrupted as error:
                        log.warning("snapshot.saved_anew", session=session, reason=error.message)
                        return await self._save(org, session, (home, work), start, anew=True)
            except TimeoutError as error:
                raise StorageUnavailable(
                    f"the snapshot of session {session} was not done within {self._settings.save_seconds:g} s"
                ) from error

    async def _save(
        self, org: str, session: str, roots: tuple[Path, Path], start: _Start, *, anew: bool = False
    ) -> Snapshot:
        """`anew`: what is stored already cannot be read, so everything is stored again."""
        row = await rows.current(self._db, org, session)
        base = None if row is None or anew else await self._base(org, session, row)
        keys = await self._org_keys.of(org)
        now = self._clock.now()
        found = await in_thread(scan, *roots, self._settings.bounds)
        comparison = await in_thread(packing.compare, found, base)
        count = _Counter(found.total_bytes, start.progress)
        count.add(sum(entry.size for entry in comparison.unchanged.values()))
        saving = _Saving(org, session, keys, roots, found, packing.Index.of(base), count)

        async def store(portion: Sequence[packing.Piece]) -> None:
            await self._store(saving, portion)

        await each(packing.portions(found.found, comparison.changed), self._settings.parallel, store)
        torn = packing.unsteady(saving.read)
        for _ in range(_MORE_LOOKS if torn else 0):
            await in_thread(look_again, found, roots, torn)
            packing.drop(saving.read, set(torn))
            await each(packing.portions(found.found, torn), self._settings.parallel, store)
            torn = packing.unsteady(saving.read)
            if not torn:
                break
        addresses = await in_thread(packing.wanted, base, comparison, saving.read)
        await self._renew_worn(saving, addresses)
        entries, chunks, packs = await in_thread(
            packing.assemble, found, comparison, saving.read, addresses, saving.index
        )
        before = None if base is None else base.head
        pages, all_packs = await self._store_pages(saving, Manifest(entries, chunks, packs), before)
        if row is not None and before is not None and not comparison.changed and _same(before, row, pages, start):
            return replace(_snapshot(before, row, written=0, read=0), unchanged=True)
        head = Head(
            version=FORMAT,
            id=self._ids.new(MANIFEST),
            session=session,
            scanned_ns=int(now.timestamp() * 1e9),
            cli_uuid=start.cli_uuid,
            cli_version=start.cli_version,
            skipped=found.skipped,
            skipped_count=found.skipped_count,
            bytes_logical=sum(entry.size for entry in entries),
            entry_count=len(entries),
            pages=pages,
            packs=all_packs,
            messages=start.position.messages,
            exact=start.position.exact,
            torn=[Skipped(found.found[index].root, os.fsencode(found.found[index].path), _TORN) for index in torn],
        )
        sealed = await in_thread(encode, head, keys)
        await self._put(_manifest_key(org, session, head.id), sealed)
        new = _row(head, now, previous=before.id if before is not None else None)
        seen = row.manifest if row is not None else None
        await rows.replace(self._db, org, session, new, seen=seen, guard=start.guard)
        read = sum(portion.bytes_read for portion in saving.read)
        return _snapshot(head, new, written=saving.written + len(sealed), read=read)

    async def _store_pages(
        self, saving: _Saving, manifest: Manifest, before: Head | None
    ) -> tuple[list[Chunk], list[Pack]]:
        """Store the pages that are new; where all pages are, and all packs that the snapshot needs."""
        index = packing.Index.of_pages(before)
        encoded = await in_thread(cut, manifest, self._settings.bounds)
        ids, new = await in_thread(packing.seal_pages, encoded, index.chunks, saving.keys)
        if new.chunks:
            pack = self._ids.new(PACK)
            await self._put(_pack_key(saving.org, saving.session, pack), bytes(new.pack))
            index.add(pack, len(new.pack), new.chunks)
            saving.written += len(new.pack)
        places = {pack.id: number for number, pack in enumerate(manifest.packs)}
        pages: list[Chunk] = []
        for page in ids:
            pack, offset, stored, plain = index.chunks[page]
            pages.append(Chunk(page, places.setdefault(pack, len(places)), offset, stored, plain))
        sizes = {pack.id: pack.size for pack in manifest.packs} | index.packs
        return pages, [Pack(pack, sizes[pack]) for pack in places]

    async def _base(self, org: str, session: str, row: Current) -> Manifest | None:
        """The newest readable manifest: what is stored already."""
        for manifest_id in (row.manifest, row.previous):
            if manifest_id is None:
                continue
            try:
                return await self._read_pages(org, await self._head(org, session, manifest_id))
            except SnapshotCorrupted as error:
                log.warning("snapshot.corrupted", session=session, snapshot=manifest_id, reason=error.message)
        return None

    async def _store(self, saving: _Saving, portion: Sequence[packing.Piece]) -> None:
        result = await in_thread(
            packing.read_portion, portion, saving.scan, saving.roots, saving.index.chunks, saving.keys
        )
        await self._store_pack(saving, result)
        result.pack = bytearray()  # the rest is small; it is needed to the end
        saving.read.append(result)
        saving.count.add(sum(piece.length for piece in portion))

    async def _store_pack(self, saving: _Saving, portion: packing.Portion) -> None:
        if not portion.chunks:
            return
        pack = self._ids.new(PACK)
        await self._put(_pack_key(saving.org, saving.session, pack), bytes(portion.pack))
        saving.index.add(pack, len(portion.pack), portion.chunks)
        saving.written += len(portion.pack)

    async def _renew_worn(self, saving: _Saving, addresses: dict[int, list[bytes]]) -> None:
        """Move what is still needed out of packs that are mostly not."""
        needed = {chunk for ids in addresses.values() for chunk in ids}
        moved = packing.Portion()
        for pack in await in_thread(packing.worn, saving.index, addresses, _MOVED_BYTES):
            content = await self._get(_pack_key(saving.org, saving.session, pack), _MAX_PACK)
            if content is None or len(content) != saving.index.packs[pack]:
                raise SnapshotCorrupted(f"a part of the last snapshot of session {saving.session} is missing")
            await in_thread(packing.move_chunks, pack, content, saving.index, needed, moved)
            if len(moved.pack) >= packing.PORTION_BYTES:
                await self._store_pack(saving, moved)
                moved = packing.Portion()
        await self._store_pack(saving, moved)

    # Restoring --------------------------------------------------------------------------------------------------------

    async def restore(
        self,
        org: str,
        session: str,
        into: Path,
        *,
        progress: OnProgress | None = None,
        guard: Guard | None = None,
    ) -> Restored | None:
        """Write the current snapshot into a directory that does not exist yet; None when there is no snapshot.

        If it is damaged, the one before it is restored and made current (`guard` as in `save`), and the result says so. When it raises,
        `into` does not exist. Raises SnapshotCorrupted (the one before is damaged too, or there is none), Conflict (the
        directory exists), RequestTooLarge (more than the bounds), StorageUnavailable, VaultSealed.
        """
        _check_ids(org, session)
        if await in_thread(into.exists):
            raise Conflict(f"the directory {into.name} exists already: a snapshot is restored into a fresh one")
        async with self._order(org, session):
            row = await rows.current(self._db, org, session)
            if row is None:
                return None
            damage: SnapshotCorrupted | None = None
            for manifest_id in (row.manifest, row.previous):
                if manifest_id is None:
                    continue
                try:
                    head = await self._restore(org, session, manifest_id, into, progress)
                except SnapshotCorrupted as error:
                    log.warning("snapshot.corrupted", session=session, snapshot=manifest_id, reason=error.message)
                    damage = damage or error
                    continue
                return await self._restored(session, into, row, org=org, head=head, damage=damage, guard=guard)
            raise SnapshotCorrupted(
                f"no snapshot of session {session} can be read back: {damage.message if damage else 'none is left'}"
            )

    async def _restored(
        self,
        session: str,
        into: Path,
        row: Current,
        *,
        org: str,
        head: Head,
        damage: SnapshotCorrupted | None,
        guard: Guard | None,
    ) -> Restored:
        if damage is not None:
            # Else the next save would build on the damaged one, and take over what cannot be read.
            sound = _row(head, row.created_at, previous=None)
            try:
                await rows.replace(self._db, org, session, sound, seen=row.manifest, guard=guard)
            except BaseException:
                await in_thread(remove_tree, into)
                raise
            row = sound
        return Restored(
            home=into / "home",
            work=into / "work",
            cli_uuid=head.cli_uuid,
            snapshot=_snapshot(head, row, written=0, read=0),
            fell_back=damage is not None,
            damage=damage.message if damage is not None else None,
        )

    async def _restore(self, org: str, session: str, manifest_id: str, into: Path, progress: OnProgress | None) -> Head:
        head = await self._head(org, session, manifest_id)
        manifest = await self._read_pages(org, head)
        await in_thread(check, manifest, self._settings.bounds)
        keys = await self._org_keys.of(org)
        count = _Counter(head.bytes_logical, progress)
        fresh = into.with_name(f".{into.name}.{self._ids.new('restoring')}")

        async def write(one: tuple[int, list[tuple[Chunk, list[restoring.Place]]]]) -> None:
            pack = manifest.packs[one[0]]
            content = await self._get(_pack_key(org, session, pack.id), _MAX_PACK)
            if content is None or len(content) != pack.size:
                raise SnapshotCorrupted(f"a part of snapshot {manifest_id} is missing or has another length")
            count.add(await in_thread(restoring.write_chunks, content, one[1], fresh, keys))

        try:
            await in_thread(restoring.make_directories, manifest, fresh)
            packs = await in_thread(restoring.by_pack, manifest)
            await each(packs.items(), self._settings.parallel, write)
            await in_thread(restoring.finish, manifest, fresh)
            await in_thread(fresh.rename, into)
        except BaseException as error:
            await in_thread(_remove_if_there, fresh)
            if isinstance(error, OSError):
                raise StorageUnavailable(
                    f"snapshot {manifest_id} could not be written to the disk: {error.strerror}"
                ) from error
            raise
        return head

    # Removing ---------------------------------------------------------------------------------------------------------

    async def delete(self, org: str, session: str) -> None:
        """Forget a session's snapshots and remove their blobs. Raises StorageUnavailable: repeat it, or `collect`."""
        _check_ids(org, session)
        async with self._order(org, session):
            await rows.remove(self._db, org, session)
            await self._remove(await self._list(_prefix(org, session)))

    async def erase(self, org: str) -> int:
        """Forget all snapshots of an organisation and remove their blobs; how many. Raises StorageUnavailable: repeat it."""
        _check_ids(org)
        await rows.remove(self._db, org, None)
        blobs = await self._list(_prefix(org))
        await self._remove(blobs)
        return len(blobs)

    async def collect(self, org: str) -> Collected:
        """Remove what no session's current or previous snapshot needs and what is older than the grace period.

        Blobs of sessions that have no snapshot (deleted half-way) go too. Raises StorageUnavailable.
        """
        _check_ids(org)
        before = self._clock.now() - timedelta(seconds=self._settings.grace_seconds)
        old: dict[str, list[Blob]] = {}
        for blob in await self._list(_prefix(org)):
            if blob.modified < before:
                old.setdefault(blob.key.split("/")[2], []).append(blob)
        current = await rows.all_current(self._db, org)
        removed = bytes_removed = left = 0
        for session, blobs in old.items():
            try:
                needed = await self._needed(org, session, current.get(session))
            except SnapshotCorrupted as error:
                log.warning("snapshot.not_collected", session=session, reason=error.message)
                left += 1
                continue
            surplus = [blob for blob in blobs if blob.key not in needed]
            await self._remove(surplus)
            removed += len(surplus)
            bytes_removed += sum(blob.size for blob in surplus)
        return Collected(removed, bytes_removed, left)

    async def _needed(self, org: str, session: str, row: Current | None) -> set[str]:
        """Keys of all blobs that a session's snapshots need. Raises SnapshotCorrupted when that cannot be told."""
        needed: set[str] = set()
        if row is None:
            return needed
        for manifest_id in (row.manifest, row.previous):
            if manifest_id is not None:
                head = await self._head(org, session, manifest_id)
                needed.add(_manifest_key(org, session, manifest_id))
                needed |= {_pack_key(org, session, pack.id) for pack in head.packs}
        return needed

    # Blobs ------------------------------------------------------------------------------------------------------------

    async def _read_pages(self, org: str, head: Head) -> Manifest:
        """The whole list of files. Raises SnapshotCorrupted, RequestTooLarge."""
        bounds, keys = self._settings.bounds, await self._org_keys.of(org)
        if sum(page.plain for page in head.pages) > bounds.manifest_bytes:
            raise RequestTooLarge(
                f"the list of files of snapshot {head.id} is larger than {bounds.manifest_bytes} bytes"
            )
        by_pack: dict[int, list[int]] = {}
        for number, page in enumerate(head.pages):
            if not 0 <= page.pack < len(head.packs):
                raise SnapshotCorrupted(f"a page of snapshot {head.id} lies in no pack")
            by_pack.setdefault(page.pack, []).append(number)
        pages: dict[int, bytes] = {}

        async def read(one: tuple[int, list[int]]) -> None:
            pack = head.packs[one[0]]
            content = await self._get(_pack_key(org, head.session, pack.id), bounds.manifest_bytes)
            if content is None or len(content) != pack.size:
                raise SnapshotCorrupted(f"a page of snapshot {head.id} is missing or has another length")
            pages.update(await in_thread(_open_pages, content, head, one[1], keys))

        await each(by_pack.items(), 4, read)
        return await in_thread(join, head, [pages[number] for number in range(len(head.pages))])

    async def _head(self, org: str, session: str, manifest_id: str) -> Head:
        bounds = self._settings.bounds
        sealed = await self._get(_manifest_key(org, session, manifest_id), bounds.manifest_bytes)
        if sealed is None:
            raise SnapshotCorrupted(f"the list of files of snapshot {manifest_id} is missing")
        if len(sealed) < OVERHEAD:
            raise SnapshotCorrupted(f"the list of files of snapshot {manifest_id} is broken off")
        # Its key version is the newest of all that its chunks were sealed with.
        keys = await self._org_keys.of(org, opening=sealed if _readable_head(sealed) else None)
        return await in_thread(decode, sealed, keys, session, manifest_id, bounds)

    async def _put(self, key: str, content: bytes) -> None:
        await within(self._settings.blob_seconds, "write", self._blobs.put(key, content))

    async def _get(self, key: str, limit: int) -> bytes | None:
        return await within(self._settings.blob_seconds, "read", self._blobs.get(key, limit=limit))

    async def _list(self, prefix: str) -> list[Blob]:
        async def gather() -> list[Blob]:
            return [blob async for blob in self._blobs.list(prefix)]

        return await within(self._settings.blob_seconds * 10, "list", gather())

    async def _remove(self, blobs: Sequence[Blob]) -> None:
        async def remove(blob: Blob) -> None:
            await within(self._settings.blob_seconds, "delete", self._blobs.delete(blob.key))

        # Manifests first: broken off half-way, no manifest is left whose packs are gone.
        manifests = [blob for blob in blobs if "/manifests/" in blob.key]
        await each(manifests, 8, remove)
        await each([blob for blob in blobs if "/manifests/" not in blob.key], 8, remove)

    def _order(self, org: str, session: str) -> asyncio.Lock:
        """One save, restore or deletion of a session at a time in this server; between servers the row decides."""
        return self._orders.setdefault((org, session), asyncio.Lock())


def _check_ids(*ids: str) -> None:
    for one in ids:
        if not well_formed(one):
            raise InvalidRequest(f"not an identifier: {one[:40]!r}", field="session")


def _readable_head(sealed: bytes) -> bool:
    return sealed[0] == 1


def _prefix(org: str, session: str | None = None) -> str:
    return f"snapshots/{org}" if session is None else f"snapshots/{org}/{session}"


def _manifest_key(org: str, session: str, manifest: str) -> str:
    return f"snapshots/{org}/{session}/manifests/{manifest}"


def _pack_key(org: str, session: str, pack: str) -> str:
    return f"snapshots/{org}/{session}/packs/{pack}"


def _open_pages(content: bytes, head: Head, numbers: Sequence[int], keys: DataKeys) -> dict[int, bytes]:
    opened: dict[int, bytes] = {}
    for number in numbers:
        page = head.pages[number]
        sealed = content[page.offset : page.offset + page.stored]
        opened[number] = restoring.open_chunk(sealed, page, keys, table=packing.PAGE_TABLE)
    return opened


def _row(head: Head, created_at: datetime, *, previous: str | None) -> Current:
    return Current(
        manifest=head.id,
        previous=previous,
        created_at=created_at,
        bytes_logical=head.bytes_logical,
        bytes_stored=head.bytes_stored,
        cli_uuid=head.cli_uuid,
        cli_version=head.cli_version,
    )


def _same(before: Head, row: Current, pages: Sequence[Chunk], start: _Start) -> bool:
    """Whether the current snapshot says all that a new one would; what is left out of both does not count."""
    told = (before.id, before.cli_uuid, before.cli_version, before.messages, before.exact)
    now = (row.manifest, start.cli_uuid, start.cli_version, start.position.messages, start.position.exact)
    return told == now and not before.torn and [page.id for page in pages] == [page.id for page in before.pages]


def _snapshot(head: Head, row: Current, *, written: int, read: int) -> Snapshot:
    return Snapshot(
        id=head.id,
        session=head.session,
        created_at=row.created_at,
        bytes_logical=row.bytes_logical,
        bytes_stored=row.bytes_stored,
        bytes_written=written,
        bytes_read=read,
        entries=head.entry_count,
        cli_uuid=head.cli_uuid,
        cli_version=head.cli_version,
        skipped=tuple(head.skipped),
        skipped_count=head.skipped_count,
        position=Position(head.messages, head.exact),
        torn=tuple(head.torn),
    )


def _remove_if_there(path: Path) -> None:
    if path.exists():
        remove_tree(path)
