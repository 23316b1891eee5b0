"""This server among its replicas: its name, its lock on the data directory, its row in the database."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import structlog

from claude_wrapper.clock import Clock
from claude_wrapper.config import Settings
from claude_wrapper.errors import ConfigurationError
from claude_wrapper.ids import Ids
from claude_wrapper.sessions.ownership import Ownership
from claude_wrapper.storage.engine import Database

log = structlog.get_logger(__name__)

LOCK_FILE: Final = "replica"
"""In the data directory: locked by the server that uses it, holds that server's name among the replicas."""
_ANYWHERE: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 (compared, not listened on)


@dataclass(frozen=True, slots=True)
class Named:
    """What this server is called among the replicas."""

    replica: str
    before: str
    """The server that used the data directory before, which is dead; empty if none is known."""


@contextlib.asynccontextmanager
async def running_replica(
    settings: Settings, named: Named, database: Database, clock: Clock, *, listening: str | None
) -> AsyncIterator[Ownership]:
    """Alive among the replicas during the block; afterwards its sessions are free. Raises StorageUnavailable.

    `listening` is the URL that this server listens on.
    """
    address = settings.internal_url or reachable(listening)
    ownership = Ownership(database, clock, replica=named.replica, address=address, lease_seconds=settings.lease_seconds)
    if named.before:
        await ownership.forget_replica(named.before)
    await ownership.renew()
    log.info("replica.started", replica=named.replica, address=address, lease_seconds=settings.lease_seconds)
    if settings.redis_url and address is None:
        log.warning(
            "replica.not_reachable",
            consequence="requests for sessions that are held here are refused by other replicas",
            do="set CLAUDE_WRAPPER_INTERNAL_URL to the address by which they reach this one",
        )
    keeping = asyncio.get_running_loop().create_task(ownership.keep(), name="replica")
    try:
        yield ownership
    finally:
        keeping.cancel()
        await asyncio.wait({keeping})
        await ownership.close()


def reachable(listening: str | None) -> str | None:
    """The address that a server listens on, if others can use it: an address that means all of them cannot be."""
    if listening is None or (urlsplit(listening).hostname or "") in _ANYWHERE:
        return None
    return listening


@contextlib.contextmanager
def named(data_dir: Path, ids: Ids) -> Iterator[Named]:
    """Use the data directory alone. The kernel gives the lock back when its process dies, however it dies.

    Raises ConfigurationError when another server that is running uses it.
    """
    own = ids.new("replica")
    descriptor = os.open(data_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"{data_dir}: another server that is running uses this data directory; "
                "give each its own (CLAUDE_WRAPPER_DATA_DIR)"
            ) from None
        except OSError as error:
            # Some network file systems have no locks: then nothing is known of the server before this one.
            log.warning("replica.no_lock", data_dir=str(data_dir), cause=error.strerror)
            yield Named(own, "")
            return
        before = os.pread(descriptor, 128, 0).decode(errors="replace").strip()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, own.encode(), 0)
        yield Named(own, before)
    finally:
        os.close(descriptor)
