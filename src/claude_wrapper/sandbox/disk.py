"""A limit of size and inodes for a slot's home and workspace.

Where the server is root and the host has loop devices, a slot gets an ext4 file system of its own (`LoopDisk`): nothing
else on Linux holds in general (project quotas need ext4 or XFS set up for them). Elsewhere `usage` measures, and the
caller stops an agent that is over its quota; between two measurements it can write as fast as the disk takes.

Everything here blocks (mkfs and mount take tens of milliseconds): call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import files
from claude_wrapper.sandbox.commands import SYSTEM_PATH
from claude_wrapper.sandbox.port import Limits, SlotDirs

_SECONDS = 20.0
_BLOCK = 512  # st_blocks counts in these


@dataclass(frozen=True, slots=True)
class Usage:
    """What a slot's home and workspace take."""

    disk_bytes: int
    """Allocated, so that a sparse file counts for what it takes."""
    inodes: int

    def over(self, limits: Limits) -> str | None:
        """Which limit is exceeded, in words for the caller, or None."""
        if limits.disk_bytes is not None and self.disk_bytes > limits.disk_bytes:
            return f"the workspace takes {self.disk_bytes} bytes and may take {limits.disk_bytes}"
        if limits.disk_inodes is not None and self.inodes > limits.disk_inodes:
            return f"the workspace holds {self.inodes} files and may hold {limits.disk_inodes}"
        return None


def usage(dirs: SlotDirs, *, stop_after: int | None = None) -> Usage:
    """Measure home and workspace; links are counted, not followed. `stop_after` entries end it early."""
    size = inodes = 0
    seen: set[tuple[int, int]] = set()
    waiting = [dirs.home, dirs.work]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                found = entry.stat(follow_symlinks=False)
                if found.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                    if (found.st_dev, found.st_ino) in seen:
                        continue
                    seen.add((found.st_dev, found.st_ino))
                size += found.st_blocks * _BLOCK
                inodes += 1
                if stop_after is not None and inodes > stop_after:
                    return Usage(size, inodes)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
    return Usage(size, inodes)


@dataclass(frozen=True, slots=True)
class LoopDisk:
    """An ext4 image mounted over a slot's home and work (two directories of one file system)."""

    image: Path
    mount_point: Path

    def remove(self) -> None:
        """Unmount (lazily when something still holds it) and delete the image. Safe to call twice."""
        if os.path.ismount(self.mount_point):
            _run("umount", "--lazy", str(self.mount_point))
        self.image.unlink(missing_ok=True)


def create(dirs: SlotDirs, limits: Limits, uid: int | None) -> LoopDisk:
    """Put home and workspace of a fresh slot onto a file system of their own.

    home/ and work/ become bind mounts of two directories of it. Needs root, loop devices and e2fsprogs.
    Raises SandboxUnavailable with the cause; the slot is then as it was.
    """
    if limits.disk_bytes is None:
        raise SandboxUnavailable("no disk size is set")
    image, mount_point = dirs.root / "disk.img", dirs.root / "disk"
    disk = LoopDisk(image, mount_point)
    owner = f"{uid or os.geteuid()}:{uid or os.getegid()}"
    try:
        with image.open("xb") as file:
            file.truncate(limits.disk_bytes)
        image.chmod(0o600)
        inodes = ["-N", str(limits.disk_inodes)] if limits.disk_inodes else []
        options = f"root_owner={owner},lazy_itable_init=1,lazy_journal_init=1"
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", *inodes, "-E", options, str(image))
        mount_point.mkdir(mode=0o711)
        _run("mount", "-o", "loop,nodev,nosuid", str(image), str(mount_point))
        for directory in (dirs.home, dirs.work):
            on_disk = mount_point / directory.name
            on_disk.mkdir(mode=0o700)
            if uid is not None:
                os.chown(on_disk, uid, uid)
            _run("mount", "--bind", str(on_disk), str(directory))
    except (OSError, SandboxUnavailable) as error:
        release(dirs, disk)
        raise SandboxUnavailable(f"no file system of its own for {dirs.root.name}: {error}") from error
    return disk


def release(dirs: SlotDirs, disk: LoopDisk) -> None:
    """Undo `create`; must come before the slot's directories are removed."""
    for directory in (dirs.home, dirs.work):
        if os.path.ismount(directory):
            _run("umount", "--lazy", str(directory))
    disk.remove()
    with contextlib.suppress(OSError):
        files.empty_tree(disk.mount_point)
        disk.mount_point.rmdir()


def _run(program: str, *arguments: str) -> None:
    found = shutil.which(program, path=SYSTEM_PATH)
    if found is None:
        raise SandboxUnavailable(f"{program} is not installed")
    try:
        done = subprocess.run(
            [found, *arguments],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env={"PATH": SYSTEM_PATH},
        )
    except subprocess.TimeoutExpired as error:
        raise SandboxUnavailable(f"{program} did not end within {_SECONDS:g} s") from error
    if done.returncode != 0:
        raise SandboxUnavailable(f"{program}: {done.stderr.strip() or f'exit status {done.returncode}'}")
