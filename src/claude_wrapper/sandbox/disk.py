"""What a slot's home and workspace take on the disk, measured: for slots without a file system of their own.

The caller stops an agent that is over its quota; between two measurements it can write as fast as the disk takes it.
`loopdisk` gives a slot a limit that the kernel enforces. Blocks: call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from claude_wrapper.sandbox.port import Limits, SlotDirs

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
