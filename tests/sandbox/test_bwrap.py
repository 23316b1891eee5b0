"""What a process in bubblewrap sees, reaches and leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import SlotDirs, processes
from claude_wrapper.sandbox.bwrap import BwrapHost, BwrapSandbox
from claude_wrapper.sandbox.commands import SYSTEM_PATH, find_tools
from sandbox.doubles import (
    host_cgroups,
    limits,
    one_turn,
    run,
    shell_spec,
    spawn,
    why_no_bwrap,
    why_no_uids,
)

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.process,
    pytest.mark.skipif(why_no_bwrap() is not None, reason=str(why_no_bwrap())),
]
needs_uids = pytest.mark.skipif(why_no_uids() is not None, reason=str(why_no_uids()))
TENANT, OTHER = 200_001, 200_002


@pytest.fixture
def slots(open_tmp: Path) -> Path:
    return open_tmp / "slots"


@pytest.fixture
def sandbox() -> Iterator[BwrapSandbox]:
    tree = host_cgroups()
    uids = why_no_uids() is None
    yield BwrapSandbox(BwrapHost(find_tools(SYSTEM_PATH), cgroups=tree, uids=uids, disable_userns=True))
    tree.close()


@pytest.fixture
def uid() -> int | None:
    return TENANT if why_no_uids() is None else None


@pytest.fixture
def dirs(sandbox: BwrapSandbox, slots: Path, uid: int | None) -> Iterator[SlotDirs]:
    made = sandbox.create_dirs(slots / "slot_one", uid)
    yield made
    sandbox.remove_dirs(made)
    assert not made.root.exists()


@pytest.mark.real_cli
async def test_the_real_cli_answers_a_turn_over_the_unix_socket(
    sandbox: BwrapSandbox, dirs: SlotDirs, uid: int | None, open_cli: Path
) -> None:
    result = await one_turn(sandbox, dirs, open_cli, uid=uid)

    assert result["result"] == "pong"
    assert result["is_error"] is False
