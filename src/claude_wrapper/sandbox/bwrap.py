"""The strongest level: bubblewrap with everything that the host allows around it.

Stages, each exec-ing the next: join the control groups → become the slot's uid → bubblewrap (namespaces, curated
read-only root) → resource limits → CLI, under the system-call filter that bubblewrap installs last. The process sees
constant paths (`/work`, `/home/agent`), a constant uid, no network but the broker's socket, and no file of the server.

The CLI's own binary is bind-mounted, not copied: all slots share its pages (76 MB of each process).
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import commands, directories, loopback, processes, seccomp
from claude_wrapper.sandbox.cgroup import CgroupTree
from claude_wrapper.sandbox.commands import Tools
from claude_wrapper.sandbox.none import own_child, signal_tree
from claude_wrapper.sandbox.port import SOCKET_NAME, Containment, Launch, Layout, Level, Limits, SlotDirs

HOME = PurePosixPath("/home/agent")
WORK = PurePosixPath("/work")
BROKER = PurePosixPath("/run/broker")
CLI = PurePosixPath("/opt/claude/claude")
UID = 1000
"""The uid that the process believes to have, whatever it is outside."""
_TMP, _SHM = "/tmp", "/dev/shm"  # noqa: S108 - the sandbox's own, not the host's
_KILL_SECONDS = 5.0
_MASK_BYTES = 4096

_ETC_FILES = {
    "passwd": f"root:x:0:0:root:/nonexistent:/usr/sbin/nologin\nagent:x:{UID}:{UID}:agent:{HOME}:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": f"root:x:0:\nagent:x:{UID}:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
_ETC_SHOWN = ("ssl", "ca-certificates", "pki", "crypto-policies", "alternatives", "ld.so.cache", "ld.so.conf")
"""What of the host's /etc is shown: certificates, program alternatives, the linker's cache. None holds a secret."""
_TOP_LEVEL = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


@dataclass(frozen=True, slots=True)
class BwrapHost:
    """What this host offers around bubblewrap; found by the probe."""

    tools: Tools
    cgroups: CgroupTree | None
    uids: bool
    """Whether the server may become other users (CAP_SETUID, CAP_SETGID) and setpriv is there."""
    disable_userns: bool
    """Whether `--disable-userns` works; the system-call filter refuses new namespaces in any case."""


class BwrapSandbox:
    """Starts the CLI in bubblewrap."""

    def __init__(self, host: BwrapHost) -> None:
        """Raises SandboxUnavailable when bubblewrap or the filter for this machine is missing."""
        if host.tools.bwrap is None or host.tools.prlimit is None or host.tools.shell is None:
            raise SandboxUnavailable("bwrap, prlimit and sh are needed: apt-get install bubblewrap util-linux")
        self._host = host
        self._bwrap = host.tools.bwrap
        self._prlimit = host.tools.prlimit
        self._shell = host.tools.shell
        self._filter = seccomp.compile_filter(seccomp.this_architecture(), seccomp.Sockets.LOCAL)
        self._root = tuple(curated_root(Path("/")))

    @property
    def level(self) -> Level:
        return Level.BWRAP

    @property
    def separate_uid(self) -> bool:
        return self._host.uids

    def layout(self, dirs: SlotDirs, cli: Path) -> Layout:
        return Layout(home=HOME, work=WORK, socket=BROKER / SOCKET_NAME, cli=CLI, binds=True)

    def create_dirs(self, root: Path, uid: int | None) -> SlotDirs:
        return directories.create(root, uid)

    def prepare(self, spec: Containment) -> Launch:
        cli = _bindable(spec)
        groups = self._host.cgroups
        slot = spec.dirs.root.name
        fds: list[int] = []
        try:
            joined = commands.join_cgroups(self._shell, groups.create(slot, spec.limits)) if groups else ()
            argv = (
                *joined,
                *self._become(spec.uid),
                *(str(self._bwrap), "--args", self._arguments_fd(spec, cli, fds), "--"),
                *commands.bounded(self._prlimit, spec.limits),
                str(CLI),
                *spec.argv,
            )
        except BaseException as error:
            for descriptor in fds:
                os.close(descriptor)
            if groups:
                groups.remove(slot)
            if isinstance(error, OSError):
                raise SandboxUnavailable(f"the control group of {slot} cannot be made: {error}") from error
            raise
        return Launch(argv=argv, env=dict(spec.env), cwd=Path("/"), pass_fds=tuple(fds))

    def _become(self, uid: int | None) -> tuple[str, ...]:
        if uid is None:
            return ()
        if not self._host.uids or self._host.tools.setpriv is None:
            raise SandboxUnavailable(f"cannot become uid {uid}: setpriv, CAP_SETUID and CAP_SETGID are needed")
        return commands.become(self._host.tools.setpriv, uid)

    def _arguments_fd(self, spec: Containment, cli: Path, fds: list[int]) -> str:
        # Through a descriptor: bubblewrap is pid 1 inside, and its command line would tell the host's paths.
        arguments = "".join(f"{argument}\0" for argument in self._arguments(spec, cli, fds))
        fds.append(commands.data_fd("arguments", arguments.encode()))
        return str(fds[-1])

    def _arguments(self, spec: Containment, cli: Path, fds: list[int]) -> Iterator[str]:
        def data(name: str, content: bytes) -> str:
            fds.append(commands.data_fd(name, content))
            return str(fds[-1])

        yield from ("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts")
        yield "--unshare-cgroup-try"
        if self._host.disable_userns:
            yield "--disable-userns"
        yield from ("--uid", str(UID), "--gid", str(UID), "--hostname", "agent", "--cap-drop", "ALL")
        yield from ("--die-with-parent", "--new-session")
        yield from self._root
        for name, text in _ETC_FILES.items():
            yield from ("--perms", "0644", "--file", data(name, text.encode()), f"/etc/{name}")
        yield from _own_file_systems(spec.limits)
        yield from ("--dir", "/run", "--ro-bind", str(spec.dirs.run), str(BROKER))
        yield from ("--bind", str(spec.dirs.home), str(HOME), "--bind", str(spec.dirs.work), str(WORK))
        yield from ("--ro-bind", str(cli), str(CLI))
        for outside, inside in spec.read_only_binds:
            yield from ("--ro-bind", str(outside), str(inside))
        for outside, inside in spec.binds:
            yield from ("--bind", str(outside), str(inside))
        for inside in spec.masked:
            yield from ("--size", str(_MASK_BYTES), "--perms", "0555", "--tmpfs", str(inside))
            yield from ("--remount-ro", str(inside))
        yield from ("--remount-ro", "/", "--chdir", str(WORK), "--seccomp", data("seccomp", self._filter))

    async def kill(self, pid: int, dirs: SlotDirs) -> None:
        slot = dirs.root.name
        groups = self._host.cgroups
        # The first process inside takes its whole pid namespace along, and ends only when all of it has ended.
        first = next(iter(processes.children(pid)), None) if own_child(pid) else None
        if first is not None:
            processes.send(first, signal.SIGKILL, lambda found: _parent(found) == pid)
        processes.send(pid, signal.SIGKILL, own_child)
        if first is not None:
            await processes.gone(first, _KILL_SECONDS)
        if groups:
            groups.freeze(slot, frozen=False)
            await groups.kill(slot, _KILL_SECONDS)
            groups.remove(slot)
        elif first is None:
            await processes.end_matching(lambda: self._survivors(dirs), seconds=_KILL_SECONDS)

    def _inside(self, pid: int, dirs: SlotDirs) -> bool:
        try:
            home = dirs.home.stat()
        except OSError:
            return False
        return processes.sees(pid, str(HOME), (home.st_dev, home.st_ino))

    def _survivors(self, dirs: SlotDirs) -> list[int]:
        return [found.pid for found in processes.all_processes() if found.alive and self._inside(found.pid, dirs)]

    def remove_dirs(self, dirs: SlotDirs) -> None:
        if self._host.cgroups:
            self._host.cgroups.remove(dirs.root.name)
        directories.remove(dirs)

    def close(self) -> None:
        if self._host.cgroups:
            self._host.cgroups.close()

    def main_pid(self, spawned_pid: int) -> int:
        # bubblewrap outside → bubblewrap as pid 1 of the namespace → the CLI, its first child, which is pid 2 there.
        for first in processes.children(spawned_pid)[:1]:
            inside = [(processes.namespace_pids(found)[-1:], found) for found in processes.children(first)]
            if inside:
                return min(inside)[1]
        return spawned_pid

    def listen_inside(self, pid: int, port: int, uid: int | None) -> socket.socket:
        first = next(iter(processes.children(pid)), None) if own_child(pid) else None
        if first is None:
            raise SandboxUnavailable("the process has ended: there is no network of its own any more")
        return loopback.listen_inside(first, port, uid)

    def freeze(self, pid: int, dirs: SlotDirs) -> None:
        if not (self._host.cgroups and self._host.cgroups.freeze(dirs.root.name, frozen=True)):
            signal_tree(pid, signal.SIGSTOP)

    def thaw(self, pid: int, dirs: SlotDirs) -> None:
        if not (self._host.cgroups and self._host.cgroups.freeze(dirs.root.name, frozen=False)):
            signal_tree(pid, signal.SIGCONT)


def curated_root(host: Path) -> Iterator[str]:
    """Arguments for the read-only system below `host`: programs and libraries, nothing of the server."""
    yield from ("--ro-bind", str(host / "usr"), "/usr")
    for name in _TOP_LEVEL:
        path = host / name
        if path.is_symlink():
            yield from ("--symlink", str(path.readlink()), f"/{name}")
        elif path.is_dir():
            yield from ("--ro-bind", str(path), f"/{name}")
    yield from ("--dir", "/etc")
    for name in _ETC_SHOWN:
        path = host / "etc" / name
        if path.exists():
            yield from ("--ro-bind", str(path), f"/etc/{name}")


def _own_file_systems(limits: Limits) -> Iterator[str]:
    # A process whose uid outside is root's could write the kernel's settings (core_pattern runs programs on the host),
    # whatever its user namespace: bubblewrap leaves /proc/sys writable with --disable-userns.
    yield from ("--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev")
    # --dev alone leaves an unbounded tmpfs at /dev and /dev/shm.
    yield from ("--size", str(limits.shm_bytes), "--perms", "1777", "--tmpfs", _SHM, "--remount-ro", "/dev")
    yield from ("--size", str(limits.tmp_bytes), "--perms", "1777", "--tmpfs", _TMP)


def _bindable(spec: Containment) -> Path:
    """The CLI's real file, checked to be within the uid's reach."""
    cli = spec.cli.resolve()
    if spec.uid is None:
        return cli
    for path in (cli, *(outside for outside, _ in spec.read_only_binds)):
        closed = directories.unreachable(path, spec.uid)
        if closed is not None:
            raise SandboxUnavailable(
                f"{closed} is closed to other users, so uid {spec.uid} cannot reach {path}: use sandbox.staging "
                "to show it from an open directory, or `chmod o+x` that directory"
            )
    return cli


def _parent(pid: int) -> int | None:
    found = processes.read_process(pid)
    return None if found is None else found.ppid
