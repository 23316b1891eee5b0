"""Pools over scripted processes, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import looptime
import pytest

from claude_wrapper.pool import Pool, PoolSettings
from claude_wrapper.testing.clock import SequentialIds
from pool.doubles import FakeProcess, LoopClock, Notebook, ScriptedFactory
from pool.profiles import CHAT

MakePool = Callable[..., Pool[FakeProcess]]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time that passes only while everybody sleeps: waits are exact and take no time."""
    return "asyncio", {"loop_factory": lambda: looptime.new_event_loop(start=0)}


@pytest.fixture
def factory() -> ScriptedFactory:
    return ScriptedFactory()


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
async def make_pool(factory: ScriptedFactory, notebook: Notebook) -> AsyncIterator[MakePool]:
    """Builds pools; afterwards they are closed and nothing of them may be left."""
    pools: list[Pool[FakeProcess]] = []

    def make(**changes: Any) -> Pool[FakeProcess]:
        defaults: dict[str, Any] = {"spares": {CHAT: 1}, "max_processes": 4, "parallel_spawns": 2}
        pool = Pool(
            PoolSettings(**{**defaults, **changes}),
            LoopClock(),
            SequentialIds(),
            factory,
            on_hibernate=notebook.on_hibernate,
            on_lost=notebook.on_lost,
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        await pool.close(0.0)
        assert pool.stats().processes == 0
    assert not factory.running, "a process was left behind"
    left = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("pool-")]
    assert not left, "a task was left behind"
