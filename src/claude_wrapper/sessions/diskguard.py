"""Stops an agent whose home and workspace outgrow their limit, where no file system of its own holds it.

Measured, not enforced: between two looks an agent can write as fast as the disk takes it. Looking costs in proportion
to the number of files, so a large workspace is looked at less often.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from claude_wrapper.clock import Clock
from claude_wrapper.errors import OutputLimitExceeded, WrapperError
from claude_wrapper.sandbox import disk
from claude_wrapper.sandbox.port import Limits, SlotDirs

log = structlog.get_logger(__name__)

LOOK_SECONDS = 2.0
_SHARE = 20
"""A look may take a twentieth of the time between two."""


async def guard_disk(
    slot: str, dirs: SlotDirs, limits: Limits, clock: Clock, end: Callable[[WrapperError], None]
) -> None:
    """Look until cancelled; when a limit is exceeded, call `end` with the error that names it, and return."""
    if limits.disk_bytes is None and limits.disk_inodes is None:
        return
    pause = LOOK_SECONDS
    while True:
        await clock.sleep(pause)
        began = clock.monotonic()
        used = await asyncio.to_thread(disk.usage, dirs, stop_after=limits.disk_inodes)
        if reason := used.over(limits):
            log.warning("disk.exceeded", slot=slot, bytes=used.disk_bytes, files=used.inodes)
            end(OutputLimitExceeded(f"{reason} (limits: disk_bytes, disk_inodes): the agent was stopped"))
            return
        pause = max(LOOK_SECONDS, _SHARE * (clock.monotonic() - began))
