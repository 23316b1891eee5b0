"""Snapshots of live sessions, put together: store, keeper, metrics, upkeep, and how they end with their owners."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.config import Settings
from claude_wrapper.errors import StorageUnavailable, VaultSealed, WrapperError
from claude_wrapper.sessions.journal import Books
from claude_wrapper.sessions.keeping import KeepingWatch, SnapshotKeeper
from claude_wrapper.sessions.records import Session
from claude_wrapper.sessions.snapshots import SnapshotSettings, SnapshotStore
from claude_wrapper.sessions.snapshots.manifest import Bounds
from claude_wrapper.storage.blobs import BlobStore
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.state.heartbeat import holding
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.telemetry.metrics import Metrics
from claude_wrapper.vault.orgkeys import OrgKeys

log = structlog.get_logger(__name__)

_LEASE: Final = "snapshots/collect"
_LEASE_SECONDS: Final = 60.0
_VERSION_SECONDS: Final = 10.0


def snapshot_store(settings: Settings, books: Books, blobs: BlobStore, keys: OrgKeys) -> SnapshotStore:
    """The store with the operator's bounds."""
    bounds = Bounds(total_bytes=settings.snapshot_max_bytes, entries=settings.snapshot_max_files)
    return SnapshotStore(
        books.db, blobs, keys, books.clock, books.ids, settings=SnapshotSettings(bounds=bounds, parallel=2)
    )


def snapshot_keeper(books: Books, store: SnapshotStore, kept_dir: Path, cli: Path, metrics: Metrics) -> SnapshotKeeper:
    """The keeper of this server's conversations."""
    keeper = SnapshotKeeper(books, store, kept_dir, cli_version=version_of(cli), watch=_Watch(metrics))
    metrics.pull("snapshots", lambda: metrics.snapshots_behind.set(keeper.behind))
    return keeper


def version_of(cli: Path) -> Callable[[], str]:
    """What the CLI says that it is, as in `2.1.327 (Claude Code)`; asked once, 25 ms. Empty when it does not say."""

    @functools.cache
    def ask() -> str:
        try:
            done = subprocess.run(
                [str(cli), "--version"], capture_output=True, check=True, timeout=_VERSION_SECONDS, env={}, text=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("cli.version_unknown", cause=type(error).__name__)
            return ""
        return done.stdout.strip()[:64]

    return ask


class _Watch(KeepingWatch):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def saved(self, outcome: str, seconds: float, stored: int) -> None:
        self._count("save", outcome, seconds, stored)

    def restored(self, outcome: str, seconds: float, size: int) -> None:
        self._count("restore", outcome, seconds, size)

    def _count(self, step: str, outcome: str, seconds: float, size: int) -> None:
        self._metrics.snapshots.inc(step=step, outcome=outcome)
        if outcome in {"ok", "previous"}:
            self._metrics.snapshot_seconds.observe(seconds, step=step)
            self._metrics.snapshot_bytes.inc(size, step=step)


def removing(store: SnapshotStore, spawn: Callable[[Coroutine[Any, Any, None]], object]) -> Callable[[Session], None]:
    """What is to be done when a session was deleted."""

    def remove(session: Session) -> None:
        spawn(_remove_quietly(store, session.org_id, session.id))

    return remove


async def _remove_quietly(store: SnapshotStore, org: str, session: str) -> None:
    """The bytes of a deleted session; what is left is collected later."""
    try:
        await store.delete(org, session)
    except WrapperError as error:
        log.warning("snapshot.not_removed", session=session, reason=error.message)


@dataclass(slots=True)
class ErasedSnapshots:
    """An eraser of `tenancy.deletion`."""

    store: SnapshotStore
    name: str = "snapshots"

    async def erase(self, org: str) -> int:
        """How many blobs there were. May be called again."""
        return await self.store.erase(org)


async def collect_snapshots(store: SnapshotStore, books: Books, metrics: Metrics, seconds: float) -> None:
    """Upkeep, until it is cancelled: one replica at a time removes what no session needs any more."""
    while True:
        await books.clock.sleep(seconds)
        try:
            async with holding(books.state, books.clock, _LEASE, books.ids.new("replica"), ttl=_LEASE_SECONDS) as held:
                if held is not None:
                    await collect_all(store, books.db, books.clock, metrics)
        except StorageUnavailable as error:
            log.warning("snapshots.not_collected", reason=error.message)


async def collect_all(store: SnapshotStore, db: Database, clock: Clock, metrics: Metrics) -> None:
    """Once, for every organisation. Raises StorageUnavailable when the organisations cannot be read."""
    for org in await _organizations(db):
        began = clock.monotonic()
        try:
            collected = await store.collect(org)
        except (StorageUnavailable, VaultSealed) as error:
            metrics.snapshots.inc(step="collect", outcome="error")
            log.warning("snapshots.not_collected", org=org, reason=error.message)
            continue
        metrics.snapshots.inc(step="collect", outcome="ok")
        metrics.snapshot_seconds.observe(clock.monotonic() - began, step="collect")
        metrics.snapshot_bytes.inc(collected.bytes, step="collect")
        if collected.blobs or collected.left:
            log.info("snapshots.collected", org=org, blobs=collected.blobs, bytes=collected.bytes, left=collected.left)


# tenant-scope: upkeep of the server for all organisations
async def _organizations(db: Database) -> list[str]:
    async def read(tx: AsyncConnection) -> list[str]:
        return list((await tx.execute(sa.select(organizations.c.id))).scalars())

    return await db.query(read)
