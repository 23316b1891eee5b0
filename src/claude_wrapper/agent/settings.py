"""What bounds one agent process. Times in seconds, sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Bounds of one CLI process; the defaults suit a loaded two-core machine."""

    control_seconds: float = 20.0
    """A control call waits so long for its answer. They take milliseconds; a cold start under load takes seconds."""

    answer_seconds: float = 30.0
    """From a user line to its first frame. The CLI acknowledges a line at once, so silence means that it hangs."""

    turn_seconds: float = 3600.0
    """From a user line to its result. Agents may work long; past this the process is killed."""

    drain_seconds: float = 10.0
    """From the interruption of an abandoned or interrupted turn to its result; an interrupt takes about 16 ms."""

    write_seconds: float = 30.0
    """A line that the process does not read within this time means that it hangs."""

    exit_grace: float = 2.0
    """From end of input to exit, before SIGTERM. The CLI takes 25 ms when idle."""

    term_grace: float = 1.0
    """From SIGTERM to exit, before SIGKILL."""

    kill_seconds: float = 5.0
    """From SIGKILL to exit, and for each later step of cleaning up."""

    max_line: int = 16 * 2**20
    """The longest line on stdout. A longer one breaks the process."""

    turn_output: int = 256 * 2**20
    """All that one turn may print. Past this the turn fails and the process is killed."""

    output_rate: int = 32 * 2**20
    """Bytes a second that are read from one process, averaged over a second; a faster one waits in its pipe."""

    inbox_frames: int = 1024
    """Frames that wait for a slow consumer before the server stops reading the process."""

    inbox_bytes: int = 4 * 2**20
    """The same in bytes; one more line may be added on top."""

    garbage_lines: int = 32
    """Lines that are no frames, over the life of the process, before it counts as broken. They are dropped."""

    asks: int = 32
    """Requests of the process (permissions, hooks, MCP) that may be in progress at once; more are refused."""

    calls: int = 64
    """Control calls to the process that may wait for their answers at once."""

    stderr_bytes: int = 64 * 2**10
    """How much of the end of stderr is kept."""

    waiting_turns: int = 64
    """Turns that may wait behind the running one."""
