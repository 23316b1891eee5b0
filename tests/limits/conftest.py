"""Hot counters in memory and in Redis, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from claude_wrapper.limits import Stores, memory_stores, open_client, redis_stores
from claude_wrapper.testing.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def stores(state_kind: str | None, clock: ManualClock, anyio_backend: str) -> AsyncIterator[Stores]:
    """Both adapters. Keys of Redis really expire by its own clock, later than any test ends."""
    if state_kind is None:
        yield memory_stores(clock)
        return
    client = open_client(state_kind)
    yield redis_stores(client, timeout=10, now=clock.monotonic)
    await client.aclose()
