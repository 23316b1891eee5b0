"""Writing into and reading from a slot's workspace, whose owner may change it at the same time.

Nothing here follows a link (`sandbox.files`), everything that is made belongs to the owner of the workspace, and all of
it blocks: call it in a thread. Raises InvalidRequest where a link or a file stands in the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from claude_wrapper.errors import InvalidRequest, NotFound, RequestTooLarge
from claude_wrapper.sandbox.files import (
    Entry,
    open_beneath,
    parts_of,
    read_beneath,
    remove_tree,
    walk_beneath,
    write_beneath,
)

_DIRECTORY: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY
_EMPTY: Final = ".claude-wrapper.directory"


@dataclass(slots=True)
class Incoming:
    """A file on its way into the workspace: write to `file`, then `finish` or `abandon`."""

    root: Path
    name: str
    file: BinaryIO
    _directory: int
    _temporary: str

    def finish(self, *, mode: int = 0o644) -> None:
        """Put it in its place in one step, over whatever file is there. Raises InvalidRequest."""
        try:
            owner = self.root.stat()
            self.file.flush()
            os.fchmod(self.file.fileno(), mode)
            if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(self.file.fileno(), owner.st_uid, owner.st_gid)
            os.rename(self._temporary, self.name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError as error:
            self.abandon()
            raise InvalidRequest(f"{self.name}: {os.strerror(error.errno or 0)}") from error
        self._close()

    def abandon(self) -> None:
        """Leave nothing behind. Safe to call after `finish`."""
        if self._directory >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._directory)
            self._close()

    def _close(self) -> None:
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1
            with contextlib.suppress(OSError):  # what a full disk did not take is tried once more, and given up
                self.file.close()


def begin(root: Path, path: str) -> Incoming:
    """Open a new file for `path` below `root`; directories on the way are made."""
    head, name = _split(path)
    directory = open_directory(root, head)
    temporary = f".claude-wrapper.{os.urandom(8).hex()}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.fdopen(os.open(temporary, flags, 0o600, dir_fd=directory), "wb")
    except OSError as error:
        os.close(directory)
        raise InvalidRequest(f"{path}: {os.strerror(error.errno or 0)}") from error
    return Incoming(root, name, file, directory, temporary)


def _split(path: str) -> tuple[str, str]:
    """The directory and the last name of a path that stays below its root: a note of the agent's may say anything."""
    *head, name = parts_of(path)
    return "/".join(head), name


def open_directory(root: Path, path: str) -> int:
    """A descriptor of a directory below `root` (empty: of the root), which is made if it is missing."""
    if not path:
        return os.open(root, _DIRECTORY)
    with contextlib.suppress(NotFound):
        return open_beneath(root, path, _DIRECTORY)
    write_beneath(root, f"{path}/{_EMPTY}", b"")
    directory = open_beneath(root, path, _DIRECTORY)
    with contextlib.suppress(OSError):
        os.unlink(_EMPTY, dir_fd=directory)
    return directory


def make_directory(root: Path, path: str) -> None:
    """Make a directory and those above it."""
    os.close(open_directory(root, path))


def move_in(source: Path, root: Path, path: str) -> None:
    """Move a directory of the server's, on the same file system, to a free place (or an empty directory) below `root`."""
    head, name = _split(path)
    directory = open_directory(root, head)
    try:
        os.rename(source, name, dst_dir_fd=directory)
    except OSError as error:
        raise InvalidRequest(f"{path}: {os.strerror(error.errno or 0)}") from error
    finally:
        os.close(directory)


@contextlib.contextmanager
def _beside(root: Path, path: str) -> Iterator[tuple[int | None, str]]:
    """The directory that `path` is in and its name there; None if there is no such directory below `root`."""
    head, name = _split(path)
    try:
        directory = open_beneath(root, head, _DIRECTORY) if head else os.open(root, _DIRECTORY)
    except (NotFound, InvalidRequest):
        yield None, name
        return
    try:
        yield directory, name
    finally:
        os.close(directory)


def exists(root: Path, path: str) -> bool:
    """Whether anything at all is at `path`, be it a link."""
    with _beside(root, path) as (directory, name):
        if directory is None:
            return False
        try:
            os.stat(name, dir_fd=directory, follow_symlinks=False)
        except OSError:
            return False
        return True


def remove(root: Path, path: str) -> None:
    """Remove what is at `path`, with all below it if it is a directory; nothing there is no error."""
    with _beside(root, path) as (directory, name):
        if directory is None:
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                    # The directory is held by its descriptor: its path cannot lead elsewhere.
                    remove_tree(Path(f"/proc/self/fd/{directory}/{name}"))
                else:
                    os.unlink(name, dir_fd=directory)
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be removed: {os.strerror(error.errno or 0)}") from error


def write(root: Path, path: str, content: bytes, *, mode: int = 0o644) -> None:
    """Write a small file whole."""
    write_beneath(root, path, content, mode=mode)


def read(root: Path, path: str, most: int) -> bytes:
    """A regular file of at most `most` bytes. Raises NotFound, InvalidRequest, RequestTooLarge."""
    return read_beneath(root, path, most)


def entries(root: Path, path: str, *, most: int) -> Iterator[Entry]:
    """Everything below a directory, paths relative to it; nothing when it is missing or no directory.

    Raises RequestTooLarge after `most` entries.
    """
    with contextlib.suppress(NotFound, InvalidRequest):
        yield from walk_beneath(root, max_entries=most, below=path)


def shown(name: str) -> str:
    """A name as it can be told and kept: bytes that are no UTF-8 are replaced. Equal to the name if there are none."""
    return os.fsencode(name).decode(errors="replace")


NOT_UTF8: Final = "its name is not UTF-8"


@dataclass(frozen=True, slots=True)
class Texts:
    """The text files of a directory."""

    found: dict[str, str]
    """Content by path; paths begin with a slash."""
    left_out: dict[str, str]
    """Why, by path: what is no text file within the bounds."""


def texts(root: Path, path: str, *, most: int, bytes_each: int, bytes_all: int) -> Texts:
    """Read a directory of texts. Raises RequestTooLarge when there are too many files."""
    found: dict[str, str] = {}
    left_out: dict[str, str] = {}
    left = bytes_all
    for entry in entries(root, path, most=most):
        name = f"/{shown(entry.path)}"
        if entry.kind == "directory":
            continue
        try:
            if shown(entry.path) != entry.path:
                raise InvalidRequest(NOT_UTF8)
            if entry.kind != "file":
                raise InvalidRequest("is no regular file")
            content = read(root, f"{path}/{entry.path}", min(bytes_each, left))
            found[name] = content.decode()
            left -= len(content)
        except (InvalidRequest, RequestTooLarge, NotFound, UnicodeDecodeError) as error:
            left_out[name] = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
    return Texts(found, left_out)


def digest(text: str) -> str:
    """The hash that memory stores keep of a content."""
    return hashlib.sha256(text.encode()).hexdigest()


def clear_way(root: Path, path: str, *, last: bool) -> None:
    """Remove what keeps a file from being written: anything but a directory on the way to it, a directory in its place."""
    head, name = _split(path)
    try:
        directory = open_beneath(root, head, _DIRECTORY)
    except (NotFound, InvalidRequest):
        return
    try:
        is_directory = stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return
    finally:
        os.close(directory)
    if is_directory == last:
        remove(root, path)
