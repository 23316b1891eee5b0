"""What `/health` looks at."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from claude_wrapper.api.reports import Check, Found
from claude_wrapper.broker.breaker import State
from claude_wrapper.broker.broker import Broker
from claude_wrapper.config import Settings
from claude_wrapper.pool.pool import Pool
from claude_wrapper.sessions.process import SlotProcess
from claude_wrapper.storage.blobs import BlobStore
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.state import SharedState
from claude_wrapper.telemetry.looplag import LoopLag
from claude_wrapper.telemetry.pressure import MemoryReader

_MEMORY_SHARE: Final = 0.9
_DISK_SHARE: Final = 0.95
_DISK_BYTES: Final = 256 * 2**20
_LAG_SECONDS: Final = 1.0
_PROBE: Final = "health/probe"
"""A blob of two bytes."""


def pool_check(pool: Pool[SlotProcess], queue_length: int) -> Check:
    """Fails when the queue is full: more work would be refused."""

    async def look() -> Found:
        stats = pool.stats()
        figures = {
            "processes": stats.processes,
            "max_processes": stats.max_processes,
            "spares": stats.spares,
            "waiting": stats.waiting,
        }
        return Found(stats.waiting < queue_length or queue_length == 0, figures)

    return Check("pool", look)


def processes_check(pool: Pool[SlotProcess]) -> Check:
    """Fails when processes cannot be started: there are none, and starting them failed since the last look."""
    seen = 0

    async def look() -> Found:
        nonlocal seen
        stats = pool.stats()
        failed, seen = stats.spawn_failures - seen, stats.spawn_failures
        alive = sum(slot.alive for slot in stats.slots if slot.pid is not None)
        figures = {"alive": alive, "spawn_failures": stats.spawn_failures, "crashes": stats.crashes}
        return Found(alive > 0 or not failed, {**figures, "stop_failures": stats.stop_failures})

    return Check("processes", look)


def memory_check(reader: MemoryReader) -> Check:
    """Below 90 % of what this server may use."""

    async def look() -> Found:
        used, stalled = reader.share(), reader.stalled()
        return Found(used is None or used < _MEMORY_SHARE, {"used_share": used, "stalled_percent": stalled})

    return Check("memory", look)


def disk_check(directory: Path) -> Check:
    """The data directory's file system has room, for bytes and for files."""

    async def look() -> Found:
        now = await asyncio.to_thread(os.statvfs, directory)
        free = now.f_bavail * now.f_frsize
        used = 1 - now.f_bavail / now.f_blocks if now.f_blocks else 0.0
        files = 1 - now.f_favail / now.f_files if now.f_files else 0.0
        ok = free > _DISK_BYTES and files < _DISK_SHARE
        return Found(ok, {"free_bytes": free, "used_share": round(used, 4), "files_share": round(files, 4)})

    return Check("disk", look)


def database_check(database: Database) -> Check:
    """Answers a query."""

    async def look() -> Found:
        async with database.read() as tx:
            await tx.execute(sa.text("SELECT 1"))
        return Found(ok=True, figures={"kind": database.dialect})

    return Check("database", look)


def redis_check(state: SharedState) -> Check:
    """Answers a ping. Does not matter to readiness: every replica shares it, and limits have a policy for its absence."""

    async def look() -> Found:
        await state.ping()
        return Found(ok=True)

    return Check("redis", look, matters=False)


def blobs_check(blobs: BlobStore) -> Check:
    """A small blob can be read, and written where it is not there: a lost mount reads as empty. Does not matter to
    readiness: every replica shares the store, and conversations go on without it.
    """

    async def look() -> Found:
        if await blobs.get(_PROBE, limit=64) is None:
            await blobs.put(_PROBE, b"ok")
        return Found(ok=True)

    return Check("blobs", look, matters=False)


def upstream_check(broker: Broker) -> Check:
    """No breaker is open. Does not matter to readiness: other replicas have the same upstream."""

    async def look() -> Found:
        views = broker.breakers()
        counts = {state.value: sum(view.state is state for view in views) for state in (State.OPEN, State.HALF_OPEN)}
        waits = [round(view.retry_after, 1) for view in views if view.state is State.OPEN]
        figures = {"breakers": counts, "retry_after": min(waits) if waits else None}
        return Found(not counts[State.OPEN.value], figures)

    return Check("upstream", look, matters=False)


def loop_check(lag: LoopLag) -> Check:
    """The event loop was at most a second late within the last minute. A restart would not help: the load would stay."""

    async def look() -> Found:
        figures = {"lag_seconds": round(lag.last, 4), "worst_seconds": round(lag.worst, 4)}
        return Found(lag.last < _LAG_SECONDS, figures)

    return Check("loop", look, matters=False)


def all_checks(
    settings: Settings,
    data_dir: Path,
    pool: Pool[SlotProcess],
    *,
    database: Database,
    state: SharedState,
    broker: Broker,
    blobs: BlobStore,
    memory: MemoryReader,
    lag: LoopLag,
) -> list[Check]:
    """Every check that this configuration has."""
    return [
        pool_check(pool, settings.queue_length),
        processes_check(pool),
        memory_check(memory),
        disk_check(data_dir),
        database_check(database),
        *([redis_check(state)] if settings.redis_url else []),
        blobs_check(blobs),
        upstream_check(broker),
        loop_check(lag),
    ]
