"""The port between a connection and the process behind it: bytes in, bytes out, one way to end.

`subprocess.ProcessTransport` is the real one; the tests drive a connection through a scripted one in memory.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol


class Ending(enum.StrEnum):
    """What it took to end a process."""

    BY_ITSELF = "by_itself"
    """It ended before it was asked to."""
    END_OF_INPUT = "end_of_input"
    TERMINATED = "terminated"
    KILLED = "killed"
    UNKNOWN = "unknown"
    """It did not end within its bounds; a process in uninterruptible sleep does that."""


@dataclass(frozen=True, slots=True)
class ExitReport:
    """How a process ended."""

    returncode: int | None
    """As in subprocess: negative for a signal; None when it is not known to have ended."""
    ending: Ending
    seconds: float
    """From the request to stop until everything was gone."""
    stderr_tail: str


class Transport(Protocol):
    """One process's pipes. Every method may be called after the end."""

    @property
    def pid(self) -> int:
        """The spawned process; stays reserved until the transport has reaped it."""
        ...

    @property
    def main_pid(self) -> int:
        """The CLI itself as the host sees it."""
        ...

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        ...

    @property
    def stderr_tail(self) -> str:
        """The end of what it wrote to stderr."""
        ...

    async def read(self) -> bytes:
        """The next bytes of stdout, in any chunking; empty at the end. One reader at a time."""
        ...

    async def write(self, line: bytes) -> None:
        """Give `line` to stdin as a whole, in order, and wait until it is nearly read.

        Raises AgentCrashed when the process no longer reads. Cancelling the wait does not take the line back.
        """
        ...

    async def exited(self) -> int | None:
        """Return when the process has ended; its exit code."""
        ...

    async def stop(self, *, grace: float, term_grace: float) -> ExitReport:
        """End of input, then SIGTERM after `grace` seconds, then the kill of everything after `term_grace` more.

        Returns when nothing of the process is left, within a bounded time. Called again it joins the ending that is
        under way, whatever the arguments. Safe to cancel: the ending goes on.
        """
        ...

    def hurry(self) -> None:
        """Cut a polite ending short: SIGKILL now."""
        ...

    def abort(self) -> None:
        """Kill at once, without awaiting: the last resort when the event loop itself is going away."""
        ...

    def freeze(self) -> None:
        """Stop the process until `thaw`; it costs no processor time meanwhile."""
        ...

    def thaw(self) -> None:
        """Let it run again."""
        ...
