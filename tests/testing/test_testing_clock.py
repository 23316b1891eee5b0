"""The clock that is moved by hand."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from claude_wrapper.testing import ManualClock, SequentialIds

pytestmark = pytest.mark.anyio


async def test_sleepers_wake_in_order_and_at_their_own_time() -> None:
    clock = ManualClock()
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, *naps: float) -> None:
        for nap in naps:
            await clock.sleep(nap)
            woken.append((name, clock.monotonic() - 1000))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sleeper("late", 5))
        tasks.create_task(sleeper("chain", 1, 1, 1))
        tasks.create_task(sleeper("early", 2.5))
        await clock.wait_for_sleepers(3)
        await clock.advance(4)
        assert woken == [("chain", 1), ("chain", 2), ("early", 2.5), ("chain", 3)]
        assert clock.sleepers == 1
        await clock.advance(1)
    assert woken[-1] == ("late", 5)


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = ManualClock()
    task = asyncio.ensure_future(clock.sleep(1))
    await clock.wait_for_sleepers()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clock.sleepers == 0
    await clock.advance(2)


async def test_the_wall_clock_may_jump_alone() -> None:
    clock = ManualClock(datetime(2026, 1, 1, tzinfo=UTC))
    clock.jump(-3600)
    assert clock.now() == datetime(2025, 12, 31, 23, tzinfo=UTC)
    assert clock.monotonic() == 1000
    await clock.advance(1.5)
    assert clock.now() == datetime(2025, 12, 31, 23, tzinfo=UTC) + timedelta(seconds=1.5)


async def test_time_needs_a_zone_and_does_not_go_backwards() -> None:
    with pytest.raises(ValueError, match="time zone"):
        ManualClock(datetime(2026, 1, 1))  # noqa: DTZ001
    with pytest.raises(ValueError, match="backwards"):
        await ManualClock().advance(-1)


def test_ids_count_per_prefix() -> None:
    ids = SequentialIds()
    assert [ids.new("turn"), ids.new("turn"), ids.new("slot")] == [f"turn_{1:026d}", f"turn_{2:026d}", f"slot_{1:026d}"]
    assert ids.uuid() != ids.uuid()
