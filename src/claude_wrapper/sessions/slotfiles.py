"""Home and workspace between two processes of one conversation: kept when the one ends, given to the next.

Both are moved, never copied, with one exception: files that came from a snapshot are put onto the disk image of a slot
that has one. The next process is one that is being started, or a spare that waits. Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from claude_wrapper.sandbox import loopdisk
from claude_wrapper.sandbox.files import remove_tree
from claude_wrapper.sandbox.port import Sandbox, SlotDirs
from claude_wrapper.sessions.content import places


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


def move_into(kept: Path, dirs: SlotDirs, uid: int | None) -> None:
    """Move kept files into the slot of a spare, which runs already and sees these very directories: what is in them moves,
    the directories stay. What both have is the kept one's. Not for slots or files on a disk image.

    Raises OSError; the files are then where they were kept.
    """
    source = kept_dirs(kept)
    pairs = [
        (there, target) for there, target in ((source.home, dirs.home), (source.work, dirs.work)) if there.exists()
    ]
    if source.work.exists():
        # They come from a tenant: what the sandbox shows elsewhere must be directories and not links.
        places.make_mount_root(source.work, uid)
    try:
        for there, target in pairs:
            if uid is not None:
                _give(there, uid)
            _merge(there, target)
    except OSError:
        for there, target in pairs:
            _merge(target, there)
        raise
    remove_tree(kept)


def _merge(source: Path, target: Path) -> None:
    """Nobody but the server changes `source`, and nobody but an untouched process `target`; links are moved themselves."""
    with os.scandir(source) as found:
        entries = list(found)
    for entry in entries:
        there, is_directory = target / entry.name, entry.is_dir(follow_symlinks=False)
        taken = there.is_dir() and not there.is_symlink()
        if taken and is_directory:
            _merge(Path(entry.path), there)
            continue
        if taken:
            remove_tree(there)
        elif is_directory:
            there.unlink(missing_ok=True)
        Path(entry.path).rename(there)


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
