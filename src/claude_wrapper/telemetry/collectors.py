"""Facts that have a present value elsewhere, read when somebody scrapes.

Each function returns a source for `Metrics.pull`. Readers of `/proc` are thin; what they read is parsed by pure functions.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from claude_wrapper.telemetry.metrics import Metrics

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class PoolSample:
    """What the metrics want to know of the pool; the composition root makes it from the pool's own statistics."""

    size: int
    capacity: int
    waiting: int
    by_state: Mapping[str, int] = field(default_factory=dict)
    """Processes by state, in the words of `metrics.PROCESS_STATES`."""
    spares: Mapping[str, int] = field(default_factory=dict)
    """Ready spares by launch profile."""
    memory_bytes: int = 0


def pool(metrics: Metrics, sample: Callable[[], PoolSample]) -> Callable[[], None]:
    """A source that shows the pool."""

    def read() -> None:
        now = sample()
        metrics.pool_size.set(now.size)
        metrics.pool_capacity.set(now.capacity)
        metrics.pool_waiting.set(now.waiting)
        metrics.pool_memory.set(now.memory_bytes)
        metrics.pool_processes.replace("state", now.by_state)
        metrics.pool_spares.replace("profile", now.spares)

    return read


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """What the kernel says of one process."""

    cpu_seconds: float
    resident_bytes: int
    threads: int
    start_ticks: int


def parse_stat(stat: str, *, ticks: int = _TICKS, page: int = _PAGE) -> ProcessSample:
    """Read `/proc/<pid>/stat` (proc_pid_stat(5)). The command name may hold spaces and parentheses: cut at the last one."""
    words = stat[stat.rindex(")") + 2 :].split()
    return ProcessSample(
        cpu_seconds=(int(words[11]) + int(words[12])) / ticks,
        threads=int(words[17]),
        start_ticks=int(words[19]),
        resident_bytes=int(words[21]) * page,
    )


def own_process(metrics: Metrics, *, proc: Path = Path("/proc")) -> Callable[[], None]:
    """A source that shows this server process: CPU, memory, descriptors, threads, children."""

    own = proc / "self"

    def read() -> None:
        now = parse_stat((own / "stat").read_text())
        metrics.cpu_seconds.set(now.cpu_seconds)
        metrics.resident_memory.set(now.resident_bytes)
        metrics.threads.set(now.threads)
        metrics.open_descriptors.set(len(os.listdir(own / "fd")))  # noqa: PTH208 - iterdir makes a Path for each
        metrics.max_descriptors.set(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        metrics.children.set(children(own))

    return read


def children(process: Path) -> int:
    """How many children a process has, over all of its threads (`/proc/<pid>` is `process`)."""
    count = 0
    for listed in process.glob("task/*/children"):
        try:
            count += len(listed.read_bytes().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # that thread ended meanwhile
    return count
