"""The CLI's own transcript of a conversation, in a home that a tenant controls. Blocks: call it in a thread.

It lies at `.claude/projects/<working directory with every other character than letters and digits as ->/<uuid>.jsonl`. The
working directory is always the same inside of `bwrap` and another one for every slot elsewhere, so a home that moves to
another slot has its transcript put where the new process looks for it. Measured with CLI 2.1.327: the lines of a turn
are written before its `result` is printed, and an assistant line carries the `uuid` of the frame that told it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.ids import is_uuid
from claude_wrapper.sandbox.files import open_beneath

_PROJECTS: Final = ".claude/projects"
_DIRECTORY: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_TAIL: Final = 4 << 20
"""Where the last line is looked for. A line is at most as long as the largest model message."""


def has_transcript(home: Path, uuid: str, *, last: str | None = None) -> bool:
    """Whether the home holds the transcript with this id; with `last`, whether it has this line near its end."""
    with _transcript(home, uuid) as found:
        if found is None or last is None:
            return found is not None
        file = _open(*found)
        if file is None:
            return False
        with file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL))
            return last.encode() in file.read(_TAIL)


def put_transcript(home: Path, uuid: str, target: Path) -> bool:
    """Move the transcript (and the directory of its name) to where the CLI looks for it; False when there is none.

    `target` is the path that it is to have, below the home. Nothing runs in the home meanwhile.
    """
    project = target.parent.name
    with _transcript(home, uuid) as found:
        if found is None:
            return False
        directory, name = found
        with _projects(home) as projects:
            if projects is None:
                return False
            owner = os.fstat(directory)
            with contextlib.suppress(FileExistsError):
                os.mkdir(project, 0o700, dir_fd=projects)
            there = os.open(project, _DIRECTORY, dir_fd=projects)
            try:
                if os.path.samestat(os.fstat(there), owner):
                    return True
                if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(there, owner.st_uid, owner.st_gid)
                os.rename(name, name, src_dir_fd=directory, dst_dir_fd=there)
                with contextlib.suppress(OSError):  # what belongs to it, where there is such a thing
                    os.rename(uuid, uuid, src_dir_fd=directory, dst_dir_fd=there)
            finally:
                os.close(there)
    return True


def remove_transcript(home: Path, uuid: str) -> None:
    """Remove the transcript, if it is there; what lies in the directory of its name may be spoken of elsewhere and stays."""
    with _transcript(home, uuid) as found, contextlib.suppress(OSError):
        if found is not None:
            directory, name = found
            os.unlink(name, dir_fd=directory)


def read_transcript(home: Path, uuid: str, max_bytes: int) -> bytes | None:
    """The transcript's lines; None when there is none, or when it is larger."""
    with _transcript(home, uuid) as found:
        if found is None:
            return None
        file = _open(*found)
        if file is None:
            return None
        with file:
            content = file.read(max_bytes + 1)
    return content if len(content) <= max_bytes else None


@contextlib.contextmanager
def _projects(home: Path) -> Iterator[int | None]:
    try:
        descriptor = open_beneath(home, _PROJECTS, _DIRECTORY)
    except (NotFound, InvalidRequest, OSError):
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _transcript(home: Path, uuid: str) -> Iterator[tuple[int, str] | None]:
    """The directory that holds the transcript, and its name there. No link is followed."""
    if not is_uuid(uuid):
        yield None  # a name with a slash in it would lead through links
        return
    name = f"{uuid}.jsonl"
    with _projects(home) as projects:
        for project in _names(projects) if projects is not None else ():
            try:
                directory = os.open(project, _DIRECTORY, dir_fd=projects)
            except OSError:
                continue  # not a directory
            # Closed before the next one is opened: there may be more of them than the server may hold open.
            try:
                if _is_file(name, directory):
                    yield directory, name
                    return
            finally:
                os.close(directory)
        yield None


def _open(directory: int, name: str) -> BinaryIO | None:
    """The file, to be read; None when it cannot be."""
    try:
        return os.fdopen(os.open(name, _READ, dir_fd=directory), "rb")
    except OSError:
        return None


def _is_file(name: str, directory: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _names(directory: int) -> list[str]:
    return sorted(os.listdir(directory))
