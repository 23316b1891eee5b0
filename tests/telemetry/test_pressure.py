"""When the machine runs out of memory: what is read, and what is decided."""

from __future__ import annotations

from pathlib import Path

import pytest

from claude_wrapper.telemetry.looplag import LoopLag
from claude_wrapper.telemetry.metrics import EVICTION_REASONS, LIMITS, PROCESS_STATES, SHED_REASONS
from claude_wrapper.telemetry.pressure import (
    MemoryReader,
    Reading,
    Shedder,
    ShedSettings,
    cgroup_share,
    decide,
    parse_meminfo,
    parse_stalled,
)
from claude_wrapper.testing.clock import ManualClock

PSI = "some avg10=40.00 avg60=1.00 avg300=0.10 total=9\nfull avg10={} avg60=0.50 avg300=0.00 total=5\n"
MEMINFO = "MemTotal:       1000 kB\nMemFree:          10 kB\nMemAvailable:    {} kB\n"


@pytest.mark.parametrize(
    ("reading", "reason"),
    [
        (Reading(), None),
        (Reading(0.94, 19.9, 4.9), None),
        (Reading(0.95, 0.0), "memory"),
        (Reading(0.2, 20.0), "pressure"),
        (Reading(None, None, 5.0), "lag"),
        (Reading(0.99, 99.0, 99.0), "memory"),
    ],
)
def test_turns_are_refused_from_the_thresholds_on(reading: Reading, reason: str | None) -> None:
    assert decide(reading, ShedSettings()) == reason
    assert reason is None or reason in SHED_REASONS


def test_the_kernels_files_are_read_as_they_are() -> None:
    assert parse_stalled(PSI.format("12.34")) == 12.34
    assert parse_stalled("") is None
    assert parse_meminfo(MEMINFO.format(250)) == 0.75
    assert parse_meminfo("MemTotal: 0 kB\n") is None
    assert cgroup_share("800\n", "1000\n", 300) == 0.5
    assert cgroup_share("800", "max", 0) is None


def _machine(root: Path, *, available: int, stalled: str, limit: str | None) -> MemoryReader:
    proc, group = root / "proc", root / "cgroup" / "own"
    for directory in (proc / "pressure", proc / "self", group):
        directory.mkdir(parents=True, exist_ok=True)
    (proc / "meminfo").write_text(MEMINFO.format(available))
    (proc / "pressure/memory").write_text(PSI.format(stalled))
    (proc / "self/cgroup").write_text("0::/own\n")
    if limit is not None:
        (group / "memory.current").write_text("900\n")
        (group / "memory.max").write_text(limit)
        (group / "memory.stat").write_text("anon 500\ninactive_file 100\n")
        (group / "memory.pressure").write_text(PSI.format("77.00"))
    return MemoryReader(proc, root / "cgroup")


def test_the_tighter_of_machine_and_cgroup_counts(tmp_path: Path) -> None:
    alone = _machine(tmp_path / "a", available=700, stalled="1.00", limit=None)
    assert (alone.share(), alone.stalled()) == (0.3, 1.0)
    grouped = _machine(tmp_path / "b", available=700, stalled="1.00", limit="1000\n")
    assert (grouped.share(), grouped.stalled()) == (0.8, 77.0)
    unlimited = _machine(tmp_path / "c", available=700, stalled="1.00", limit="max\n")
    assert unlimited.share() == 0.3


def test_a_host_without_these_files_sheds_nothing(tmp_path: Path) -> None:
    reader = MemoryReader(tmp_path, tmp_path)
    assert (reader.share(), reader.stalled()) == (None, None)


@pytest.mark.anyio
async def test_a_reading_is_used_for_half_a_second_and_then_made_anew(tmp_path: Path) -> None:
    clock = ManualClock()
    reader = _machine(tmp_path, available=10, stalled="0.00", limit=None)
    shedder = Shedder(ShedSettings(), reader, LoopLag(clock, lambda lag: None), clock)
    assert shedder.reason() == "memory"
    (tmp_path / "proc/meminfo").write_text(MEMINFO.format(900))
    assert shedder.reason() == "memory"
    await clock.advance(0.6)
    assert shedder.reason() is None


def test_the_words_of_the_rooms_are_the_labels_values() -> None:
    from claude_wrapper.app.telemetry import _STATES
    from claude_wrapper.limits.values import Resource
    from claude_wrapper.pool.slot import Reason, SlotState

    assert set(EVICTION_REASONS) == {reason.value for reason in Reason}
    assert set(_STATES) == {state.value for state in SlotState} - {"gone"}
    assert set(_STATES.values()) | {"frozen"} == set(PROCESS_STATES)
    assert {resource.value for resource in Resource} <= set(LIMITS)
