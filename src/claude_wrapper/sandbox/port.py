"""The port: what the server asks of a sandbox, and the frozen types that go in and come out.

An adapter (`none`, `restricted`, `bwrap`) turns a `Containment` into a `Launch`, which the agent room spawns itself with
asyncio, from the event-loop thread (`--die-with-parent` is bound to the spawning *thread*) and without `preexec_fn` or
`user=` (those fork the whole server).
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol


class Level(enum.StrEnum):
    """How strongly a process is contained, weakest first (`RANK` orders them)."""

    NONE = "none"
    """An ordinary child process of the server: development only."""
    RESTRICTED = "restricted"
    """Landlock, a system-call filter that leaves only unix sockets, and an own uid where possible."""
    BWRAP = "bwrap"
    """Own namespaces and a curated read-only root, own uid, system-call filter, control group where writable."""


RANK: Mapping[Level, int] = {Level.NONE: 0, Level.RESTRICTED: 1, Level.BWRAP: 2}
"""Strength of a level; compare these, never the names."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one process tree may use. Sizes are in bytes; `None` means not limited."""

    memory_bytes: int | None
    """Resident memory of the whole tree; needs a writable control group."""
    processes: int
    """Processes and threads of the whole tree."""
    cpu_share: float | None
    """Processor cores, as in 1.5; needs a writable control group."""
    file_bytes: int
    """Largest file the process may write."""
    open_files: int
    """Open descriptors per process."""
    tmp_bytes: int
    """Size of the private /tmp."""
    shm_bytes: int
    """Size of the private /dev/shm."""
    disk_bytes: int | None
    """Home and workspace together."""
    disk_inodes: int | None
    """Files and directories of home and workspace together."""
    turn_seconds: float
    """Longest turn."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are, seen from inside the sandbox."""

    home: PurePosixPath
    work: PurePosixPath
    socket: PurePosixPath | None
    """The broker's unix socket; None: the broker has to be reached by a loopback path."""
    cli: PurePosixPath
    binds: bool = False
    """Whether directories can be shown at other paths than their own (`Containment.binds`)."""


@dataclass(frozen=True, slots=True)
class SlotDirs:
    """A slot's directories on the host; the sandbox creates and removes them."""

    root: Path
    home: Path
    work: Path
    run: Path
    """Holds the broker's socket `api.sock`, which must belong to the owner of this directory. The directory is what is
    shown to the process, so that the broker can replace its socket."""


SOCKET_NAME = "api.sock"


@dataclass(frozen=True, slots=True)
class Containment:
    """What to start, and how it is to be contained."""

    dirs: SlotDirs
    cli: Path
    argv: tuple[str, ...]
    """Arguments of the CLI without argv[0]."""
    env: Mapping[str, str] = field(repr=False)
    """The whole environment: nothing of the server's is added."""
    limits: Limits
    uid: int | None
    """An own uid for this slot from the allocator, or None to run as the server's."""
    read_only_binds: tuple[tuple[Path, PurePosixPath], ...] = ()
    """(host path, path inside) shown read-only in addition."""
    binds: tuple[tuple[Path, PurePosixPath], ...] = ()
    """(host path, path inside): the slot's own directories, shown and writable at other paths too. Levels that do not
    change paths cannot do that; see `Layout.binds`."""
    masked: tuple[PurePosixPath, ...] = ()
    """Directories inside that are shown empty and read-only: what lies there is reached by one of `binds` alone."""


@dataclass(slots=True)
class Launch:
    """What to spawn. Call `close_fds` after the spawn, whether it worked or not."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(repr=False)
    cwd: Path
    pass_fds: tuple[int, ...] = ()

    def close_fds(self) -> None:
        """Close the server's copies of the passed descriptors. Safe to call twice."""
        fds, self.pass_fds = self.pass_fds, ()
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)


class Sandbox(Protocol):
    """One way to contain a process."""

    @property
    def level(self) -> Level:
        """Which level this adapter enforces."""
        ...

    @property
    def separate_uid(self) -> bool:
        """Whether slots should be given a uid of their own (this host allows it and the adapter uses it)."""
        ...

    def layout(self, dirs: SlotDirs, cli: Path) -> Layout:
        """Where home, workspace, socket and CLI are for the process."""
        ...

    def create_dirs(self, root: Path, uid: int | None) -> SlotDirs:
        """Create the slot's directories below `root`, which must not exist yet, closed to everybody else.

        Raises SandboxUnavailable when `uid` could not reach them, naming the directory that is closed to it.
        """
        ...

    def prepare(self, spec: Containment) -> Launch:
        """Everything the spawn needs. Raises SandboxUnavailable when the level cannot be enforced for this spec."""
        ...

    async def kill(self, pid: int, dirs: SlotDirs) -> None:
        """End everything the launch started: when this returns it is gone. Bounded (about 10 s); never raises.

        `pid` is the spawned one and must be a child of the server that was not yet reaped, or one that is gone.
        A level's own documentation says what it cannot find.
        """
        ...

    def remove_dirs(self, dirs: SlotDirs) -> None:
        """Remove the slot's directories; never follows a link. May take long: call it in a thread."""
        ...

    def main_pid(self, spawned_pid: int) -> int:
        """The CLI's own pid as the host sees it; the spawned pid while it is not there yet."""
        ...

    def listen_inside(self, pid: int, port: int, uid: int | None) -> socket.socket:
        """A listener on the loopback of the process's own network, held by the server; `pid` is the spawned one.

        Blocks for up to some tens of milliseconds: call it in a thread, when the CLI has answered once. Raises
        SandboxUnavailable with the cause; levels that give a process no network of its own always do.
        """
        ...

    def freeze(self, pid: int, dirs: SlotDirs) -> None:
        """Stop the whole tree until `thaw`. A frozen tree can still be killed."""
        ...

    def thaw(self, pid: int, dirs: SlotDirs) -> None:
        """Let a frozen tree run again; harmless when it is not frozen."""
        ...

    def close(self) -> None:
        """At the server's end, when no slot lives any more: remove what the sandbox made for itself on the host."""
        ...
