"""A pool at one moment, as a frozen value. Statistics are pulled; the pool pushes nothing to anybody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime


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
