"""What every call needs: the broker's collaborators in one value."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import dataclass

from claude_wrapper.broker.calls import CallSink, Gate, Observer
from claude_wrapper.broker.keeping import Caching
from claude_wrapper.broker.lines import Lines
from claude_wrapper.broker.mcp import McpClient
from claude_wrapper.broker.settings import BrokerSettings
from claude_wrapper.broker.upstream import Upstream
from claude_wrapper.clock import Clock
from claude_wrapper.ids import Ids


class LooseEnds:
    """Clean-up that must run to its end although its call was cancelled. References are kept until it is done."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self, seconds: float) -> None:
        """Wait for all, at most `seconds`; what hangs is cancelled."""
        if not self._tasks:
            return
        _, hanging = await asyncio.wait(self._tasks, timeout=seconds)
        for task in hanging:
            task.cancel()
        if hanging:
            await asyncio.wait(hanging, timeout=1)


@dataclass(frozen=True, slots=True)
class Means:
    """The broker's collaborators."""

    settings: BrokerSettings
    clock: Clock
    ids: Ids
    gate: Gate
    sink: CallSink
    observer: Observer
    upstream: Upstream
    mcp: McpClient
    lines: Lines
    loose_ends: LooseEnds
    rng: random.Random
    """For jitter only."""
    caching: Caching | None = None
    """None: every request is asked."""
