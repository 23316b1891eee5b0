"""Egress through the whole server: what is not on the list is refused, to Bash and by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from claude_wrapper.sandbox import Level, probe
from running_server import running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


async def test_an_agent_is_refused_what_no_list_holds(reachable_tmp_path: Path) -> None:
    if Level.BWRAP in probe().unavailable:
        pytest.skip("no sandbox with a network of its own on this host")
    asks = "curl -sS --max-time 10 https://unlisted.invalid/ 2>&1; curl -sS --max-time 10 http://169.254.169.254/ 2>&1; true"
    async with running(reachable_tmp_path, sandbox="bwrap", spares=0) as server:
        answer = await server.ask(f"[[tool Bash {json.dumps({'command': asks})}]] [[then]]", agent={"tools": ["Bash"]})
        assert answer.status == 200, answer.body
        assert "403" in answer.text
        assert "only CONNECT" in answer.text
