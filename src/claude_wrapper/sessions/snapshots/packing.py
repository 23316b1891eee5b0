"""From files to packs: which files have to be read, in which portions, and what one portion becomes.

A portion is a few megabytes of files; reading it gives one pack at most: the chunks that are not stored yet, each
compressed and sealed by itself, one after the other. `read_portion` blocks: call it in a thread.
"""

from __future__ import annotations

import hmac
import os
import stat
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.sandbox.files import open_beneath
from claude_wrapper.sessions.snapshots.manifest import FILE, Chunk, Entry, Head, Manifest, Pack
from claude_wrapper.sessions.snapshots.scan import Found, Scan
from claude_wrapper.vault.envelope import DataKeys

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHUNK_BYTES: Final = 1 << 20
PORTION_BYTES: Final = 4 << 20
_ADDRESS_BYTES: Final = 16
"""Keyed: nobody outside can look for collisions; by chance one needs 2^64 chunks."""
PORTION_FILES: Final = 1_000
CHUNK_TABLE: Final = "session_snapshot_chunks"
PAGE_TABLE: Final = "session_snapshot_pages"
_RACY_NS: Final = 2_000_000_000
"""A file that was written this shortly before it was last read may have changed within the same time stamp."""
_LEVEL: Final = 3


def address_key(keys: DataKeys) -> bytes:
    """What the chunks of one organisation are addressed with: equal content of two has different addresses."""
    return keys.fingerprint("addresses of snapshot chunks").encode()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file that is to be read."""

    entry: int
    """Index into the scan."""
    root: int
    path: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ReadPiece:
    """What reading a piece gave."""

    piece: Piece
    ids: tuple[bytes, ...] = ()
    size: int = 0
    """Bytes read: fewer than asked for when the file became shorter."""
    steady: bool = True
    """Whether the file was still as the scan saw it."""
    gone: str | None = None
    """Why it could not be read."""


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A sealed chunk in the pack of its portion."""

    id: bytes
    offset: int
    stored: int
    plain: int


@dataclass(slots=True)
class Portion:
    """What one portion became."""

    pack: bytearray = field(default_factory=bytearray, repr=False)
    chunks: list[NewChunk] = field(default_factory=list)
    pieces: list[ReadPiece] = field(default_factory=list)
    bytes_read: int = 0


@dataclass(slots=True)
class Comparison:
    """A scan beside the manifest before it."""

    unchanged: dict[int, Entry]
    """By index into the scan: the old entry, whose chunks are still right."""
    changed: list[int]


def compare(scan: Scan, base: Manifest | None) -> Comparison:
    """Which files must be read: all but those whose size, times and inode are those of the last snapshot.

    The time of change is among them: who writes into a file in place and sets its time back is noticed all the same.
    """
    known = {} if base is None else {(e.root, e.path): e for e in base.entries if e.kind == FILE and e.inode}
    scanned_ns = 0 if base is None else base.scanned_ns
    result = Comparison({}, [])
    for index, found in enumerate(scan.found):
        if found.kind != FILE:
            continue
        old = known.get((found.root, os.fsencode(found.path)))
        if old is not None and _same(found, old, scanned_ns):
            result.unchanged[index] = old
        else:
            result.changed.append(index)
    return result


def _same(found: Found, old: Entry, scanned_ns: int) -> bool:
    if (found.size, found.mtime_ns, found.ctime_ns) != (old.size, old.mtime_ns, old.ctime_ns):
        return False
    return found.inode == old.inode and max(found.mtime_ns, found.ctime_ns) + _RACY_NS < scanned_ns


def portions(found: Sequence[Found], indices: Collection[int]) -> Iterator[list[Piece]]:
    """The files to read in portions of about `PORTION_BYTES`; large files in several, small ones together."""
    portion: list[Piece] = []
    size = 0
    for index in indices:
        one = found[index]
        for offset in range(0, one.size, PORTION_BYTES):
            piece = Piece(index, one.root, one.path, offset, min(PORTION_BYTES, one.size - offset))
            if portion and (size + piece.length > PORTION_BYTES or len(portion) >= PORTION_FILES):
                yield portion
                portion, size = [], 0
            portion.append(piece)
            size += piece.length
    if portion:
        yield portion


def read_portion(
    portion: Sequence[Piece], scan: Scan, roots: Sequence[Path], known: Collection[bytes], keys: DataKeys
) -> Portion:
    """Read, address, compress and seal. `known` are the addresses that are stored already."""
    reader = _Reader(known, keys, address_key(keys))
    for piece in portion:
        try:
            descriptor = open_beneath(roots[piece.root], piece.path)
        except (NotFound, InvalidRequest) as error:
            reader.result.pieces.append(ReadPiece(piece, gone=error.message))
            continue
        try:
            reader.result.pieces.append(reader.read(descriptor, piece, scan.found[piece.entry]))
        except OSError as error:
            reader.result.pieces.append(ReadPiece(piece, gone=os.strerror(error.errno or 0)))
        finally:
            os.close(descriptor)
    return reader.result


@dataclass(slots=True)
class _Reader:
    """Puts a portion's pack together."""

    known: Collection[bytes]
    keys: DataKeys
    address: bytes = field(repr=False)
    own: set[bytes] = field(default_factory=set)
    result: Portion = field(default_factory=Portion)

    def read(self, descriptor: int, piece: Piece, found: Found) -> ReadPiece:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ReadPiece(piece, gone="is not a file any more")
        ids: list[bytes] = []
        size = 0
        while size < piece.length:
            content = _fill(descriptor, min(CHUNK_BYTES, piece.length - size), piece.offset + size)
            if not content:
                break
            size += len(content)
            ids.append(self._chunk(content))
        self.result.bytes_read += size
        after = os.fstat(descriptor)
        now = (after.st_size, after.st_mtime_ns, after.st_ctime_ns, after.st_ino)
        steady = now == (found.size, found.mtime_ns, found.ctime_ns, found.inode)
        return ReadPiece(piece, tuple(ids), size, steady)

    def _chunk(self, content: bytes) -> bytes:
        chunk = hmac.digest(self.address, content, "sha256")[:_ADDRESS_BYTES]
        if chunk not in self.known and chunk not in self.own:
            self.own.add(chunk)
            sealed = self.keys.seal(zstd.compress(content, level=_LEVEL), table=CHUNK_TABLE, record=chunk.hex())
            self.result.chunks.append(NewChunk(chunk, len(self.result.pack), len(sealed), len(content)))
            self.result.pack += sealed
        return chunk


def _fill(descriptor: int, length: int, offset: int) -> bytes:
    """As many bytes as there are: one read may give fewer."""
    content = os.pread(descriptor, length, offset)
    while 0 < len(content) < length:
        more = os.pread(descriptor, length - len(content), offset + len(content))
        if not more:
            break
        content += more
    return content


MAX_PAGE_PACKS: Final = 16
"""Packs that the pages of one list of files may be spread over; then all are written again, into one."""


def seal_pages(
    pages: Sequence[bytes], known: Mapping[bytes, tuple[str, int, int, int]], keys: DataKeys
) -> tuple[list[bytes], Portion]:
    """The addresses of encoded pages, and those that are not stored yet, sealed."""
    address, result = address_key(keys), Portion()
    ids = [hmac.digest(address, b"page\0" + page, "sha256")[:_ADDRESS_BYTES] for page in pages]
    spread = {known[page][0] for page in ids if page in known}
    stored = known if len(spread) < MAX_PAGE_PACKS else {}
    new: set[bytes] = set()
    for page, content in zip(ids, pages, strict=True):
        if page not in stored and page not in new:
            new.add(page)
            sealed = keys.seal(zstd.compress(content, level=_LEVEL), table=PAGE_TABLE, record=page.hex())
            result.chunks.append(NewChunk(page, len(result.pack), len(sealed), len(content)))
            result.pack += sealed
    return ids, result


@dataclass(slots=True)
class Index:
    """Where chunks lie: those of the manifest before, and those stored since."""

    chunks: dict[bytes, tuple[str, int, int, int]] = field(default_factory=dict)
    """By address: pack id, offset, stored bytes, bytes of content."""
    packs: dict[str, int] = field(default_factory=dict)
    """Pack sizes."""

    @classmethod
    def of(cls, base: Manifest | None) -> Index:
        index = cls()
        if base is not None:
            index.packs = {pack.id: pack.size for pack in base.packs}
            index.chunks = {c.id: (base.packs[c.pack].id, c.offset, c.stored, c.plain) for c in base.chunks}
        return index

    @classmethod
    def of_pages(cls, head: Head | None) -> Index:
        """The same of the pages of a list of files."""
        index = cls()
        if head is not None:
            index.packs = {pack.id: pack.size for pack in head.packs}
            index.chunks = {c.id: (head.packs[c.pack].id, c.offset, c.stored, c.plain) for c in head.pages}
        return index

    def add(self, pack: str, size: int, chunks: Sequence[NewChunk]) -> None:
        """A pack was stored."""
        self.packs[pack] = size
        for chunk in chunks:
            self.chunks[chunk.id] = (pack, chunk.offset, chunk.stored, chunk.plain)


@dataclass(slots=True)
class _File:
    """A changed file, put together from its pieces."""

    ids: list[tuple[int, tuple[bytes, ...]]] = field(default_factory=list)
    size: int = 0
    steady: bool = True
    gone: str | None = None


def wanted(base: Manifest | None, comparison: Comparison, read: Sequence[Portion]) -> dict[int, list[bytes]]:
    """The addresses that each file of the scan is made of, in order (files that went away are absent)."""
    result = {
        index: [base.chunks[number].id for number in entry.chunks]
        for index, entry in comparison.unchanged.items()
        if base is not None
    }
    for index, file in _files(read).items():
        if file.gone is None:
            result[index] = [one for _, ids in sorted(file.ids) for one in ids]
    return result


def _files(read: Sequence[Portion]) -> dict[int, _File]:
    files: dict[int, _File] = {}
    for portion in read:
        for one in portion.pieces:
            file = files.setdefault(one.piece.entry, _File())
            file.ids.append((one.piece.offset, one.ids))
            file.size += one.size
            file.steady = file.steady and one.steady and one.size == one.piece.length
            file.gone = file.gone or one.gone
    return files


def unsteady(read: Sequence[Portion]) -> list[int]:
    """Files of the scan that changed while they were read."""
    return [index for index, file in _files(read).items() if file.gone is None and not file.steady]


def drop(read: Sequence[Portion], files: Collection[int]) -> None:
    """Forget what was read of these files: they are read again."""
    for portion in read:
        portion.pieces = [one for one in portion.pieces if one.piece.entry not in files]


def assemble(
    scan: Scan, comparison: Comparison, read: Sequence[Portion], addresses: Mapping[int, Sequence[bytes]], index: Index
) -> tuple[list[Entry], list[Chunk], list[Pack]]:
    """The entries of the new manifest with the chunks and packs that they need, and no others."""
    files = _files(read)
    numbers: dict[bytes, int] = {}
    packs: dict[str, int] = {}
    chunks: list[Chunk] = []

    def number(chunk: bytes) -> int:
        if chunk not in numbers:
            pack, offset, stored, plain = index.chunks[chunk]
            numbers[chunk] = len(chunks)
            chunks.append(Chunk(chunk, packs.setdefault(pack, len(packs)), offset, stored, plain))
        return numbers[chunk]

    entries: list[Entry] = []
    for position, found in enumerate(scan.found):
        size, inode = found.size, found.inode
        file = files.get(position)
        if file is not None:
            if file.gone is not None:
                scan.skip(found.root, found.path, file.gone)
                continue
            size, inode = file.size, found.inode if file.steady else 0
        entries.append(
            Entry(
                root=found.root,
                path=os.fsencode(found.path),
                kind=found.kind,
                mode=found.mode,
                mtime_ns=found.mtime_ns,
                size=size,
                ctime_ns=found.ctime_ns,
                inode=inode,
                chunks=tuple(number(chunk) for chunk in addresses.get(position, ())),
                target=os.fsencode(found.target),
            )
        )
    return entries, chunks, [Pack(pack, index.packs[pack]) for pack in packs]


def worn(index: Index, addresses: Mapping[int, Sequence[bytes]], limit: int) -> list[str]:
    """Packs of which less than half is still needed, the emptiest first, at most `limit` needed bytes of them.

    Their needed chunks are moved to a new pack; else a workspace whose files change one by one would keep everything.
    """
    needed: dict[str, int] = {}
    for chunk in {chunk for ids in addresses.values() for chunk in ids}:
        pack, _, stored, _ = index.chunks[chunk]
        needed[pack] = needed.get(pack, 0) + stored
    chosen: list[str] = []
    for live, pack in sorted((live, pack) for pack, live in needed.items() if live * 2 < index.packs[pack]):
        limit -= live
        if limit < 0:
            break
        chosen.append(pack)
    return chosen


def move_chunks(pack: str, content: bytes, index: Index, needed: Collection[bytes], into: Portion) -> None:
    """Copy the needed sealed chunks of a pack as they are: they are bound to their address, not to their pack."""
    for chunk in needed:
        source, offset, stored, plain = index.chunks[chunk]
        if source == pack:
            into.chunks.append(NewChunk(chunk, len(into.pack), stored, plain))
            into.pack += content[offset : offset + stored]
