"""Scripted processes in memory, and a clock on the event loop's (virtual) time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from claude_wrapper.errors import SpawnFailed
from claude_wrapper.pool.slot import Reason


class LoopClock:
    """A `Clock` whose monotonic time is the event loop's: with looptime, tests wait hours in no time."""

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.monotonic())

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class FakeProcess:
    """Does what its factory's script says; notes what was done to it."""

    def __init__(self, factory: ScriptedFactory, slot: str, pid: int) -> None:
        self.factory = factory
        self.slot = slot
        self.pid = pid
        self.alive = True
        self.frozen = False
        self.clean = True
        self.resident: int | None = 100
        self._callbacks: list[Callable[[], None]] = []

    def freeze(self) -> None:
        if not self.alive:
            raise ProcessLookupError(self.pid)
        self.frozen = True
        self.factory.log.append(("freeze", self.slot))

    def thaw(self) -> None:
        if not self.alive:
            raise ProcessLookupError(self.pid)
        self.frozen = False
        self.factory.log.append(("thaw", self.slot))

    def memory_bytes(self) -> int | None:
        return self.resident

    async def rewind(self) -> bool:
        self.factory.log.append(("rewind", self.slot))
        await asyncio.sleep(self.factory.rewind_seconds)
        if self.factory.rewind_error is not None:
            raise self.factory.rewind_error
        return self.clean

    async def stop(self, reason: str) -> None:
        assert not self.frozen, "a frozen process cannot hear that it should stop"
        self.factory.log.append(("stop", self.slot, reason))
        if self.factory.stop_errors:
            raise self.factory.stop_errors.pop()
        await asyncio.sleep(self.factory.stop_seconds)
        self.alive = False
        self.factory.running.discard(self)

    def on_exit(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def crash(self, *, silently: bool = False) -> None:
        self.alive = False
        self.factory.running.discard(self)
        if not silently:
            for callback in self._callbacks:
                callback()


class ScriptedFactory:
    """Starts `FakeProcess`es; how long it takes and what fails is set from outside."""

    def __init__(self) -> None:
        self.spawn_seconds = 1.0
        self.rewind_seconds = 0.1
        self.stop_seconds = 0.5
        self.failures: list[BaseException] = []
        self.rewind_error: Exception | None = None
        self.stop_errors: list[Exception] = []
        self.running: set[FakeProcess] = set()
        self.started: list[tuple[str, Any, Any]] = []
        self.log: list[tuple[str, ...]] = []
        self.ignores_cancellation_for = 0.0
        self._pid = 1000

    async def spawn(self, slot: str, profile: Any, resume: Any) -> FakeProcess:
        self.started.append((slot, profile, resume))
        try:
            await asyncio.sleep(self.spawn_seconds)
        except asyncio.CancelledError:
            if not self.ignores_cancellation_for:
                raise
            await asyncio.sleep(self.ignores_cancellation_for)
        if self.failures:
            raise self.failures.pop()
        self._pid += 1
        process = FakeProcess(self, slot, self._pid)
        self.running.add(process)
        return process


def broken_cli() -> SpawnFailed:
    return SpawnFailed("the Claude CLI exited at once")


class Notebook:
    """Keeps sessions' states, and says so."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, str, Reason]] = []
        self.lost: list[tuple[str, str]] = []
        self.seconds = 0.2
        self.resume: Any = None
        self.error: Exception | None = None

    async def on_hibernate(self, session: str, slot: str, process: FakeProcess, reason: Reason) -> Any:
        assert not process.frozen
        process.factory.log.append(("hibernate", slot, session))
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.kept.append((session, slot, reason))
        return self.resume

    def on_lost(self, session: str, slot: str) -> None:
        self.lost.append((session, slot))
