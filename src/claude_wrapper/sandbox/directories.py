"""A slot's directories on the host: who owns them, who may pass, how they go.

With an own uid the slot's root is `0710 server:tenant`: the tenant may pass through it to what is bound into its
sandbox, other tenants may not, and nobody but the server can list or change it. home/, work/ and run/ belong to the
tenant, 0700; the broker gives its socket to the owner of run/, which every real sandbox shows read-only.
Every directory above must let the tenant's uid pass (mode x), which `unreachable` checks.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox.files import remove_tree
from claude_wrapper.sandbox.port import SlotDirs


def unreachable(path: Path, uid: int, gid: int | None = None) -> Path | None:
    """The first directory above `path` that this uid may not pass through, or None. Links are resolved first."""
    gid = uid if gid is None else gid
    for directory in reversed(path.resolve().parents):
        found = directory.stat()
        if found.st_uid == uid:
            allowed = found.st_mode & stat.S_IXUSR
        elif found.st_gid == gid:
            allowed = found.st_mode & stat.S_IXGRP
        else:
            allowed = found.st_mode & stat.S_IXOTH
        if not allowed:
            return directory
    return None


def create(root: Path, uid: int | None) -> SlotDirs:
    """Make `root` and home/ work/ run/ below it. Parents that are missing are made 0711.

    Raises FileExistsError when `root` exists, SandboxUnavailable when `uid` cannot reach it.
    """
    for parent in reversed([directory for directory in root.parents if not directory.exists()]):
        parent.mkdir(mode=0o711, exist_ok=True)
        parent.chmod(0o711)  # the umask must not close it
    dirs = SlotDirs(root=root, home=root / "home", work=root / "work", run=root / "run")
    root.mkdir(mode=0o700)
    try:
        for directory in (dirs.home, dirs.work, dirs.run):
            directory.mkdir(mode=0o700)
        if uid is not None:
            _give_to(dirs, uid)
    except BaseException:
        remove_tree(root)
        raise
    return dirs


def _give_to(dirs: SlotDirs, uid: int) -> None:
    closed = unreachable(dirs.root, uid)
    if closed is not None:
        raise SandboxUnavailable(
            f"{closed} is closed to other users, so a process with uid {uid} cannot reach {dirs.root}: "
            f"allow passing through with `chmod o+x {closed}` or put the data directory elsewhere"
        )
    for directory in (dirs.home, dirs.work, dirs.run):
        os.chown(directory, uid, uid)
    os.chown(dirs.root, -1, uid)
    dirs.root.chmod(0o710)


def remove(dirs: SlotDirs) -> None:
    """Remove the slot's directories with everything in them; a link is removed, never followed."""
    with contextlib.suppress(FileNotFoundError):
        remove_tree(dirs.root)
