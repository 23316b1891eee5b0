"""What conversations work with: the rooms below them, and the limits that they keep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from claude_wrapper.clock import Clock
from claude_wrapper.ids import Ids
from claude_wrapper.pool.pool import Pool
from claude_wrapper.sessions.bridge import RemoteConnector
from claude_wrapper.sessions.keeper import Keeper
from claude_wrapper.sessions.process import SlotProcess
from claude_wrapper.sessions.versions import Versions
from claude_wrapper.sessions.watch import Watch


@dataclass(frozen=True, slots=True)
class Rooms:
    """What a conversation works with."""

    pool: Pool[SlotProcess]
    clock: Clock
    ids: Ids
    connect_remote: RemoteConnector
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    """Starts a task and keeps a reference until it ends."""
    max_queued_turns: int = 16
    kept_dir: Path = Path()
    """Where the files of conversations without a process lie."""
    parked_seconds: float = 600.0
    """How long a turn waits for the results of the caller's own tools."""
    watch: Watch = field(default_factory=Watch)
    keeper: Keeper = field(default_factory=Keeper)
    spares_adopt: bool = True
    """Whether files can be moved into the slot of a process that runs: not onto a disk of its own."""
    versions: Versions | None = None
    """Which version of the CLI a conversation gets; None: there is one."""
