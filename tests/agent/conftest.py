"""Processes for the agent room's tests, and the proof that none of them is left."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from agent.bare import DOUBLES, BareSandbox, running, slot_dirs
from claude_wrapper.agent.connection import Agent
from claude_wrapper.agent.settings import AgentSettings
from claude_wrapper.sandbox.port import Launch

Double = Callable[..., AbstractAsyncContextManager[Agent]]

FAST = AgentSettings(
    control_seconds=0.3,
    answer_seconds=5.0,
    drain_seconds=0.4,
    exit_grace=0.3,
    term_grace=0.3,
    kill_seconds=5.0,
    max_line=2 * 2**20,
    turn_output=4 * 2**20,
)


def double_launch(mode: str, work: Path) -> Launch:
    argv = (sys.executable, "-I", "-S", str(DOUBLES / "double.py"), mode)
    return Launch(argv, {"PATH": "/usr/bin:/bin"}, work)


def descriptors() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue
    return {entry for entry in found if "/proc/" not in entry}


def children() -> set[int]:
    """Living or unreaped children of this process."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        found |= {int(pid) for pid in Path(f"/proc/self/task/{task}/children").read_text().split()}
    return found


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Fails the test when it leaves a child process or a descriptor behind."""
    children_before, descriptors_before = children(), descriptors()
    yield
    if left_since(children_before, descriptors_before):
        gc.collect()  # what only waits for the collector is not a leak; collecting always would cost a second a test
        assert not left_since(children_before, descriptors_before)


def left_since(children_before: set[int], descriptors_before: set[str]) -> set[object]:
    # The event loop of the test outlives this check: its own selector and socket pair are no leak.
    new = {entry for entry in descriptors() - descriptors_before if "eventpoll" not in entry and "socket" not in entry}
    return new | (children() - children_before)


@pytest.fixture
def double(tmp_path: Path, leaves_nothing: None) -> Double:
    """A misbehaving process by its mode; see doubles/double.py."""
    dirs = slot_dirs(tmp_path)

    def start(mode: str, settings: AgentSettings = FAST, sandbox: BareSandbox | None = None) -> object:
        return running(double_launch(mode, dirs.work), dirs, settings=settings, sandbox=sandbox)

    return start  # type: ignore[return-value]


async def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a fact about another process, bounded."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
