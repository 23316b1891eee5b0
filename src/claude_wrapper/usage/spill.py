"""A durable waiting room on the local disk for rows that the database cannot take now.

Append-only files of JSON lines, synchronised to the disk before `append` returns. A file is locked while its writer
lives; `drain` takes every file that nobody has locked, those of a crashed server included. Reading a file twice is
harmless: the ledger keeps one row per call id. Needs a file system with working `flock`.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.usage.entries import Row

PATTERN: Final = "usage-*.ndjson"
REJECTED: Final = "rejected.ndjson"
"""Rows that the database will never take, for a human to look at."""
_BATCH: Final = 500

Write = Callable[[Sequence[Row]], Awaitable[None]]


@dataclass(slots=True)
class _Open:
    path: Path
    fd: int


class Spill:
    """The waiting room of one server process."""

    def __init__(self, directory: Path, name: str) -> None:
        """`directory` is made at the first row; `name` is unique to this process (an id)."""
        self._directory = directory
        self._name = name
        self._files = 0
        self._open: _Open | None = None
        self._lock = asyncio.Lock()  # around the open file; never held while the database is waited for
        self._draining = asyncio.Lock()

    @property
    def waiting(self) -> bool:
        """Whether any row may be waiting here, of this process or another."""
        return any(path.stat().st_size for path in self._directory.glob(PATTERN)) if self._directory.is_dir() else False

    async def append(self, rows: Sequence[Row]) -> None:
        """Keep rows. When this returns they are on the disk. Raises StorageUnavailable if the disk is full or gone."""
        data = b"".join(json.dumps(dict(row), separators=(",", ":")).encode() + b"\n" for row in rows)
        async with self._lock:
            try:
                await asyncio.to_thread(self._append, data)
            except OSError as error:
                raise StorageUnavailable(
                    f"usage cannot be kept in {self._directory}: {error.strerror}; free some disk space"
                ) from error

    async def drain(self, write: Write) -> int:
        """Give everything to `write` in batches and forget it; how many rows there were. What `write` raises stops it."""
        async with self._draining:
            async with self._lock:
                await asyncio.to_thread(self._seal)
            total = 0
            for path in await asyncio.to_thread(self._sealed):
                total += await self._drain_file(path, write)
            return total

    async def reject(self, row: Row, reason: str) -> None:
        """Keep a row that the database refuses, with the reason."""
        line = json.dumps({"reason": reason, "row": dict(row)}).encode() + b"\n"
        async with self._lock:
            await asyncio.to_thread(self._append_rejected, line)

    async def close(self) -> None:
        """Let other processes take what waits here."""
        async with self._lock:
            await asyncio.to_thread(self._seal)

    # inside: what is not async runs in a thread, and what touches the open file under the lock -----------------------------

    def _append(self, data: bytes) -> None:
        opened = self._open or self._new_file()
        before = os.fstat(opened.fd).st_size
        try:
            _write_all(opened.fd, data)
            os.fsync(opened.fd)
        except OSError:
            os.ftruncate(opened.fd, before)  # no torn line between whole ones
            raise

    def _new_file(self) -> _Open:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._files += 1
        path = self._directory / f"usage-{self._name}-{self._files}.ndjson"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sync_directory(self._directory)
        except OSError:
            os.close(fd)
            raise
        self._open = _Open(path, fd)
        return self._open

    def _seal(self) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            os.close(opened.fd)

    def _sealed(self) -> list[Path]:
        return sorted(self._directory.glob(PATTERN)) if self._directory.is_dir() else []

    async def _drain_file(self, path: Path, write: Write) -> int:
        taken = await asyncio.to_thread(_take, path)
        if taken is None:
            return 0
        fd, rows, bad = taken
        try:
            for start in range(0, len(rows), _BATCH):
                await write(rows[start : start + _BATCH])
            if bad:
                async with self._lock:
                    await asyncio.to_thread(self._append_rejected, b"\n".join(bad) + b"\n")
            await asyncio.to_thread(os.unlink, path)
        finally:
            os.close(fd)
        return len(rows)

    def _append_rejected(self, line: bytes) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self._directory / REJECTED, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)


def _take(path: Path) -> tuple[int, list[dict[str, Any]], list[bytes]] | None:
    """The locked file, its rows and the lines that are none; None if a living process has it, or it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists():  # somebody drained it between open and lock
            os.close(fd)
            return None
        rows, bad = _read(path.read_bytes())
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        raise
    return fd, rows, bad


def _read(data: bytes) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Rows, and broken lines. A last line without its end was never acknowledged: a crash cut it, nobody counts on it."""
    *lines, _torn = data.split(b"\n")
    rows: list[dict[str, Any]] = []
    bad: list[bytes] = []
    for line in lines:
        try:
            row = json.loads(line)
            row["id"]
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            bad.append(line)
    return rows, bad


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
