"""The server listens inside a sandbox's own network, with privilege and without."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import Level, choose, loopback, probe, processes
from claude_wrapper.testing.attack.scenery import start

pytestmark = [pytest.mark.anyio, pytest.mark.process]


@pytest.mark.parametrize("way", [loopback.listen_inside, loopback._by_process])
@pytest.mark.parametrize("own_uid", [True, False])
async def test_a_process_inside_reaches_the_server_s_listener(reachable_tmp_path: Path, way, own_uid: bool) -> None:
    report = probe()
    if Level.BWRAP in report.unavailable:
        pytest.skip(f"no sandbox with a network of its own: {report.unavailable[Level.BWRAP]}")
    if own_uid and not report.uids:
        pytest.skip("no uids of their own here")
    uid = 310_200 if own_uid else None
    sandbox = choose("bwrap", None, report, use_uids=own_uid)
    dirs = sandbox.create_dirs(reachable_tmp_path / "slot", uid)
    ask = "bash -c 'exec 3<>/dev/tcp/127.0.0.1/3128 && head -c 5 <&3' 2>/dev/null"
    shell = f"echo up; for i in 1 2 3 4 5 6 7 8 9; do {ask} && exit; sleep 0.2; done"
    process = await start(sandbox, dirs, shell, {}, uid)
    try:
        async with asyncio.timeout(20):
            assert process.stdout is not None
            assert await process.stdout.readline() == b"up\n"
            listener = await asyncio.to_thread(way, processes.children(process.pid)[0], 3128, uid)
            with listener:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                with connection:
                    connection.sendall(b"hello")
                assert await process.stdout.read(5) == b"hello"
    finally:
        await sandbox.kill(process.pid, dirs)
        await process.wait()
        sandbox.remove_dirs(dirs)
        sandbox.close()


def test_a_process_of_the_server_s_own_network_is_refused() -> None:
    with pytest.raises(SandboxUnavailable, match="shares the server's network"):
        loopback.listen_inside(os.getpid(), 3128, None)


async def test_levels_without_a_network_of_their_own_say_why(tmp_path: Path) -> None:
    report = probe()
    for level in (Level.NONE, Level.RESTRICTED):
        if level in report.unavailable:
            continue
        sandbox = choose(level, None, report)
        with pytest.raises(SandboxUnavailable, match="proxy"):
            sandbox.listen_inside(1, 3128, None)
        sandbox.close()
