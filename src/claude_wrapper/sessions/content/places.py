"""Where a session's things lie: the paths that the API names, the slot's directories behind them, what the agent sees.

`/mnt` is a hidden directory of the workspace (`work/.mnt`), so that whatever keeps the workspace keeps it too, and
`/workspace` is the workspace itself. Where a sandbox cannot show directories elsewhere, both lie at the workspace's own
path and the agent is told so. Pure, but for `make_mount_root`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sandbox.files import remove_tree
from claude_wrapper.sessions.content.beside import Ran

HIDDEN: Final = ".mnt"
MNT: Final = "/mnt"
WORKSPACE: Final = "/workspace"
UPLOADS: Final = "/mnt/session/uploads"
OUTPUTS: Final = "/mnt/session/outputs"
MEMORY: Final = "/mnt/memory"
SKILLS: Final = "/mnt/skills"
_OWN: Final = "/mnt/.server"
_ROOTS: Final = (WORKSPACE, "/work", MNT)
_RESERVED: Final = (MEMORY, SKILLS, _OWN)
_MAX_DEPTH: Final = 32


def relative(path: str) -> str:
    """A path of the API as one below the slot's `work`; empty for the workspace itself.

    Raises InvalidRequest for a path that is not below /workspace or /mnt.
    """
    for root in _ROOTS:
        if path == root or path.startswith(f"{root}/"):
            inner = path[len(root) + 1 :]
            return f"{HIDDEN}/{inner}".rstrip("/") if root == MNT else inner
    raise InvalidRequest("must be below /workspace or /mnt: nothing else can be written in a sandbox", field="path")


def check_mount_path(path: str, field: str) -> str:
    """A place for a file or repository that a caller named. Raises InvalidRequest naming the field."""
    parts = path.split("/")[1:]
    if not path.startswith("/") or any(part in {"", ".", ".."} for part in parts) or "\x00" in path:
        raise InvalidRequest("must be an absolute path without empty parts, . and ..", field=field)
    if len(parts) > _MAX_DEPTH or any(len(part.encode()) > 255 for part in parts):
        raise InvalidRequest(f"has at most {_MAX_DEPTH} parts of at most 255 bytes", field=field)
    if not any(path.startswith(f"{root}/") for root in _ROOTS):
        raise InvalidRequest("must be below /workspace or /mnt: nothing else can be mounted to", field=field)
    hidden = any(path == f"{root}/{HIDDEN}" or path.startswith(f"{root}/{HIDDEN}/") for root in _ROOTS)
    if hidden or any(path == one or path.startswith(f"{one}/") for one in _RESERVED):
        raise InvalidRequest("is a place that the server fills itself", field=field)
    return path


@dataclass(frozen=True, slots=True)
class Seen:
    """How an agent sees the places of its slot."""

    work: PurePosixPath
    bound: bool
    """Whether /mnt and /workspace exist for it."""

    def path(self, path: str) -> str:
        """The path that the agent has to use for one of the API's."""
        return path if self.bound else str(self.work / relative(path))


@dataclass(frozen=True, slots=True)
class WorkDir:
    """The workspace of a slot: its directory on the host, its owner there, and how the agent sees it."""

    work: Path
    uid: int | None
    seen: Seen
    run: Callable[[str, Mapping[str, str], float], Awaitable[Ran]] | None = None
    """Runs a script beside the agent, in a sandbox like its own: (script, environment to add, seconds)."""


def binds(
    work: Path, inside: PurePosixPath
) -> tuple[tuple[tuple[Path, PurePosixPath], ...], tuple[PurePosixPath, ...]]:
    """What a sandbox that can bind is asked for: (directory, path inside) pairs, and the paths to be masked.

    The hidden directory is masked where it would show in the workspace: its name cannot be replaced from inside.
    """
    shown = ((work, PurePosixPath(WORKSPACE)), (work / HIDDEN, PurePosixPath(MNT)))
    return shown, (inside / HIDDEN, PurePosixPath(WORKSPACE) / HIDDEN)


def make_mount_root(work: Path, uid: int | None) -> None:
    """Make the standing directories of a slot in which nothing runs yet; a link in their place is removed.

    A workspace that was kept comes from a tenant: what is bound must be a directory of it and nothing that a name in it
    leads to.
    """
    for path in (MNT, "/mnt/session", UPLOADS, OUTPUTS, MEMORY, SKILLS):
        place = work / relative(path)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(place.lstat().st_mode):
                remove_tree(place)
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o700)
            if uid is not None:
                os.chown(place, uid, uid, follow_symlinks=False)
