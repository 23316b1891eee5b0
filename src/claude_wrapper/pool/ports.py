"""What the pool needs from outside: processes, and somebody who keeps the state of idle sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from claude_wrapper.pool.slot import Reason


class Process(Protocol):
    """A running, initialised Claude process in its slot."""

    @property
    def pid(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    def freeze(self) -> None:
        """Take the CPU from it. An `OSError` means that it is no longer there."""
        ...

    def thaw(self) -> None:
        """Give the CPU back. An `OSError` means that it is no longer there."""
        ...

    def memory_bytes(self) -> int | None:
        """Resident bytes, `None` when unknown. Called often: must not block."""
        ...

    async def rewind(self) -> bool:
        """Wipe the session out of the process and its workspace; False when something may be left."""
        ...

    async def stop(self, reason: str) -> None:
        """End the process and clean up its place. Called once or twice, also when it has ended by itself."""
        ...

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the event loop's thread when the process ends, at once if it has ended."""
        ...


class SlotFactory(Protocol):
    """Where processes come from."""

    async def spawn(self, slot: str, profile: Any, resume: Any) -> Process:
        """A running process for this slot.

        `profile` and `resume` are what the claim or the settings said. Raises `SpawnFailed` and then, or when it is
        cancelled, leaves nothing behind.
        """
        ...


class Keeper(Protocol):
    """Who keeps the state of a session whose process goes."""

    async def on_hibernate(self, session: str, slot: str, process: Process, reason: Reason) -> None:
        """Keep what is needed to continue the session elsewhere. Nobody else has the process meanwhile."""
        ...

    async def on_lost(self, session: str, slot: str) -> None:
        """The process of an idle session ended by itself."""
        ...


class KeepsNothing:
    """For pools whose sessions need no state beyond the process (and for tests)."""

    async def on_hibernate(self, session: str, slot: str, process: Process, reason: Reason) -> None:
        return None

    async def on_lost(self, session: str, slot: str) -> None:
        return None
