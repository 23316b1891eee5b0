"""Writing a snapshot's files into a fresh directory that nobody but the server has. Blocks: call it in a thread.

First directories (open to the server alone), then files, then modes, links last of all: while anything is written, there
is no link that it could pass through.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from claude_wrapper.errors import SnapshotCorrupted
from claude_wrapper.sessions.snapshots.manifest import DIRECTORY, FILE, LINK, ROOTS, Chunk, Entry, Manifest, unpack
from claude_wrapper.sessions.snapshots.packing import CHUNK_TABLE
from claude_wrapper.vault.envelope import DataKeys, Unreadable

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC

Place = tuple[str, int]
"""A file below the directory, and an offset in it."""


def make_directories(manifest: Manifest, into: Path) -> None:
    """The directories, and every file empty."""
    into.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    into.mkdir(mode=0o700)
    for root in ROOTS:
        (into / root).mkdir(mode=0o700)
    for entry in manifest.entries:
        if entry.kind == DIRECTORY:
            Path(into, place(entry)).mkdir(mode=0o700)


def place(entry: Entry) -> str:
    """Where an entry lies below the directory."""
    return f"{ROOTS[entry.root]}/{os.fsdecode(entry.path)}"


def by_pack(manifest: Manifest) -> dict[int, list[tuple[Chunk, list[Place]]]]:
    """What is to be written from each pack."""
    places: list[list[Place]] = [[] for _ in manifest.chunks]
    for entry in manifest.entries:
        offset = 0
        for number in entry.chunks:
            places[number].append((place(entry), offset))
            offset += manifest.chunks[number].plain
    result: dict[int, list[tuple[Chunk, list[Place]]]] = {}
    for chunk, where in zip(manifest.chunks, places, strict=True):
        if where:
            result.setdefault(chunk.pack, []).append((chunk, where))
    return result


def finish(manifest: Manifest, into: Path) -> None:
    """Empty files, modes and times, links, and then the directories from the deepest up."""
    for entry in manifest.entries:
        if entry.kind == FILE:
            descriptor = os.open(into / place(entry), _CREATE, 0o600)
            try:
                os.fchmod(descriptor, entry.mode)
                os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
            finally:
                os.close(descriptor)
    for entry in manifest.entries:
        if entry.kind == LINK:
            Path(into, place(entry)).symlink_to(os.fsdecode(entry.target))
    for entry in reversed(manifest.entries):
        if entry.kind == DIRECTORY:
            path = into / place(entry)
            os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))
            path.chmod(entry.mode)


def write_chunks(pack: bytes, chunks: Sequence[tuple[Chunk, Sequence[Place]]], into: Path, keys: DataKeys) -> int:
    """Open chunks of a pack and write each to its places; the bytes written. Raises SnapshotCorrupted, OSError."""
    written = 0
    for chunk, places in chunks:
        sealed = pack[chunk.offset : chunk.offset + chunk.stored]
        plain = open_chunk(sealed, chunk, keys)
        for path, offset in places:
            descriptor = os.open(into / path, _CREATE, 0o600)
            try:
                written += _write(descriptor, plain, offset)
            finally:
                os.close(descriptor)
    return written


def _write(descriptor: int, content: bytes, offset: int) -> int:
    view = memoryview(content)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
    return len(content)


def open_chunk(sealed: bytes, chunk: Chunk, keys: DataKeys, *, table: str = CHUNK_TABLE) -> bytes:
    """The content of a chunk or page. Raises SnapshotCorrupted."""
    try:
        plain = unpack(keys.open(sealed, table=table, record=chunk.id.hex()), chunk.plain)
    except (Unreadable, zstd.ZstdError) as error:
        raise SnapshotCorrupted(f"a stored piece of a file cannot be read: {error}") from error
    if len(plain) != chunk.plain:
        raise SnapshotCorrupted("a stored piece of a file is shorter than it says")
    return plain
