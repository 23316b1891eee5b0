"""The stages of a launch as pieces of argv, and the descriptors that carry data to them.

A stage ends by exec-ing the next, so that the spawned pid stays the same down to bubblewrap or the CLI.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from claude_wrapper.sandbox.port import Limits

# `echo` is a builtin: pid 0 means the shell itself. Exit status 125 tells a failed stage from a failed CLI.
_JOIN = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 125; shift; done; shift; exec "$@"'


@dataclass(frozen=True, slots=True)
class Tools:
    """Programs of the host that the stages use; None when missing."""

    shell: Path | None
    setpriv: Path | None
    prlimit: Path | None
    bwrap: Path | None


def find_tools(path: str) -> Tools:
    """Look the programs up in this PATH-like list of directories."""

    def find(name: str) -> Path | None:
        found = shutil.which(name, path=path)
        return Path(found) if found else None

    return Tools(shell=find("sh"), setpriv=find("setpriv"), prlimit=find("prlimit"), bwrap=find("bwrap"))


SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where the tools are looked for: never the caller's PATH."""


def join_cgroups(shell: Path, procs: Sequence[Path]) -> tuple[str, ...]:
    """Put itself into these control groups (`cgroup.procs` files), as the server's user."""
    return (str(shell), "-c", _JOIN, "sh", *map(str, procs), "--") if procs else ()


def become(setpriv: Path, uid: int) -> tuple[str, ...]:
    """Become uid and group `uid`, without other groups, capabilities, or a way to get them back."""
    return (
        *(str(setpriv), f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all"),
        *("--bounding-set=-all", "--no-new-privs", "--"),
    )


def bounded(prlimit: Path, limits: Limits) -> tuple[str, ...]:
    """Set the resource limits, hard and soft. `nproc` counts per user *namespace* when set inside one (Linux 5.14)."""
    return (
        *(str(prlimit), "--core=0", f"--nofile={limits.open_files}", f"--nproc={limits.processes}"),
        *(f"--fsize={limits.file_bytes}", "--"),
    )


def data_fd(name: str, content: bytes) -> int:
    """A descriptor, positioned at its start, from which a stage reads `content`; not a file on any disk."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
