"""What /proc says about processes: trees, owners, and the end of them.

Nothing here trusts a pid for longer than one look: a process is signalled through a pidfd that was opened *before* its
identity was checked, so a reused number cannot be hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Process:
    """One line of the process table."""

    pid: int
    ppid: int
    pgid: int
    session: int
    state: str
    """One letter as in ps: R, S, D, T (stopped), Z (zombie), X."""

    @property
    def alive(self) -> bool:
        """Whether it can still run code (a zombie cannot)."""
        return self.state not in {"Z", "X"}


def read_process(pid: int) -> Process | None:
    """The process with this pid, or None when there is none."""
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The command name may hold spaces and parentheses: fields start after the last one.
    state, ppid, pgid, session = stat[stat.rindex(b")") + 2 :].split()[:4]
    return Process(pid, int(ppid), int(pgid), int(session), state.decode())


def all_processes() -> list[Process]:
    """Every process visible to the server."""
    found = (read_process(int(name)) for name in os.listdir(_PROC) if name.isdigit())  # noqa: PTH208 - 3x faster
    return [process for process in found if process is not None]


def descendants(root: int, table: Iterable[Process] | None = None) -> list[Process]:
    """All living descendants of `root`, parents before children, without `root` itself."""
    children: dict[int, list[Process]] = {}
    for process in all_processes() if table is None else table:
        children.setdefault(process.ppid, []).append(process)
    found: list[Process] = []
    waiting = [root]
    while waiting:
        below = children.pop(waiting.pop(), [])
        found.extend(below)
        waiting.extend(process.pid for process in below)
    return [process for process in found if process.alive]


def children(pid: int) -> list[int]:
    """The living children of a process, cheaply: without a look at the whole process table where possible."""
    try:
        listed = (_PROC / str(pid) / "task" / str(pid) / "children").read_text()  # needs CONFIG_PROC_CHILDREN
        return [int(number) for number in listed.split()]
    except OSError:
        pass
    # A launcher's first child gets one of the next numbers, unless the host forks very fast or the numbers wrap.
    near = (read_process(number) for number in range(pid + 1, pid + 33))
    found = [process.pid for process in near if process is not None and process.ppid == pid and process.alive]
    return found or [process.pid for process in all_processes() if process.ppid == pid and process.alive]


def namespace_pids(pid: int) -> tuple[int, ...]:
    """The pid in every nested pid namespace, outermost first (`NSpid`); empty when unknown."""
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return tuple(int(number) for number in line.split()[1:])
    return ()


def real_uid(pid: int) -> int | None:
    """The owner of a process, or None when it is gone."""
    try:
        return (_PROC / str(pid)).stat().st_uid
    except OSError:
        return None


def resident_bytes(pids: Iterable[int]) -> int:
    """Resident memory of these processes together; pages that they share count once for each."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError, ValueError):
            total += int((_PROC / str(pid) / "statm").read_text().split()[1]) * PAGE
    return total


def environment_has(pid: int, entry: bytes) -> bool:
    """Whether the process was started with exactly this `NAME=value` in its environment."""
    try:
        return entry in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def cwd_below(pid: int, directory: str) -> bool:
    """Whether the process works somewhere below this directory of the host."""
    try:
        cwd = os.readlink(f"/proc/{pid}/cwd")  # noqa: PTH115 - a magic link is text here, not a path to resolve
    except OSError:
        return False
    return cwd == directory or cwd.startswith(directory + "/")


def sees(pid: int, inside: str, device_inode: tuple[int, int]) -> bool:
    """Whether `inside`, looked up in the process's own root, is this very file (device, inode)."""
    try:
        found = os.lstat(f"/proc/{pid}/root{inside}")
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == device_inode


def send(pid: int, number: signal.Signals, still: Callable[[int], bool] | None = None) -> bool:
    """Signal one process; `still` is asked after the process was pinned. Returns whether the signal was sent."""
    try:
        pinned = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if still is not None and not still(pid):
            return False
        signal.pidfd_send_signal(pinned, number)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(pinned)


async def gone(pid: int, seconds: float) -> bool:
    """Wait, at most so long, until the process has ended (a zombie has). Returns whether it has."""
    try:
        pinned = os.pidfd_open(pid)
    except OSError:
        return True
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pinned, ended.set)
    try:
        async with asyncio.timeout(seconds):
            await ended.wait()
    except TimeoutError:
        return False
    else:
        return True
    finally:
        loop.remove_reader(pinned)
        os.close(pinned)


async def end_matching(find: Callable[[], list[int]], *, seconds: float, rounds: int = 50) -> list[int]:
    """SIGKILL what `find` returns, again and again until it returns nothing. Returns what is left at the end.

    All are stopped first, so that a fork bomb does not outrun the scan.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    left = await asyncio.to_thread(find)  # the table of a busy host takes tens of milliseconds
    for _ in range(rounds):
        if not left:
            return []
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        remaining = until - loop.time()
        if remaining <= 0:
            break
        await asyncio.gather(*(gone(pid, min(remaining, 1.0)) for pid in left[:64]))
        left = await asyncio.to_thread(find)
    return left
