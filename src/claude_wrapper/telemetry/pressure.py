"""How near the machine is to running out of memory: thin readers of the kernel's files, and the decision to shed load.

Once a machine swaps, every turn is slow and none ends; refusing new turns a little earlier lets the running ones end.
Sources: `/proc/pressure/memory` (Documentation/accounting/psi.rst), `/proc/meminfo`, and the memory controller of the
cgroup that this process is in (`memory.current`, `memory.max`, `memory.pressure`, Documentation/admin-guide/cgroup-v2.rst).
What a host does not have is None and decides nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from claude_wrapper.clock import Clock
from claude_wrapper.telemetry.looplag import LoopLag

_FULL: Final = re.compile(r"^full avg10=(\d+\.\d+)", re.MULTILINE)
_FRESH_SECONDS: Final = 0.5
"""A reading is used this long: it costs about 60 microseconds, and memory does not fill faster."""
RETRY_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Reading:
    """The machine at one moment."""

    memory_share: float | None = None
    """Of the memory that this server may use (the cgroup's, else the machine's), what is in use: 0 to 1."""
    stalled_percent: float | None = None
    """Share of the last ten seconds in which all work waited for memory (PSI `full avg10`): 0 to 100."""
    lag_seconds: float = 0.0
    """How late the event loop woke last."""


@dataclass(frozen=True, slots=True)
class ShedSettings:
    """Above these, new turns are refused."""

    memory_share: float = 0.95
    stalled_percent: float = 20.0
    lag_seconds: float = 5.0


def decide(now: Reading, settings: ShedSettings) -> str | None:
    """Why new turns should be refused now (a word of `metrics.SHED_REASONS`); None: they should not."""
    if now.memory_share is not None and now.memory_share >= settings.memory_share:
        return "memory"
    if now.stalled_percent is not None and now.stalled_percent >= settings.stalled_percent:
        return "pressure"
    return "lag" if now.lag_seconds >= settings.lag_seconds else None


def parse_stalled(text: str) -> float | None:
    """`full avg10` of a PSI file."""
    found = _FULL.search(text)
    return float(found[1]) if found else None


def parse_meminfo(text: str) -> float | None:
    """The share of the machine's memory that is not available."""
    sizes = {
        name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in text.splitlines()) if rest
    }
    total, available = sizes.get("MemTotal"), sizes.get("MemAvailable")
    return None if not total or available is None else 1 - available / total


def cgroup_share(current: str, limit: str, inactive_file: int) -> float | None:
    """What a cgroup uses of its limit; file pages that nobody touched lately can be dropped and do not count."""
    if not limit.strip().isdigit() or int(limit) == 0:
        return None  # "max": no limit
    return max(0, int(current) - inactive_file) / int(limit)


class MemoryReader:
    """Reads the files. Never raises: a file that is not there, or not as expected, says nothing."""

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self._meminfo = proc / "meminfo"
        self._pressure = proc / "pressure" / "memory"
        self._group = _own_group(proc, cgroups)

    def share(self) -> float | None:
        """The larger of the cgroup's share and the machine's."""
        shares = [one for one in (self._group_share(), parse_meminfo(_text(self._meminfo))) if one is not None]
        return round(max(shares), 4) if shares else None

    def stalled(self) -> float | None:
        """The cgroup's own pressure where there is one, else the machine's."""
        own = parse_stalled(_text(self._group / "memory.pressure")) if self._group is not None else None
        return own if own is not None else parse_stalled(_text(self._pressure))

    def _group_share(self) -> float | None:
        if self._group is None:
            return None
        current, limit = _text(self._group / "memory.current"), _text(self._group / "memory.max")
        if not current.strip().isdigit():
            return None
        inactive = re.search(r"^inactive_file (\d+)", _text(self._group / "memory.stat"), re.MULTILINE)
        return cgroup_share(current, limit, int(inactive[1]) if inactive else 0)


class Shedder:
    """Whether new turns are refused now."""

    def __init__(self, settings: ShedSettings, reader: MemoryReader, lag: LoopLag, clock: Clock) -> None:
        self._settings = settings
        self._reader = reader
        self._lag = lag
        self._clock = clock
        self._read_at = float("-inf")
        self._reason: str | None = None

    def take(self, settings: ShedSettings) -> None:
        """New thresholds, from the next turn on."""
        self._settings, self._read_at = settings, float("-inf")

    def reason(self) -> str | None:
        """A word of `metrics.SHED_REASONS`, or None."""
        now = self._clock.monotonic()
        if now - self._read_at >= _FRESH_SECONDS:
            self._read_at = now
            reading = Reading(self._reader.share(), self._reader.stalled(), self._lag.last)
            self._reason = decide(reading, self._settings)
        return self._reason


def _own_group(proc: Path, cgroups: Path) -> Path | None:
    """The directory of this process's cgroup (version 2 only)."""
    line = next((one for one in _text(proc / "self" / "cgroup").splitlines() if one.startswith("0::")), None)
    if line is None:
        return None
    group = cgroups / line.removeprefix("0::").lstrip("/")
    return group if (group / "memory.current").exists() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
