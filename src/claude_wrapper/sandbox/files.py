"""File access of the server inside directories that a tenant controls.

A tenant may put a link, a FIFO or a directory that changes under the server's hands anywhere in its workspace. So paths
are resolved by the kernel with `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)`, or, where that
call is missing, component by component with `O_NOFOLLOW` on directory descriptors; never as a string.

Relative paths use `/`, must not be empty, absolute or hold `..` or NUL. All functions block: call them in a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from claude_wrapper.errors import InvalidRequest, NotFound, RequestTooLarge
from claude_wrapper.sandbox import syscalls

_RESOLVE = 0x08 | 0x04 | 0x02  # BENEATH, NO_SYMLINKS, NO_MAGICLINKS (linux/openat2.h)
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # NONBLOCK: a FIFO must not hold the server
_DIRECTORY = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY
_MAX_DEPTH = 64  # descriptors held open at once; deeper trees are cut off and worked on from the top
_TEMPORARY = ".claude-wrapper."


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing found below a root."""

    path: str
    """Relative to the root, `/`-separated."""
    kind: str
    """`file`, `directory`, `link` or `other` (FIFO, socket, device)."""
    size: int
    mtime_ns: int
    mode: int
    """Permission bits."""
    target: str | None = None
    """What a link says; never followed."""


def parts_of(relpath: str) -> tuple[str, ...]:
    """The components of a relative path. Raises InvalidRequest for one that could leave its root."""
    parts = tuple(part for part in relpath.split("/") if part not in {"", "."})
    if not parts or relpath.startswith("/") or ".." in parts or "\0" in relpath or len(relpath) > 4096:
        raise InvalidRequest("must be a relative path without `..` below the workspace", field="path")
    return parts


@functools.cache
def has_openat2() -> bool:
    """Whether this kernel has openat2 and lets the server use it."""
    root = os.open("/", _DIRECTORY)
    try:
        os.close(_openat2(root, "proc", _DIRECTORY))
    except OSError as error:
        # A container's system-call filter answers EPERM for a call that it does not know.
        return error.errno not in {errno.ENOSYS, errno.EPERM}
    finally:
        os.close(root)
    return True


def _openat2(directory: int, relpath: str, flags: int, mode: int = 0) -> int:
    how = ctypes.create_string_buffer(struct.pack("=QQQ", flags, mode, _RESOLVE), 24)
    return syscalls.call(syscalls.X86_64["openat2"], directory, os.fsencode(relpath) + b"\0", how, 24)


def _walk_open(directory: int, parts: tuple[str, ...], flags: int) -> int:
    here = os.dup(directory)
    try:
        for part in parts[:-1]:
            deeper = os.open(part, _DIRECTORY, dir_fd=here)
            os.close(here)
            here = deeper
        return os.open(parts[-1], flags | os.O_NOFOLLOW, dir_fd=here)
    finally:
        os.close(here)


def open_beneath(root: Path, relpath: str, flags: int = _READ) -> int:
    """A descriptor of what is at `relpath` below `root`; no link on the way is followed.

    Raises NotFound when there is nothing, InvalidRequest when the path leaves the root, crosses a link or is closed.
    """
    parts = parts_of(relpath)
    top = os.open(root, _DIRECTORY)
    try:
        if has_openat2():
            return _openat2(top, "/".join(parts), flags | os.O_CLOEXEC)
        return _walk_open(top, parts, flags | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"no such file in the workspace: {relpath}") from None
    except OSError as error:
        reason = {
            errno.ELOOP: "is a link or passes through one",
            errno.EXDEV: "leaves the workspace",
            errno.ENOTDIR: "passes through something that is not a directory",
            errno.ENXIO: "is a socket",
        }.get(error.errno or 0, os.strerror(error.errno or 0))
        raise InvalidRequest(f"{relpath} {reason}", field="path") from error
    finally:
        os.close(top)


def read_beneath(root: Path, relpath: str, max_bytes: int) -> bytes:
    """The content of a regular file. Raises NotFound, InvalidRequest (not a regular file), RequestTooLarge."""
    descriptor = open_beneath(root, relpath)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidRequest(f"{relpath} is not a regular file", field="path")
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(max_bytes + 1)  # the file may grow while it is read
    if len(content) > max_bytes:
        raise RequestTooLarge(f"{relpath} is larger than {max_bytes} bytes")
    return content


def write_beneath(root: Path, relpath: str, content: bytes, *, mode: int = 0o600) -> None:
    """Write a file, replacing what is there in one step; missing directories are made (0700).

    What is made belongs to the owner of `root`, so that the tenant can use it. Raises InvalidRequest.
    """
    parts = parts_of(relpath)
    top = os.open(root, _DIRECTORY)
    try:
        owner = os.fstat(top)
        here = _make_directories(top, parts[:-1], owner)
        try:
            _replace(here, parts[-1], content, mode, owner)
        finally:
            os.close(here)
    except OSError as error:
        raise InvalidRequest(f"{relpath}: {os.strerror(error.errno or 0)}", field="path") from error
    finally:
        os.close(top)


def _make_directories(top: int, parts: tuple[str, ...], owner: os.stat_result) -> int:
    here = os.dup(top)
    for part in parts:
        try:
            made = True
            os.mkdir(part, 0o700, dir_fd=here)
        except FileExistsError:
            made = False
        try:
            deeper = os.open(part, _DIRECTORY, dir_fd=here)
        finally:
            os.close(here)
        here = deeper
        if made:
            _give(here, owner)
    return here


def _replace(directory: int, name: str, content: bytes, mode: int, owner: os.stat_result) -> None:
    temporary = f"{_TEMPORARY}{os.urandom(8).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, mode, dir_fd=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(descriptor, mode)
            _give(descriptor, owner)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise


def _give(descriptor: int, owner: os.stat_result) -> None:
    if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def walk_beneath(root: Path, *, max_entries: int, max_depth: int = _MAX_DEPTH, below: str = "") -> Iterator[Entry]:
    """Everything below `root`, directories before what is in them, names sorted; links are told, not followed.

    `below` names a directory of it to begin at; paths are relative to that one. Raises RequestTooLarge after
    `max_entries` entries or below `max_depth` directories, and for `below` as `open_beneath` does.
    """
    top = open_beneath(root, below, _DIRECTORY) if below else os.open(root, _DIRECTORY)
    seen = 0
    stack: list[tuple[int, str, list[str]]] = [(top, "", _names(top))]
    try:
        while stack:
            directory, prefix, names = stack[-1]
            if not names:
                os.close(stack.pop()[0])
                continue
            name = names.pop()
            entry = _entry(directory, name, prefix)
            if entry is None:
                continue
            seen += 1
            if seen > max_entries:
                raise RequestTooLarge(f"more than {max_entries} files")
            yield entry
            if entry.kind == "directory":
                if len(stack) >= max_depth:
                    raise RequestTooLarge(f"directories nested deeper than {max_depth}")
                with contextlib.suppress(OSError):  # it went away or became something else in the meantime
                    deeper = os.open(name, _DIRECTORY, dir_fd=directory)
                    stack.append((deeper, entry.path + "/", _names(deeper)))
    finally:
        for descriptor, _, _ in stack:
            os.close(descriptor)


def _names(directory: int) -> list[str]:
    return sorted(os.listdir(directory), reverse=True)


def _entry(directory: int, name: str, prefix: str) -> Entry | None:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        target = os.readlink(name, dir_fd=directory) if stat.S_ISLNK(found.st_mode) else None
    except OSError:
        return None
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
    kind = kinds.get(stat.S_IFMT(found.st_mode), "other")
    return Entry(prefix + name, kind, found.st_size, found.st_mtime_ns, stat.S_IMODE(found.st_mode), target)


def remove_tree(path: Path) -> None:
    """Remove a directory and all below it. Links are removed, never followed; depth and name count do not matter.

    Raises FileNotFoundError when there is nothing, OSError for what cannot be removed.
    """
    parent = os.open(path.parent, _DIRECTORY & ~os.O_NOFOLLOW)
    try:
        found = os.stat(path.name, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode):
            os.unlink(path.name, dir_fd=parent)
            return
        top = _open_for_removal(path.name, parent)
        try:
            _empty(top)
        finally:
            os.close(top)
        os.rmdir(path.name, dir_fd=parent)
    finally:
        os.close(parent)


def empty_tree(path: Path) -> None:
    """Remove everything below a directory and keep the directory itself: a scrub between two users of a process."""
    top = os.open(path, _DIRECTORY)
    try:
        _empty(top)
    finally:
        os.close(top)


def _open_for_removal(name: str, directory: int) -> int:
    try:
        return os.open(name, _DIRECTORY, dir_fd=directory)
    except PermissionError:
        # Its owner closed it (chmod 000). O_PATH pins the very directory, so the mode of a link's target is safe.
        pinned = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        try:
            os.chmod(f"/proc/self/fd/{pinned}", 0o700)  # noqa: PTH101 - fchmod refuses O_PATH
            return os.open(f"/proc/self/fd/{pinned}", _DIRECTORY & ~os.O_NOFOLLOW)
        finally:
            os.close(pinned)


def _empty(top: int) -> None:
    """Empty the directory behind a descriptor, holding at most `_MAX_DEPTH` descriptors.

    A directory that is nested deeper is renamed to the top and emptied from there.
    """
    stack: list[tuple[int, str, list[str]]] = [(top, "", _names(top))]
    try:
        while stack:
            directory, name, names = stack[-1]
            if not names:
                stack.pop()
                if not stack:
                    names = _names(top)  # what was lifted, and what was made in the meantime
                    if names:
                        stack.append((top, "", names))
                    continue
                os.close(directory)
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(name, dir_fd=stack[-1][0])
                continue
            child = names.pop()
            if not _unlink(child, directory):
                if len(stack) >= _MAX_DEPTH:
                    lifted = f"{_TEMPORARY}{os.urandom(8).hex()}"
                    os.rename(child, lifted, src_dir_fd=directory, dst_dir_fd=top)
                else:
                    deeper = _open_for_removal(child, directory)
                    stack.append((deeper, child, _names(deeper)))
    finally:
        for descriptor, _, _ in stack[1:]:
            os.close(descriptor)


def _unlink(name: str, directory: int) -> bool:
    """Remove anything but a directory; returns False for a directory."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return True
    except PermissionError as error:
        if error.errno == errno.EACCES:  # the directory that holds it was closed by its owner
            os.fchmod(directory, 0o700)
            return _unlink_once(name, directory)
        return False  # EPERM: some file systems answer so for a directory
    except IsADirectoryError:
        return False
    return True


def _unlink_once(name: str, directory: int) -> bool:
    try:
        os.unlink(name, dir_fd=directory)
    except IsADirectoryError:
        return False
    return True
