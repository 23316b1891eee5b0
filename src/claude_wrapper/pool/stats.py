"""A pool at one moment, as a frozen value. Statistics are pulled; the pool pushes nothing to anybody."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from claude_wrapper.pool.ports import Process
from claude_wrapper.pool.requests import Kind, Refusal
from claude_wrapper.pool.slot import Reason, Slot, SlotState
from claude_wrapper.pool.state import PoolState


@dataclass(frozen=True, slots=True)
class SlotStats:
    """One slot. Times are aware datetimes in UTC, durations seconds."""

    slot: str
    state: str
    profile: str
    org: str | None
    principal: str | None
    session: str | None
    pid: int | None
    """`None` while the process starts."""
    created_at: datetime
    last_used: datetime
    idle_seconds: float
    """Since the last claim or release; 0 while a claim holds it."""
    uptime_seconds: float
    alive: bool
    frozen: bool
    turns: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The whole pool. Every key of every mapping is always there, also at zero (organisations excepted)."""

    max_processes: int
    idle_seconds: float
    sweep_seconds: float
    processes: int
    """Slots in all: what `max_processes` bounds."""
    by_state: Mapping[str, int]
    spares: Mapping[str, int]
    """Virgin processes that wait, by profile name."""
    spares_wanted: Mapping[str, int]
    outstanding: int
    """Claims that wait or hold a process."""
    waiting: int
    waiting_per_org: Mapping[str, int]
    held_per_org: Mapping[str, int]
    memory_bytes: int
    claims: Mapping[str, int]
    """Accepted claims so far, by kind."""
    claim_count: int
    claim_seconds_sum: float
    refusals: Mapping[str, int]
    withdrawn: int
    evictions: Mapping[str, int]
    """Processes hibernated or stopped so far, by reason."""
    spawn_count: int
    spawn_seconds_sum: float
    spawn_failures: int
    crashes: int
    rewinds_failed: int
    hibernate_failures: int
    """Sessions whose state could not be kept when their process went."""
    stop_failures: int
    """Processes that may still run although they were told to stop twice."""
    draining: bool
    slots: tuple[SlotStats, ...]


@dataclass(frozen=True, slots=True)
class ShellCounts:
    """What only the shell can count."""

    hibernate_failures: int
    stop_failures: int


def snapshot(
    state: PoolState, processes: Mapping[str, Process], now: float, wall: datetime, shell: ShellCounts
) -> PoolStats:
    """The pool at `now` (monotonic) alias `wall`."""
    settings, tally = state.settings, state.tally
    return PoolStats(
        max_processes=settings.max_processes,
        idle_seconds=settings.idle_seconds,
        sweep_seconds=settings.sweep_seconds,
        processes=len(state.slots),
        by_state={each.value: state.count(each) for each in SlotState if each is not SlotState.GONE},
        spares=_by_name(
            (profile, len(state.spares.get(profile, ()))) for profile in {**settings.spares, **state.spares}
        ),
        spares_wanted=_by_name(settings.spares.items()),
        outstanding=len(state.claims),
        waiting=len(state.waiting),
        waiting_per_org=dict(state.waiting_per_org),
        held_per_org=dict(state.held),
        memory_bytes=state.memory,
        claims={kind.value: tally.claims[kind] for kind in Kind},
        claim_count=tally.claims.total(),
        claim_seconds_sum=tally.claim_seconds,
        refusals={refusal.value: tally.refusals[refusal] for refusal in Refusal},
        withdrawn=tally.withdrawn,
        evictions={reason.value: tally.evictions[reason] for reason in Reason},
        spawn_count=tally.spawns,
        spawn_seconds_sum=tally.spawn_seconds,
        spawn_failures=tally.spawn_failures,
        crashes=tally.crashes,
        rewinds_failed=tally.rewinds_failed,
        hibernate_failures=shell.hibernate_failures,
        stop_failures=shell.stop_failures,
        draining=state.draining,
        slots=tuple(_describe(slot, processes.get(slot.id), now, wall) for slot in state.slots.values()),
    )


def _by_name(counts: Iterable[tuple[Any, int]]) -> dict[str, int]:
    """Profiles of one name (of several sets of tools, or versions of the CLI) counted together."""
    found: dict[str, int] = {}
    for profile, count in counts:
        found[profile.name] = found.get(profile.name, 0) + count
    return found


def _describe(slot: Slot, process: Process | None, now: float, wall: datetime) -> SlotStats:
    return SlotStats(
        slot=slot.id,
        state=slot.state.value,
        profile=slot.profile.name,
        org=slot.org,
        principal=slot.principal,
        session=slot.session,
        pid=process.pid if process is not None else None,
        created_at=wall - timedelta(seconds=now - slot.created_at),
        last_used=wall - timedelta(seconds=now - slot.last_used),
        idle_seconds=0.0 if slot.state is SlotState.BUSY else now - slot.last_used,
        uptime_seconds=now - slot.created_at,
        alive=process is not None and process.alive,
        frozen=slot.frozen,
        turns=slot.turns,
        memory_bytes=slot.memory,
    )
