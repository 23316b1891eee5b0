"""Showing the CLI to uids that cannot reach the place where it is installed (a venv below /root, say)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from claude_wrapper.sandbox import directories


def reachable_cli(cli: Path, directory: Path, uid: int | None) -> Path:
    """The CLI itself when `uid` can reach it, else a hard link (same inode: pages stay shared) or a copy of it.

    `directory` is made 0755 if missing and must be reachable itself; one copy serves all slots. A copy that is out of
    date (size or time differ) is replaced. Raises OSError.
    """
    cli = cli.resolve()
    if uid is None or directories.unreachable(cli, uid) is None:
        return cli
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    directory.chmod(0o755)
    staged = directory / cli.name
    wanted = cli.stat()
    if staged.exists():
        found = staged.stat()
        same_file = (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)
        if same_file or (found.st_size, found.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns):
            return staged
    fresh = directory / f".{cli.name}.{os.getpid()}"
    fresh.unlink(missing_ok=True)
    try:
        fresh.hardlink_to(cli)
    except OSError:  # another file system
        shutil.copy2(cli, fresh)
        fresh.chmod(0o755)
    fresh.replace(staged)
    return staged
