"""No containment: the CLI as an ordinary child of the server. For development, and loudly so.

Works without any privilege and on any host. What it starts shares the server's uid, files and network; children that
left the process group are found by their environment (HOME) and working directory, which a hostile child can change:
there is no promise.
"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path, PurePosixPath

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import directories, processes
from claude_wrapper.sandbox.port import SOCKET_NAME, Containment, Launch, Layout, Level, SlotDirs

_KILL_SECONDS = 5.0


class NoSandbox:
    """Starts the CLI as it is."""

    def __init__(self, *, unix_socket: bool = False) -> None:
        """`unix_socket`: reach the broker by its socket, as the other levels do, instead of a loopback path."""
        self._unix_socket = unix_socket

    @property
    def level(self) -> Level:
        return Level.NONE

    @property
    def separate_uid(self) -> bool:
        return False

    def layout(self, dirs: SlotDirs, cli: Path) -> Layout:
        return host_layout(dirs, cli, unix_socket=self._unix_socket)

    def create_dirs(self, root: Path, uid: int | None) -> SlotDirs:
        _refuse_uid(uid)
        return directories.create(root, None)

    def prepare(self, spec: Containment) -> Launch:
        _refuse_uid(spec.uid)
        return Launch(argv=(str(spec.cli), *spec.argv), env=dict(spec.env), cwd=spec.dirs.work)

    async def kill(self, pid: int, dirs: SlotDirs) -> None:
        await processes.end_matching(lambda: related(pid, dirs), seconds=_KILL_SECONDS)

    def remove_dirs(self, dirs: SlotDirs) -> None:
        directories.remove(dirs)

    def close(self) -> None:
        """Nothing was made."""

    def main_pid(self, spawned_pid: int) -> int:
        return spawned_pid

    def listen_inside(self, pid: int, port: int, uid: int | None) -> socket.socket:
        raise SandboxUnavailable("the level `none` shares the host's network: a proxy would confine nothing")

    def freeze(self, pid: int, dirs: SlotDirs) -> None:
        signal_tree(pid, signal.SIGSTOP)

    def thaw(self, pid: int, dirs: SlotDirs) -> None:
        signal_tree(pid, signal.SIGCONT)


def host_layout(dirs: SlotDirs, cli: Path, *, unix_socket: bool) -> Layout:
    """The layout of a level that does not change paths."""
    socket = PurePosixPath(dirs.run / SOCKET_NAME) if unix_socket else None
    return Layout(home=PurePosixPath(dirs.home), work=PurePosixPath(dirs.work), socket=socket, cli=PurePosixPath(cli))


def signal_tree(pid: int, number: signal.Signals) -> None:
    """Signal a child of the server and all its descendants."""
    if not processes.send(pid, number, own_child):
        return
    for process in processes.descendants(pid):
        processes.send(process.pid, number)


def own_child(pid: int) -> bool:
    """Whether this is a child of the server, so that its number cannot have been reused by somebody else's process."""
    found = processes.read_process(pid)
    return found is not None and found.ppid == os.getpid()


def related(pid: int, dirs: SlotDirs, uid: int | None = None) -> list[int]:
    """Living processes of a launch that has no pid namespace: by tree, session, group, uid, HOME and directory."""
    table = processes.all_processes()
    mine = os.getpid()
    found = {process.pid for process in processes.descendants(pid, table)}
    home = b"HOME=" + os.fsencode(dirs.home)
    for process in table:
        if process.pid in {mine, 1} or not process.alive or process.pid in found:
            continue
        if (
            (process.pid == pid and process.ppid == mine)
            or pid in {process.pgid, process.session}
            or (uid is not None and processes.real_uid(process.pid) == uid)
            or processes.environment_has(process.pid, home)
            or processes.cwd_below(process.pid, str(dirs.root))
        ):
            found.add(process.pid)
    return sorted(found)


def _refuse_uid(uid: int | None) -> None:
    if uid is not None:
        raise SandboxUnavailable("the sandbox level `none` runs processes as the server's own user; it takes no uid")
