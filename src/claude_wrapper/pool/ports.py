"""What the pool needs from outside: processes, and somebody who keeps the state of idle sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

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
        """Resident bytes, `None` when unknown. Called after each turn: must not block."""
        ...

    async def rewind(self) -> bool:
        """Wipe the session out of the process and its workspace; False when something may be left."""
        ...

    async def stop(self, reason: str) -> None:
        """End the process and clean up its place, also when it has ended by itself.

        Called a second time when the first call failed, was cancelled or took longer than `stop_seconds`.
        """
        ...

    def on_exit(self, callback: Callable[[], None], /) -> None:
        """Call `callback` in the event loop's thread when the process ends, soon if it has ended already."""
        ...


P = TypeVar("P", bound=Process)
P_co = TypeVar("P_co", bound=Process, covariant=True)
P_contra = TypeVar("P_contra", bound=Process, contravariant=True)


class SlotFactory(Protocol[P_co]):
    """Where processes come from."""

    async def spawn(self, slot: str, profile: Any, resume: Any) -> P_co:
        """A running process for this slot.

        `profile` and `resume` are what the settings or the claim said. Raises `SpawnFailed` and then, as when it is
        cancelled, leaves nothing behind.
        """
        ...


class OnHibernate(Protocol[P_contra]):
    """Keeps the state of an idle session before its process goes (or, for `Reason.REUSE`, is rewound for another)."""

    async def __call__(self, session: str, slot: str, process: P_contra, reason: Reason, /) -> Any:
        """Keep what is needed to continue the session elsewhere. Nobody else has the process meanwhile.

        Returns launch data (`ClaimRequest.resume`) for claims of this session that wait already, or `None` when any
        process will do for them. Whoever makes later claims passes it himself.
        """
        ...


class OnLost(Protocol):
    """Learns, before the next decision, that the process of an idle session ended by itself. Must not block."""

    def __call__(self, session: str, slot: str, /) -> None: ...
