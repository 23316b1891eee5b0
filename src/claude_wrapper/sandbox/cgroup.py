"""Control groups, version 2 and version 1: create, limit, join, kill, remove.

`CgroupTree` is built once at start by `open_tree`, below the server's own group, so that limits of the server's
container hold for all. A slot's group exists in each usable hierarchy under one name. Where nothing is writable the
tree says why, and memory and CPU are not limited: that is reported, never hidden.

Freezing uses version 2 only: a task frozen by version 1's freezer cannot be killed until it is thawed, so the death of
the server would leave it behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from claude_wrapper.sandbox import processes
from claude_wrapper.sandbox.port import Limits

_CONTROLLERS = ("memory", "pids", "cpu")
_PREFIX = "claude-wrapper-"
_PERIOD = 100_000  # microseconds of a CPU accounting period


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted hierarchy and the server's own group in it."""

    version: int
    controllers: frozenset[str]
    base: Path
    """The server's own group as a directory."""


@dataclass(frozen=True, slots=True)
class CgroupTree:
    """Where slots' groups are made, one directory per hierarchy."""

    parents: tuple[tuple[Hierarchy, Path], ...]
    missing: tuple[tuple[str, str], ...]
    """(controller, why it is not usable)."""

    @property
    def controllers(self) -> frozenset[str]:
        """Which of memory, pids and cpu can be limited."""
        return frozenset().union(*(hierarchy.controllers for hierarchy, _ in self.parents)) & frozenset(_CONTROLLERS)

    @property
    def kills(self) -> bool:
        """Whether a whole group can be ended in one step (`cgroup.kill`, Linux 5.14)."""
        return any((parent / "cgroup.kill").exists() for _, parent in self.parents)

    def groups(self, slot: str) -> list[Path]:
        """The slot's directories, existing or not."""
        return [parent / slot for _, parent in self.parents]

    def create(self, slot: str, limits: Limits) -> list[Path]:
        """Make the slot's groups with these limits; returns their `cgroup.procs` files. Raises OSError."""
        made: list[Path] = []
        for hierarchy, parent in self.parents:
            group = parent / slot
            group.mkdir(exist_ok=True)
            for name, value in settings(hierarchy, limits):
                file = group / name
                if file.exists():  # memory.swap.max needs swap accounting
                    file.write_text(value)
            made.append(group / "cgroup.procs")
        return made

    def pids(self, slot: str) -> list[int]:
        """Living processes in any of the slot's groups."""
        found: set[int] = set()
        for group in self.groups(slot):
            with contextlib.suppress(OSError):
                found.update(int(line) for line in (group / "cgroup.procs").read_text().split())
        return sorted(pid for pid in found if pid > 0)

    def signal_all(self, slot: str) -> None:
        """SIGKILL everything in the slot's groups."""
        for group in self.groups(slot):
            with contextlib.suppress(OSError):
                (group / "cgroup.kill").write_text("1")
                return
        for pid in self.pids(slot):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def freeze(self, slot: str, *, frozen: bool) -> bool:
        """Stop or continue the whole group; returns False where version 2's freezer is not there."""
        for (hierarchy, _), group in zip(self.parents, self.groups(slot), strict=True):
            if hierarchy.version == 2:
                with contextlib.suppress(OSError):
                    (group / "cgroup.freeze").write_text("1" if frozen else "0")
                    return True
        return False

    def memory_bytes(self, slot: str) -> int | None:
        """Memory of the slot's group as the kernel counts it, or None where it does not."""
        for group in self.groups(slot):
            for name in ("memory.current", "memory.usage_in_bytes"):
                with contextlib.suppress(OSError, ValueError):
                    return int((group / name).read_text())
        return None

    async def kill(self, slot: str, seconds: float) -> list[int]:
        """End everything in the slot's groups; returns the pids that would not go."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        self.signal_all(slot)
        while left := self.pids(slot):
            remaining = until - loop.time()
            if remaining <= 0:
                return left
            await processes.gone(left[0], min(remaining, 1.0))
            self.signal_all(slot)
            if left == self.pids(slot):
                await asyncio.sleep(0.005)  # a zombie that its parent has not yet reaped stays listed
                if all((found := processes.read_process(pid)) is None or not found.alive for pid in left):
                    return []
        return []

    def remove(self, slot: str) -> None:
        """Remove the slot's groups; one that still holds processes stays, for the sweep at the next start."""
        for group in self.groups(slot):
            with contextlib.suppress(OSError):
                group.rmdir()

    def close(self) -> None:
        """Remove the tree's own directories where they are empty."""
        for _, parent in self.parents:
            with contextlib.suppress(OSError):
                parent.rmdir()


def settings(hierarchy: Hierarchy, limits: Limits) -> list[tuple[str, str]]:
    """(file, value) pairs that set the limits which this hierarchy controls."""
    found: list[tuple[str, str]] = []
    second = hierarchy.version == 2
    if "memory" in hierarchy.controllers and limits.memory_bytes is not None:
        size = str(limits.memory_bytes)
        if second:
            # memory.oom.group stays 0: the shell that ate the memory dies, the CLI goes on and can say so.
            found += [("memory.max", size), ("memory.swap.max", "0")]
        else:
            found += [("memory.limit_in_bytes", size), ("memory.memsw.limit_in_bytes", size)]
    if "pids" in hierarchy.controllers:
        found.append(("pids.max", str(limits.processes)))
    if "cpu" in hierarchy.controllers and limits.cpu_share is not None:
        quota = max(1000, int(limits.cpu_share * _PERIOD))
        if second:
            found.append(("cpu.max", f"{quota} {_PERIOD}"))
        else:
            found += [("cpu.cfs_period_us", str(_PERIOD)), ("cpu.cfs_quota_us", str(quota))]
    return found


def hierarchies(mountinfo: str, own: str) -> list[Hierarchy]:
    """Mounted hierarchies from /proc/self/mountinfo and /proc/self/cgroup, each once: one that is mounted at several
    places (a second root file system with a `/sys` of its own) is taken where it is mounted first."""
    groups: dict[str, str] = {}
    for line in own.splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(",") if names else [""]:
            groups[name] = path
    found: list[Hierarchy] = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        root, mount_point = before.split()[3:5]
        kind, _, options = after.split()[:3]
        taken = frozenset().union(*(one.controllers for one in found if one.version == 1))
        if kind == "cgroup2" and "" in groups and not any(one.version == 2 for one in found):
            base = Path(_below(mount_point, root, groups[""]))
            with contextlib.suppress(OSError):
                offered = frozenset((base / "cgroup.controllers").read_text().split())
                found.append(Hierarchy(2, offered, base))
        elif kind == "cgroup" and (wanted := frozenset(options.split(",")) & frozenset(_CONTROLLERS) - taken):
            path = groups.get(min(wanted), "/")
            found.append(Hierarchy(1, wanted, Path(_below(mount_point, root, path))))
    return found


def _below(mount_point: str, root: str, path: str) -> str:
    """Where the group `path` is mounted: a container's mount shows only what is below `root`."""
    if root != "/":
        path = path[len(root) :] if path.startswith(root) else "/"
    mount_point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), mount_point)
    return (mount_point.rstrip("/") + "/" + path.strip("/")).rstrip("/")


def open_tree(found: list[Hierarchy], instance: str) -> CgroupTree:
    """Make this server's parent group in every hierarchy that lets it.

    `instance` names this server process (its pid), so that a later start can tell what a dead one left behind.
    """
    parents: list[tuple[Hierarchy, Path]] = []
    reasons: dict[str, str] = {}
    for hierarchy in found:
        usable, why = _prepare(hierarchy, instance)
        if usable is None:
            reasons |= dict.fromkeys(hierarchy.controllers & frozenset(_CONTROLLERS), why)
        else:
            parents.append(usable)
    have: frozenset[str] = frozenset().union(*(hierarchy.controllers for hierarchy, _ in parents))
    missing = tuple(
        (name, reasons.get(name, "no mounted control group hierarchy offers it"))
        for name in _CONTROLLERS
        if name not in have
    )
    return CgroupTree(tuple(parents), missing)


def _prepare(hierarchy: Hierarchy, instance: str) -> tuple[tuple[Hierarchy, Path] | None, str]:
    parent = hierarchy.base / f"{_PREFIX}{instance}"
    try:
        parent.mkdir(exist_ok=True)
    except OSError as error:
        return None, f"{hierarchy.base} is not writable ({os.strerror(error.errno or 0)})"
    if hierarchy.version == 1:
        return (hierarchy, parent), ""
    wanted = hierarchy.controllers & frozenset(_CONTROLLERS)
    try:
        if wanted:
            _delegate(hierarchy.base, wanted)
            (parent / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(wanted)))
    except OSError as error:
        with contextlib.suppress(OSError):
            parent.rmdir()
        return None, f"{hierarchy.base} does not delegate {', '.join(sorted(wanted))} ({os.strerror(error.errno or 0)})"
    return (Hierarchy(2, wanted, hierarchy.base), parent), ""


def _delegate(base: Path, wanted: frozenset[str]) -> None:
    """Switch controllers on for groups below `base`.

    A group that holds processes may not have controlled children (cgroup-v2 "no internal processes"), so the server
    moves itself and what shares its group into a leaf first when the kernel answers EBUSY.
    """
    control = base / "cgroup.subtree_control"
    value = " ".join(f"+{name}" for name in sorted(wanted))
    if wanted <= frozenset(control.read_text().split()):
        return
    try:
        control.write_text(value)
    except OSError as error:
        if error.errno != 16:  # EBUSY
            raise
        leaf = base / f"{_PREFIX}server"
        leaf.mkdir(exist_ok=True)
        for pid in (base / "cgroup.procs").read_text().split():
            (leaf / "cgroup.procs").write_text(pid)
        control.write_text(value)


def sweep(found: list[Hierarchy]) -> list[Path]:
    """Kill and remove what servers that no longer live left behind; returns the groups that were removed."""
    removed: list[Path] = []
    for hierarchy in found:
        for parent in sorted(hierarchy.base.glob(f"{_PREFIX}*")):
            instance = parent.name.removeprefix(_PREFIX)
            if not instance.isdigit() or processes.read_process(int(instance)) is not None:
                continue
            tree = CgroupTree(((hierarchy, parent),), ())
            for group in [child for child in parent.iterdir() if child.is_dir()]:
                tree.signal_all(group.name)
                tree.remove(group.name)
            tree.close()
            removed.append(parent)
    return removed
