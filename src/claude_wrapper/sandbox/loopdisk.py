"""A file system of its own for a slot's home and workspace: the only limit of bytes and files that holds in general.

An ext4 image below the slot's root is mounted through a loop device; home/ and work/ are bind mounts of two directories
of it. Project quotas would need ext4 or XFS set up for them. Needs root, loop devices and e2fsprogs.

Mounts would outlive a server that is killed. So the server takes a mount namespace of its own first (`private_mounts`):
the kernel undoes the mounts when the server and its processes have gone, and frees the loop devices with them.

Everything here blocks (mkfs and mount take tens of milliseconds): call it in a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import files
from claude_wrapper.sandbox.commands import SYSTEM_PATH
from claude_wrapper.sandbox.port import Limits, SlotDirs

IMAGE: Final = "disk.img"
_MOUNTED: Final = "disk"
_SECONDS: Final = 20.0
_BUSY_SECONDS: Final = 5.0
"""How long a mount may still be in use after the slot's last process has gone."""
_LEAST: Final = 8 << 20
_CLONE_NEWNS: Final = 0x00020000
_MS_REC: Final = 0x4000
_MS_SLAVE: Final = 0x80000


@dataclass(frozen=True, slots=True)
class LoopDisk:
    """An image that is mounted over a slot's home and work."""

    dirs: SlotDirs

    @property
    def image(self) -> Path:
        return self.dirs.root / IMAGE

    @property
    def mount_point(self) -> Path:
        return self.dirs.root / _MOUNTED

    def release(self) -> None:
        """Unmount and delete it; must come before the slot's directories are removed. Safe to call twice."""
        self._unmount(lazily=True)
        self.image.unlink(missing_ok=True)

    def move_to(self, target: SlotDirs) -> LoopDisk:
        """Mount it over another slot's home and work, which are empty, instead of this one's. The slot's processes must
        be gone. What is on it keeps its owners.

        Raises SandboxUnavailable with the cause; the image is then still below this slot's root.
        """
        self._unmount(lazily=False)
        there = LoopDisk(target)
        self.image.rename(there.image)
        try:
            _mount(there, None)
        except (OSError, SandboxUnavailable) as error:
            there._unmount(lazily=True)
            there.image.rename(self.image)
            raise SandboxUnavailable(f"the disk of {self.dirs.root.name} cannot be mounted again: {error}") from error
        return there

    def _unmount(self, *, lazily: bool) -> None:
        for directory in (self.dirs.home, self.dirs.work, self.mount_point):
            if os.path.ismount(directory):
                _unmount(directory, lazily=lazily)
        with contextlib.suppress(FileNotFoundError):
            self.mount_point.rmdir()


def create(dirs: SlotDirs, limits: Limits, uid: int | None) -> LoopDisk:
    """Put home and workspace of a fresh slot onto a file system of their own.

    Raises SandboxUnavailable with the cause; the slot is then as it was.
    """
    if limits.disk_bytes is None:
        raise SandboxUnavailable("no disk size is set")
    disk = LoopDisk(dirs)
    try:
        _make_image(disk.image, limits.disk_bytes, limits.disk_inodes)
        _mount(disk, uid)
    except (OSError, SandboxUnavailable) as error:
        disk.release()
        raise SandboxUnavailable(f"no file system of its own for {dirs.root.name}: {error}") from error
    return disk


def of(dirs: SlotDirs) -> LoopDisk | None:
    """The slot's disk, if it has one of its own."""
    disk = LoopDisk(dirs)
    return disk if disk.image.exists() else None


def _make_image(image: Path, size: int, inodes: int | None) -> None:
    with image.open("xb") as file:
        file.truncate(max(size, _LEAST))
    image.chmod(0o600)
    count = ["-N", str(inodes)] if inodes else []
    options = "lazy_itable_init=1,lazy_journal_init=1"
    _run("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", *count, "-E", options, str(image))


def _mount(disk: LoopDisk, uid: int | None) -> None:
    disk.mount_point.mkdir(mode=0o711)
    _run("mount", "-o", "loop,nodev,nosuid", str(disk.image), str(disk.mount_point))
    disk.mount_point.chmod(0o711)
    for directory in (disk.dirs.home, disk.dirs.work):
        on_disk = disk.mount_point / directory.name
        with contextlib.suppress(FileExistsError):
            on_disk.mkdir(mode=0o700)
            if uid is not None:
                os.chown(on_disk, uid, uid)
        _run("mount", "--bind", str(on_disk), str(directory))


def _unmount(directory: Path, *, lazily: bool) -> None:
    if lazily:
        _run("umount", "--lazy", str(directory))
        return None
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return _run("umount", str(directory))
        except SandboxUnavailable:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)


def unmount_below(directory: Path) -> None:
    """Undo what is still mounted below `directory`: disks that were kept, and what a server left there that was killed
    and had no mount namespace of its own."""
    prefix = f"{directory.resolve()}/"
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    for point in sorted((one for one in points if one.startswith(prefix)), reverse=True):
        _run("umount", "--lazy", point)


def private_mounts() -> None:
    """Give the calling thread, and all threads and processes that it starts, a mount namespace of its own.

    Call it before any thread is started. Mounts of the host still arrive in it; its own stay inside. Raises
    SandboxUnavailable.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None):
        raise SandboxUnavailable(f"no mount namespace of its own: {os.strerror(ctypes.get_errno())}")


def why_not() -> str | None:
    """Why this host cannot do it; None when it can. Tried for real, with a small image."""
    if os.geteuid() != 0:
        return "the server is not root"
    scratch = Path(tempfile.mkdtemp(prefix="claude-wrapper-probe-"))
    image, mounted = scratch / IMAGE, scratch / _MOUNTED
    try:
        _make_image(image, _LEAST, None)
        mounted.mkdir()
        _run("mount", "-o", "loop,nodev,nosuid", str(image), str(mounted))
        _unmount(mounted, lazily=False)
    except (OSError, SandboxUnavailable) as error:
        return str(error)
    finally:
        files.remove_tree(scratch)
    return None


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
