"""For containers without user namespaces: Landlock, a filter that leaves only unix sockets, own uid where possible.

The process keeps the host's paths and sees what Landlock lets it: system directories read-only, its own home, workspace
and temporary directory. It cannot open a socket other than a unix one, so its network is the broker's socket.

Weaker than `bwrap`, and this is declared: unix sockets of the host that any user may connect to can be reached by path;
without a control group memory is not limited; /tmp is a directory of the slot without a size of its own; without an own
uid, children that leave session, environment and directory behind may survive a kill.
"""

from __future__ import annotations

import marshal
import os
import resource
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import commands, directories, landlock, processes, seccomp
from claude_wrapper.sandbox.cgroup import CgroupTree
from claude_wrapper.sandbox.none import host_layout, own_child, related, signal_tree
from claude_wrapper.sandbox.port import Containment, Launch, Layout, Level, SlotDirs

_KILL_SECONDS = 5.0
_LAUNCHER = Path(__file__).with_name("restricted_launcher.py")

_PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_READABLE = (
    *("/etc/ssl", "/etc/ca-certificates", "/etc/pki", "/etc/crypto-policies", "/etc/alternatives", "/etc/ld.so.cache"),
    *("/etc/ld.so.conf", "/etc/passwd", "/etc/group", "/etc/hosts", "/etc/nsswitch.conf", "/etc/localtime"),
    *("/proc/meminfo", "/proc/cpuinfo", "/proc/stat", "/proc/uptime", "/proc/loadavg", "/proc/version"),
    *("/proc/filesystems", "/proc/sys", "/sys/devices/system/cpu"),
    # Its own entry only: the rest of /proc would show every process of the host. Children cannot read theirs.
    "/proc/{pid}",
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


@dataclass(frozen=True, slots=True)
class RestrictedHost:
    """What this host offers; found by the probe."""

    landlock_abi: int
    """0: none; an own uid is then the wall between files."""
    cgroups: CgroupTree | None
    uids: bool
    """Whether the server may become other users (CAP_SETUID, CAP_SETGID)."""


class RestrictedSandbox:
    """Starts the CLI behind Landlock and the filter."""

    def __init__(self, host: RestrictedHost, *, python: Path | None = None) -> None:
        """`python` runs the launcher; default: the server's own interpreter.

        Raises SandboxUnavailable when nothing would keep files of slots apart.
        """
        if not host.landlock_abi and not host.uids:
            raise SandboxUnavailable("neither Landlock nor uids of their own: nothing would keep slots' files apart")
        self._host = host
        self._python = python or Path(sys.executable).resolve()
        self._filter = seccomp.compile_filter(seccomp.this_architecture(), seccomp.Sockets.UNIX_ONLY)

    @property
    def level(self) -> Level:
        return Level.RESTRICTED

    @property
    def separate_uid(self) -> bool:
        return self._host.uids

    def layout(self, dirs: SlotDirs, cli: Path) -> Layout:
        return host_layout(dirs, cli.resolve(), unix_socket=True)

    def create_dirs(self, root: Path, uid: int | None) -> SlotDirs:
        dirs = directories.create(root, uid)
        temporary = root / "tmp"
        temporary.mkdir(mode=0o700)
        if uid is not None:
            os.chown(temporary, uid, uid)
        return dirs

    def prepare(self, spec: Containment) -> Launch:
        if spec.uid is not None and not self._host.uids:
            raise SandboxUnavailable(f"cannot become uid {spec.uid}: CAP_SETUID and CAP_SETGID are needed")
        if spec.uid is None and not self._host.landlock_abi:
            raise SandboxUnavailable("without Landlock every slot needs a uid of its own")
        cli = spec.cli.resolve()
        if spec.uid is not None and (closed := directories.unreachable(cli, spec.uid)) is not None:
            raise SandboxUnavailable(
                f"{closed} is closed to other users, so uid {spec.uid} cannot reach {cli}: use sandbox.staging "
                "to show it from an open directory, or `chmod o+x` that directory"
            )
        slot = spec.dirs.root.name
        groups = self._host.cgroups
        try:
            procs = [str(file) for file in groups.create(slot, spec.limits)] if groups else []
        except OSError as error:
            raise SandboxUnavailable(f"the control group of {slot} cannot be made: {error}") from error
        plan = self._plan(spec, cli, procs)
        descriptor = commands.data_fd("plan", marshal.dumps(plan))
        argv = (str(self._python), "-I", "-S", str(_LAUNCHER), str(descriptor))
        return Launch(argv=argv, env={}, cwd=Path("/"), pass_fds=(descriptor,))

    def _plan(self, spec: Containment, cli: Path, procs: list[str]) -> dict[str, Any]:
        """What the launcher does, as plain values: see `restricted_launcher.main` for the order."""
        temporary = str(spec.dirs.root / "tmp")
        abi = self._host.landlock_abi
        return {
            "procs": procs,
            "rules": self._rules(spec, cli) if abi else [],
            "rights": landlock.known_rights(abi),
            "network": landlock.network_rights(abi),
            "scopes": landlock.scopes(abi),
            "cwd": str(spec.dirs.work),
            "limits": self._limits(spec),
            "uid": spec.uid,
            "parent": os.getpid(),
            "filter": self._filter,
            "argv": [str(cli), *spec.argv],
            "env": {**spec.env, "TMPDIR": temporary, "CLAUDE_CODE_TMPDIR": temporary},
        }

    def _rules(self, spec: Containment, cli: Path) -> list[tuple[str, int]]:
        dirs = spec.dirs
        rules = [(path, landlock.READ_EXECUTE) for path in _PROGRAMS]
        rules += [(path, landlock.READ) for path in _READABLE]
        rules += [(path, landlock.DEVICE) for path in _DEVICES]
        rules += [(str(path), landlock.EVERYTHING) for path in (dirs.home, dirs.work, dirs.root / "tmp")]
        rules.append((str(cli), landlock.READ_EXECUTE))
        rules += [(str(outside), landlock.READ_EXECUTE) for outside, _ in spec.read_only_binds]
        # A rule on a file may hold file rights only.
        return [
            (path, rights & landlock.FILE_RIGHTS if Path(path).is_file() or path in _DEVICES else rights)
            for path, rights in rules
        ]

    def _limits(self, spec: Containment) -> list[tuple[int, int]]:
        limits = [
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, spec.limits.open_files),
            (resource.RLIMIT_FSIZE, spec.limits.file_bytes),
        ]
        if spec.uid is not None:
            # Counted per uid: with a shared one, one slot's fork bomb would keep all others from starting anything.
            limits.append((resource.RLIMIT_NPROC, spec.limits.processes))
        return limits

    async def kill(self, pid: int, dirs: SlotDirs) -> None:
        slot = dirs.root.name
        groups = self._host.cgroups
        try:
            owner = dirs.home.stat().st_uid
        except OSError:
            owner = os.geteuid()
        uid = owner if owner != os.geteuid() else None
        processes.send(pid, signal.SIGKILL, own_child)  # it may not have joined its group yet
        if groups:
            # Nothing inside can leave its group: the hierarchy is the server's and not among what it may write.
            groups.freeze(slot, frozen=False)
            await groups.kill(slot, _KILL_SECONDS)
            groups.remove(slot)
        else:
            await processes.end_matching(lambda: related(pid, dirs, uid), seconds=_KILL_SECONDS)

    def remove_dirs(self, dirs: SlotDirs) -> None:
        if self._host.cgroups:
            self._host.cgroups.remove(dirs.root.name)
        directories.remove(dirs)

    def close(self) -> None:
        if self._host.cgroups:
            self._host.cgroups.close()

    def main_pid(self, spawned_pid: int) -> int:
        return spawned_pid

    def listen_inside(self, pid: int, port: int, uid: int | None) -> socket.socket:
        raise SandboxUnavailable("the level `restricted` leaves unix sockets only: no proxy can be reached")

    def freeze(self, pid: int, dirs: SlotDirs) -> None:
        if not (self._host.cgroups and self._host.cgroups.freeze(dirs.root.name, frozen=True)):
            signal_tree(pid, signal.SIGSTOP)

    def thaw(self, pid: int, dirs: SlotDirs) -> None:
        if not (self._host.cgroups and self._host.cgroups.freeze(dirs.root.name, frozen=False)):
            signal_tree(pid, signal.SIGCONT)
