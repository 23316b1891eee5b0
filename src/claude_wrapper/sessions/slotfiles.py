"""Home and workspace between two processes of one conversation: kept when the one ends, given to the next.

Both are moved, never copied, with one exception: files that came from a snapshot are put onto the disk image of a slot
that has one. Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from claude_wrapper.sandbox import loopdisk
from claude_wrapper.sandbox.files import remove_tree
from claude_wrapper.sandbox.port import Sandbox, SlotDirs


def kept_dirs(kept: Path) -> SlotDirs:
    """The directories below one where files are kept; a process never runs there."""
    return SlotDirs(root=kept, home=kept / "home", work=kept / "work", run=kept)


def keep(dirs: SlotDirs, kept: Path) -> None:
    """Move home and workspace of a stopped slot to `kept`; what is there already stays."""
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = kept_dirs(kept)
    disk = loopdisk.of(dirs)
    if disk is not None:
        for directory in (target.home, target.work):
            directory.mkdir(mode=0o700, exist_ok=True)
        disk.move_to(target)
        return
    for source, there in ((dirs.home, target.home), (dirs.work, target.work)):
        if source.exists() and not there.exists():
            source.rename(there)


def adopt(kept: Path, dirs: SlotDirs, uid: int | None) -> None:
    """Move kept files into a fresh slot, and give them to its uid. Raises SandboxUnavailable, OSError."""
    source = kept_dirs(kept)
    disk = loopdisk.of(source)
    if disk is not None:
        own = loopdisk.of(dirs)
        if own is not None:
            own.release()
        disk.move_to(dirs)
    else:
        for there, target in ((source.home, dirs.home), (source.work, dirs.work)):
            if there.exists():
                _move(there, target)
    if uid is not None:
        for target in (dirs.home, dirs.work):
            _give(target, uid)
    remove_tree(kept)


def _move(source: Path, target: Path) -> None:
    if os.path.ismount(target):
        # Nobody but the server reaches what is kept, so nothing changes under the copy; links are copied themselves.
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        return
    target.rmdir()
    source.rename(target)


def _give(root: Path, uid: int) -> None:
    """Make a kept tree the new slot's. Nothing runs in it, and links are given themselves, never followed."""
    os.chown(root, uid, uid, follow_symlinks=False)
    for _, directories, files, descriptor in os.fwalk(root, follow_symlinks=False):
        for name in (*directories, *files):
            os.chown(name, uid, uid, dir_fd=descriptor, follow_symlinks=False)


def remove(sandbox: Sandbox, dirs: SlotDirs) -> None:
    """Remove a slot's directories and the disk that it may have."""
    disk = loopdisk.of(dirs)
    if disk is not None:
        disk.release()
    sandbox.remove_dirs(dirs)


def discard(kept: Path) -> None:
    """Remove what was kept. Raises FileNotFoundError when there is nothing."""
    disk = loopdisk.of(kept_dirs(kept))
    if disk is not None:
        disk.release()
    remove_tree(kept)
