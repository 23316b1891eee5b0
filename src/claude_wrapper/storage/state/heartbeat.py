"""Holding a lease for as long as a block runs, and learning at once when it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from claude_wrapper.clock import Clock
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage.state.ports import Lease, Leases

_RELEASE_SECONDS = 2.0


class HeldLease:
    """A lease that is renewed in the background. Check `lost` before every write, or await it."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.lost = asyncio.Event()


@asynccontextmanager
async def holding(
    leases: Leases, clock: Clock, name: str, holder: str, *, ttl: float
) -> AsyncIterator[HeldLease | None]:
    """Hold the lease during the block, renewed every third of `ttl`; None if another holds it.

    While the shared state is away the lease counts as lost as soon as `ttl` has passed since the last renewal: by this
    process's own clock, so a holder that was paused past its lease stops before it writes.
    """
    lease = await leases.acquire(name, holder, ttl=ttl)
    if lease is None:
        yield None
        return
    held = HeldLease(lease)
    beat = asyncio.create_task(_beat(leases, clock, held), name=f"heartbeat {name}")
    try:
        yield held
    finally:
        beat.cancel()
        await asyncio.wait([beat], timeout=_RELEASE_SECONDS)
        if not held.lost.is_set():
            with suppress(StorageUnavailable, TimeoutError):
                async with asyncio.timeout(_RELEASE_SECONDS):
                    await leases.release(lease)


async def _beat(leases: Leases, clock: Clock, held: HeldLease) -> None:
    ttl = held.lease.ttl
    renewed = clock.monotonic()
    while True:
        await clock.sleep(ttl / 3)
        asked = clock.monotonic()
        try:
            if asked - renewed >= ttl or not await leases.renew(held.lease):
                break
            renewed = asked
        except StorageUnavailable:
            if clock.monotonic() - renewed >= ttl:
                break
    held.lost.set()
