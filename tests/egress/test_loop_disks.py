"""Agents with a disk of their own: full is full, and the disk goes along with the conversation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import loopdisk
from running_server import running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

AGENT = {"tools": ["Bash"]}


def _bash(command: str) -> str:
    return f"[[tool Bash {json.dumps({'command': command})}]] [[then]]"


async def test_the_kernel_holds_the_quota_and_a_hibernated_conversation_keeps_its_disk(
    reachable_tmp_path: Path,
) -> None:
    if reason := loopdisk.why_not():
        pytest.skip(f"no disk for each slot on this host: {reason}")
    settings = {"sandbox_disk": "loop", "spares": 0, "max_processes": 1, "queue_seconds": 60.0}
    async with running(reachable_tmp_path, **settings) as server:
        if server.server.sandbox_level == "none":
            pytest.skip("without a sandbox the balanced level has no shell")
        fill = "echo tea > note; for i in $(seq 12); do fallocate -l 250M f$i || break; done; ls f* | wc -l; rm f*; df -h ."
        full = await server.ask(_bash(fill), session_id="a", agent=AGENT)
        assert full.status == 200, full.body
        assert "No space left on device" in full.text
        assert "/dev/loop" in full.text
        kept = [line for line in Path("/proc/mounts").read_text().splitlines() if str(reachable_tmp_path) in line]
        assert len(kept) == 3

        assert (await server.ask("hello", session_id="b")).status == 200  # takes the only place
        again = await server.ask(_bash("cat note"), session_id="a", agent=AGENT)
        assert "tea" in again.text
        assert again.pid != full.pid
    assert str(reachable_tmp_path) not in Path("/proc/mounts").read_text()


async def test_a_host_without_loop_devices_stops_the_start(
    reachable_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loopdisk, "why_not", lambda: "no loop devices")
    with pytest.raises(SandboxUnavailable, match="SANDBOX_DISK=loop: no loop devices"):
        async with running(reachable_tmp_path, sandbox_disk="loop", spares=0):
            pass
