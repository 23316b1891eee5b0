"""What is in a session's home and workspace, told without following a link. Blocks: call it in a thread.

Of the home only what `--resume` needs: the CLI's transcripts (`.claude/projects`) and its state file (`.claude.json`).
Directories are walked by descriptor, so that a tenant who swaps one for a link meanwhile leads the server nowhere.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from claude_wrapper.errors import InvalidRequest, NotFound, RequestTooLarge
from claude_wrapper.sandbox.files import open_beneath
from claude_wrapper.sessions.snapshots.manifest import (
    DIRECTORY,
    FILE,
    HOME,
    LINK,
    MAX_SKIPPED,
    WORK,
    Bounds,
    Skipped,
    link_stays_inside,
)

_DIRECTORY: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY
_STATE_FILE: Final = ".claude.json"
_TRANSCRIPTS: Final = (".claude", ".claude/projects")
_MAX_TIME: Final = 2**62
_KEPT_BITS: Final = 0o1777
"""setuid and setgid are not kept: a restored file belongs to the server until it is given away."""


@dataclass(frozen=True, slots=True)
class Found:
    """One thing in a tree."""

    root: int
    path: str
    """Relative to the root; not-UTF-8 bytes as surrogates, as everywhere in `os`."""
    kind: str
    mode: int
    mtime_ns: int
    size: int
    ctime_ns: int = 0
    """Moves with every change and cannot be set back, unlike the time of the content."""
    inode: int = 0
    target: str = ""


@dataclass(slots=True)
class Scan:
    """All that was found, directories before what is in them."""

    bounds: Bounds
    found: list[Found] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    skipped_count: int = 0
    total_bytes: int = 0

    def skip(self, root: int, path: str, reason: str) -> None:
        """Tell that something is left out."""
        self.skipped_count += 1
        if len(self.skipped) < MAX_SKIPPED:
            self.skipped.append(Skipped(root, os.fsencode(path), reason))

    def add(self, one: Found) -> None:
        """Raises RequestTooLarge when a bound is passed."""
        self.found.append(one)
        self.total_bytes += one.size
        if len(self.found) > self.bounds.entries:
            raise RequestTooLarge(f"the workspace has more than {self.bounds.entries} files: it cannot be snapshotted")
        if self.total_bytes > self.bounds.total_bytes:
            raise RequestTooLarge(
                f"the workspace has more than {self.bounds.total_bytes} bytes: it cannot be snapshotted"
            )
        if len(os.fsencode(one.path)) > self.bounds.path_bytes:
            raise RequestTooLarge(f"a path is longer than {self.bounds.path_bytes} bytes: {one.path[:100]!r}…")


def scan(home: Path, work: Path, bounds: Bounds) -> Scan:
    """List both trees. Raises NotFound when one is missing, RequestTooLarge beyond `bounds`."""
    result = Scan(bounds)
    top = _open_root(home)
    try:
        _add_home(result, home, top)
    finally:
        os.close(top)
    _walk(result, WORK, _open_root(work), "")
    return result


def look_again(scan: Scan, roots: tuple[Path, Path], files: Iterable[int]) -> None:
    """See these files as they are now, before they are read once more."""
    for index in files:
        before = scan.found[index]
        try:
            descriptor = open_beneath(roots[before.root], before.path)
        except (NotFound, InvalidRequest):
            continue  # reading it will say so
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        scan.total_bytes += found.st_size - before.size
        scan.found[index] = Found(
            before.root,
            before.path,
            FILE,
            stat.S_IMODE(found.st_mode) & _KEPT_BITS,
            _time(found.st_mtime_ns),
            found.st_size,
            _time(found.st_ctime_ns),
            found.st_ino,
        )
    if scan.total_bytes > scan.bounds.total_bytes:
        raise RequestTooLarge(f"the workspace has more than {scan.bounds.total_bytes} bytes: it cannot be snapshotted")


def _open_root(path: Path) -> int:
    try:
        return os.open(path, _DIRECTORY)
    except OSError as error:
        raise NotFound(f"the directory {path.name} of the session is not there: {error.strerror}") from error


def _add_home(result: Scan, home: Path, top: int) -> None:
    _add(result, HOME, top, _STATE_FILE, "")
    parents = [_look(top, path) for path in _TRANSCRIPTS]
    if not all(found is not None and stat.S_ISDIR(found.st_mode) for found in parents):
        if any(found is not None and not stat.S_ISDIR(found.st_mode) for found in parents):
            result.skip(HOME, _TRANSCRIPTS[-1], "not a directory")
        return
    try:
        transcripts = open_beneath(home, _TRANSCRIPTS[-1], _DIRECTORY)
    except (NotFound, InvalidRequest) as error:
        result.skip(HOME, _TRANSCRIPTS[-1], str(error))
        return
    for path, found in zip(_TRANSCRIPTS, parents, strict=True):
        if found is not None:
            result.add(_directory(HOME, path, found))
    _walk(result, HOME, transcripts, _TRANSCRIPTS[-1] + "/")


def _look(directory: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return None


def _time(nanoseconds: int) -> int:
    """Some file systems keep times that 64 bits of nanoseconds do not hold."""
    return max(-_MAX_TIME, min(_MAX_TIME, nanoseconds))


def _directory(root: int, path: str, found: os.stat_result) -> Found:
    return Found(root, path, DIRECTORY, stat.S_IMODE(found.st_mode) & _KEPT_BITS, _time(found.st_mtime_ns), 0)


def _add(result: Scan, root: int, directory: int, name: str, prefix: str) -> bool:
    """Add what has this name; whether it is a directory."""
    found = _look(directory, name)
    if found is None:
        return False
    path = prefix + name
    mode, kind = stat.S_IMODE(found.st_mode) & _KEPT_BITS, stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        result.add(_directory(root, path, found))
        return True
    if kind == stat.S_IFREG:
        changed = _time(found.st_ctime_ns)
        result.add(Found(root, path, FILE, mode, _time(found.st_mtime_ns), found.st_size, changed, found.st_ino))
    elif kind == stat.S_IFLNK:
        _add_link(result, root, directory, name, path)
    else:
        result.skip(root, path, "a socket, FIFO or device")
    return False


def _add_link(result: Scan, root: int, directory: int, name: str, path: str) -> None:
    try:
        target = os.readlink(name, dir_fd=directory)
    except OSError:
        return  # it went away
    if link_stays_inside(os.fsencode(path), os.fsencode(target)):
        result.add(Found(root, path, LINK, 0o777, 0, 0, target=target))
    else:
        result.skip(root, path, "a link that leaves the workspace")


def _walk(result: Scan, root: int, top: int, prefix: str) -> None:
    """Everything below a descriptor, which is closed."""
    stack = [(top, prefix, _names(top))]
    base = prefix.count("/")
    try:
        while stack:
            directory, here, names = stack[-1]
            if not names:
                os.close(stack.pop()[0])
                continue
            name = names.pop()
            if not _add(result, root, directory, name, here):
                continue
            if len(stack) + base >= result.bounds.depth:
                raise RequestTooLarge(f"directories are nested deeper than {result.bounds.depth}: {here[:100]!r}…")
            try:
                deeper = os.open(name, _DIRECTORY, dir_fd=directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                result.skip(root, here + name, f"what is in it cannot be listed: {os.strerror(error.errno or 0)}")
                continue
            stack.append((deeper, here + name + "/", _names(deeper)))
    finally:
        for descriptor, _, _ in stack:
            os.close(descriptor)


def _names(directory: int) -> list[str]:
    return sorted(os.listdir(directory), reverse=True)
