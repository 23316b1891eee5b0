"""A workspace that outgrows its limit ends its agent, with an error that names the limit."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from claude_wrapper.clock import SystemClock
from claude_wrapper.errors import OutputLimitExceeded, WrapperError
from claude_wrapper.sandbox import POLICIES, SecurityLevel
from claude_wrapper.sandbox.directories import create
from claude_wrapper.sessions.diskguard import LOOK_SECONDS, guard_disk

pytestmark = pytest.mark.anyio

LIMITS = dataclasses.replace(POLICIES[SecurityLevel.STRICT].limits, disk_bytes=1 << 20, disk_inodes=50)


class Quick(SystemClock):
    """Sleeps are noted, and over at once."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


@pytest.mark.parametrize("what", ["bytes", "files", "sparse", "links"])
async def test_only_what_is_really_taken_counts(tmp_path: Path, what: str) -> None:
    dirs = create(tmp_path / "slot", None)
    ended: list[WrapperError] = []
    clock = Quick()
    guard = asyncio.create_task(guard_disk("slot", dirs, LIMITS, clock, ended.append))
    while len(clock.slept) < 2:
        await asyncio.sleep(0.01)
    assert ended == []

    if what == "bytes":
        (dirs.home / "big").write_bytes(b"x" * (2 << 20))
    elif what == "files":
        for number in range(60):
            (dirs.work / str(number)).touch()
    elif what == "sparse":
        with (dirs.work / "sparse").open("wb") as file:
            file.truncate(1 << 30)
    else:
        (dirs.work / "link").symlink_to("/usr")
    async with asyncio.timeout(20):
        if what in {"bytes", "files"}:
            await guard
            assert isinstance(ended[0], OutputLimitExceeded)
            assert "may " in ended[0].message
        else:
            seen = len(clock.slept)
            while len(clock.slept) < seen + 3:
                await asyncio.sleep(0.01)
            guard.cancel()
            assert ended == []
    assert min(clock.slept) >= LOOK_SECONDS
