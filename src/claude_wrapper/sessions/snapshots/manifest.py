"""What a snapshot consists of: pure data, its encoding, and the rules that it must keep to be written to a disk.

A manifest lists the entries of two trees (`home` and `work`), the chunks that their files are made of, and the packs in
which the chunks lie. Names and link targets are bytes, because file names are. It is stored as a head and pages, which are
msgpack, compressed and sealed; a page that did not change is not stored again, as a chunk is not.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from claude_wrapper.errors import RequestTooLarge, SnapshotCorrupted
from claude_wrapper.vault.envelope import DataKeys, Unreadable

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

VERSION: Final = 1
HOME: Final = 0
WORK: Final = 1
ROOTS: Final = ("home", "work")
FILE: Final = "f"
DIRECTORY: Final = "d"
LINK: Final = "l"
MAX_SKIPPED: Final = 1_000
"""Skipped things that are listed by name; the count is exact."""
TABLE: Final = "session_snapshots"
_NAME_MAX: Final = 255
_PAGE_ENTRIES: Final = 128


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a snapshot may be at most, when it is saved and when it is restored."""

    total_bytes: int = 16 << 30
    """Bytes of all files."""
    entries: int = 1_000_000
    """Files, directories and links."""
    path_bytes: int = 4_000
    """Of one path or link target: PATH_MAX less what the directories of the server need."""
    depth: int = 64
    manifest_bytes: int = 512 << 20
    """Of a manifest before compression; a million entries are about 100 MB."""


class Chunk(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A piece of a file: where its sealed bytes are."""

    id: bytes
    """Keyed hash of the content."""
    pack: int
    """Index into `Manifest.packs`."""
    offset: int
    stored: int
    plain: int
    """Bytes of content."""


class Pack(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A blob that holds sealed chunks one after the other."""

    id: str
    size: int


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One file, directory or link."""

    root: int
    path: bytes
    kind: str
    mode: int
    mtime_ns: int
    size: int = 0
    ctime_ns: int = 0
    inode: int = 0
    """0: the file changed while it was read, so it is read again next time."""
    chunks: tuple[int, ...] = ()
    """Indices into `Manifest.chunks`, in order."""
    target: bytes = b""


class Skipped(msgspec.Struct, array_like=True, frozen=True):
    """Something that is not in the snapshot, and why."""

    root: int
    path: bytes
    reason: str


class Page(msgspec.Struct, array_like=True, frozen=True):
    """Some entries that follow each other, with their chunks; numbers count within the page."""

    entries: list[Entry]
    chunks: list[Chunk]
    packs: list[str]


class Head(msgspec.Struct, frozen=True):
    """The blob that the database names: where the pages of the list of files are, and all packs that are needed."""

    version: int
    id: str
    session: str
    scanned_ns: int
    """Wall-clock time at which the scan began."""
    cli_uuid: str
    cli_version: str
    skipped: list[Skipped]
    skipped_count: int
    bytes_logical: int
    """Bytes of all files."""
    entry_count: int
    pages: list[Chunk]
    packs: list[Pack]
    messages: int = 0
    """`Position.messages`."""
    exact: bool = False
    """`Position.exact`."""
    torn: list[Skipped] = []
    """Files that changed while they were read."""

    @property
    def bytes_stored(self) -> int:
        """Bytes of all packs that it needs."""
        return sum(pack.size for pack in self.packs)


@dataclass(slots=True)
class Manifest:
    """One snapshot: all its pages put together."""

    entries: list[Entry]
    chunks: list[Chunk]
    packs: list[Pack]
    head: Head | None = None
    """What it was read from."""

    @property
    def scanned_ns(self) -> int:
        return self.head.scanned_ns if self.head is not None else 0


class _Version(msgspec.Struct):
    version: int


def encode(head: Head, keys: DataKeys) -> bytes:
    """Compressed and sealed for its place."""
    plain = msgspec.msgpack.encode(head)
    return keys.seal(zstd.compress(plain, level=3), table=TABLE, record=_record(head.session, head.id))


def decode(sealed: bytes, keys: DataKeys, session: str, manifest_id: str, bounds: Bounds) -> Head:
    """The reverse. Raises SnapshotCorrupted for whatever is not a snapshot of this session with this id."""
    try:
        packed = keys.open(sealed, table=TABLE, record=_record(session, manifest_id))
        plain = unpack(packed, bounds.manifest_bytes)
        version = msgspec.msgpack.decode(plain, type=_Version).version
        if version != VERSION:
            raise SnapshotCorrupted(f"snapshot {manifest_id} has format {version}; this version reads {VERSION}")
        head = msgspec.msgpack.decode(plain, type=Head)
    except (Unreadable, zstd.ZstdError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SnapshotCorrupted(f"the list of files of snapshot {manifest_id} cannot be read: {error}") from error
    if (head.id, head.session) != (manifest_id, session):
        raise SnapshotCorrupted(f"snapshot {manifest_id} says that it is {head.id} of {head.session}")
    return head


def cut(manifest: Manifest, bounds: Bounds) -> list[bytes]:
    """The pages of a list of files, encoded. Raises RequestTooLarge.

    A page ends where a path's checksum says so: a file that comes or goes changes its own page and no other.
    """
    pages: list[bytes] = []
    group: list[Entry] = []
    for entry in manifest.entries:
        group.append(entry)
        if zlib.crc32(entry.path) % _PAGE_ENTRIES == 0 or len(group) >= 8 * _PAGE_ENTRIES:
            pages.append(_page(manifest, group))
            group = []
    if group:
        pages.append(_page(manifest, group))
    size = sum(len(page) for page in pages)
    if size > bounds.manifest_bytes:
        raise RequestTooLarge(
            f"the list of files has {size} bytes, more than the {bounds.manifest_bytes} that a snapshot may have: "
            "remove files from the workspace"
        )
    return pages


def _page(manifest: Manifest, entries: list[Entry]) -> bytes:
    numbers: dict[int, int] = {}
    packs: dict[int, int] = {}
    chunks: list[Chunk] = []
    own: list[Entry] = []
    for entry in entries:
        for number in entry.chunks:
            if number not in numbers:
                numbers[number] = len(chunks)
                chunk = manifest.chunks[number]
                chunks.append(msgspec.structs.replace(chunk, pack=packs.setdefault(chunk.pack, len(packs))))
        mine = tuple(numbers[number] for number in entry.chunks)
        own.append(msgspec.structs.replace(entry, chunks=mine) if mine else entry)
    return msgspec.msgpack.encode(Page(own, chunks, [manifest.packs[number].id for number in packs]))


def join(head: Head, pages: Iterable[bytes]) -> Manifest:
    """The pages put together. Raises SnapshotCorrupted."""
    places = {pack.id: number for number, pack in enumerate(head.packs)}
    numbers: dict[Chunk, int] = {}
    manifest = Manifest([], [], head.packs, head)
    try:
        for encoded in pages:
            page = msgspec.msgpack.decode(encoded, type=Page)
            own: list[int] = []
            for chunk in page.chunks:
                there = Chunk(chunk.id, places[page.packs[chunk.pack]], chunk.offset, chunk.stored, chunk.plain)
                if there not in numbers:
                    numbers[there] = len(manifest.chunks)
                    manifest.chunks.append(there)
                own.append(numbers[there])
            for entry in page.entries:
                mine = tuple(own[number] for number in entry.chunks)
                manifest.entries.append(msgspec.structs.replace(entry, chunks=mine) if mine else entry)
    except (msgspec.MsgspecError, UnicodeDecodeError, IndexError, KeyError) as error:
        raise SnapshotCorrupted(f"a page of snapshot {head.id} cannot be read: {error}") from error
    return manifest


def unpack(packed: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes. Raises ZstdError, SnapshotCorrupted."""
    decompressor = zstd.ZstdDecompressor()
    plain = decompressor.decompress(packed, max_length=limit + 1)
    if len(plain) > limit or not decompressor.eof:
        raise SnapshotCorrupted("a stored piece is longer than it says, or broken off")
    return plain


def _record(session: str, manifest_id: str) -> str:
    return f"{session}/{manifest_id}"


def link_stays_inside(path: bytes, target: bytes) -> bool:
    """Whether a link at `path` can lead nowhere but below its root.

    `..` is allowed at the beginning only: after a name it would count from wherever that name leads, if it is a link.
    """
    if not target or target.startswith(b"/") or b"\0" in target:
        return False
    parts = [part for part in target.split(b"/") if part not in {b"", b"."}]
    up = 0
    while up < len(parts) and parts[up] == b"..":
        up += 1
    return up <= path.count(b"/") and b".." not in parts[up:]


def check(manifest: Manifest, bounds: Bounds) -> None:
    """Raise SnapshotCorrupted, before anything is written, for what could leave the root or contradicts itself.

    Raises RequestTooLarge for more than may be restored.
    """
    total = sum(entry.size for entry in manifest.entries)
    if len(manifest.entries) > bounds.entries or total > bounds.total_bytes:
        raise RequestTooLarge(
            f"the snapshot has {len(manifest.entries)} entries and {total} bytes; "
            f"at most {bounds.entries} and {bounds.total_bytes} may be restored"
        )
    for problem in _problems(manifest, bounds):
        raise SnapshotCorrupted(f"the snapshot is refused: {problem}")


def _problems(manifest: Manifest, bounds: Bounds) -> Iterator[str]:
    for chunk in manifest.chunks:
        if min(chunk.pack, chunk.offset, chunk.stored, chunk.plain - 1) < 0 or chunk.pack >= len(manifest.packs):
            yield "a chunk lies in no pack"
        elif chunk.offset + chunk.stored > manifest.packs[chunk.pack].size:
            yield "a chunk lies outside of its pack"
    directories: set[tuple[int, bytes]] = {(HOME, b""), (WORK, b"")}
    seen: set[tuple[int, bytes]] = set()
    for entry in manifest.entries:
        where = f"{entry.path[:100]!r}"
        parent = entry.path.rpartition(b"/")[0]
        if not _path_is_plain(entry.path, bounds):
            yield f"the path {where} could leave the workspace or is too long"
        if entry.root not in {HOME, WORK} or entry.kind not in {FILE, DIRECTORY, LINK} or not 0 <= entry.mode <= 0o1777:
            yield f"{where} is of an unknown kind"
        if (entry.root, entry.path) in seen or (entry.root, parent) not in directories:
            yield f"{where} is there twice or not in a directory"
        seen.add((entry.root, entry.path))
        if entry.kind == DIRECTORY:
            directories.add((entry.root, entry.path))
        elif entry.kind == LINK:
            if len(entry.target) > bounds.path_bytes or not link_stays_inside(entry.path, entry.target):
                yield f"the link {where} leaves the workspace"
        elif not _adds_up(entry, manifest.chunks):
            yield f"the pieces of {where} do not make up the file"


def _path_is_plain(path: bytes, bounds: Bounds) -> bool:
    parts = path.split(b"/")
    return (
        0 < len(path) <= bounds.path_bytes
        and len(parts) <= bounds.depth
        and b"\0" not in path
        and all(part not in {b"", b".", b".."} and len(part) <= _NAME_MAX for part in parts)
    )


def _adds_up(entry: Entry, chunks: list[Chunk]) -> bool:
    if any(not 0 <= index < len(chunks) for index in entry.chunks):
        return False
    return sum(chunks[index].plain for index in entry.chunks) == entry.size
