"""The level `none`: an ordinary child, cleaned up as well as an ordinary child can be."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import Level, SlotDirs, processes
from claude_wrapper.sandbox.none import NoSandbox
from sandbox.doubles import SHELL, eventually, one_turn, run, shell_spec, spawn

pytestmark = [pytest.mark.anyio, pytest.mark.process]


@pytest.fixture
def sandbox() -> NoSandbox:
    return NoSandbox(unix_socket=True)


@pytest.fixture
def dirs(sandbox: NoSandbox, tmp_path: Path) -> Iterator[SlotDirs]:
    made = sandbox.create_dirs(tmp_path / "slots" / "slot_one", None)
    yield made
    sandbox.remove_dirs(made)
    assert not made.root.exists()


@pytest.mark.real_cli
async def test_the_real_cli_answers_a_turn(sandbox: NoSandbox, dirs: SlotDirs, real_cli: Path) -> None:
    assert (await one_turn(sandbox, dirs, real_cli))["result"] == "pong"


async def test_the_process_gets_the_environment_that_was_asked_for_and_nothing_else(
    sandbox: NoSandbox, dirs: SlotDirs
) -> None:
    os.environ["SECRET_OF_THE_SERVER"] = "1"
    try:
        _, out, _ = await run(sandbox, dirs, "/usr/bin/env")
    finally:
        del os.environ["SECRET_OF_THE_SERVER"]

    names = {line.split("=")[0] for line in out.splitlines()}
    assert names <= {"PATH", "HOME", "LANG", "PWD", "_", "SHLVL", "OLDPWD"}


async def test_directories_are_closed_to_everybody_else(dirs: SlotDirs) -> None:
    for directory in (dirs.root, dirs.home, dirs.work, dirs.run):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


async def test_paths_inside_are_the_hosts_and_there_is_no_socket_unless_asked(dirs: SlotDirs) -> None:
    layout = NoSandbox().layout(dirs, SHELL)

    assert Path(layout.home) == dirs.home
    assert layout.socket is None
    assert NoSandbox().level is Level.NONE


async def test_a_uid_is_refused_instead_of_ignored(sandbox: NoSandbox, tmp_path: Path) -> None:
    with pytest.raises(SandboxUnavailable, match="takes no uid"):
        sandbox.create_dirs(tmp_path / "other", 300_001)


async def test_kill_ends_children_that_left_the_session(sandbox: NoSandbox, dirs: SlotDirs) -> None:
    script = "setsid sleep 300 >/dev/null 2>&1 & sleep 300 & echo $!; setsid sh -c 'sleep 300 & sleep 300' & wait"
    process = await spawn(sandbox.prepare(shell_spec(sandbox, dirs, script)))
    assert process.stdout is not None
    async with asyncio.timeout(10):
        await process.stdout.readline()

    await sandbox.kill(process.pid, dirs)
    await process.wait()

    home = b"HOME=" + os.fsencode(dirs.home)
    assert [found for found in processes.all_processes() if processes.environment_has(found.pid, home)] == []


async def test_a_frozen_tree_stands_still_and_goes_on_after_thaw(sandbox: NoSandbox, dirs: SlotDirs) -> None:
    process = await spawn(sandbox.prepare(shell_spec(sandbox, dirs, "read x; echo got $x")))
    try:
        sandbox.freeze(process.pid, dirs)
        async with asyncio.timeout(10):
            await eventually(lambda: (found := processes.read_process(process.pid)) is not None and found.state == "T")
        sandbox.thaw(process.pid, dirs)
        async with asyncio.timeout(10):
            out, _ = await process.communicate(b"it\n")
        assert out == b"got it\n"
    finally:
        await sandbox.kill(process.pid, dirs)
        await process.wait()
