"""A session whose agent has the whole toolset begins on a process that waits for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from anthropic import AsyncAnthropic

from managed.driving import message, new_session, texts, turn
from running_server import KEY, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


async def test_a_session_with_the_whole_toolset_takes_a_spare(reachable_tmp_path: Path) -> None:
    settings = {"sandbox": "none", "security_level": "permissive", "spares": 0, "agent_spares": 1}
    async with (
        running(reachable_tmp_path, **settings) as server,
        AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0) as client,
    ):
        session = await new_session(client, tools=[{"type": "agent_toolset_20260401"}])
        while server.server.pool.stats().spares != {"chat": 0, "agent": 2}:  # bounded by the test's time-out
            await asyncio.sleep(0.05)
        events = await turn(client, session.id, message("hello"))
        assert texts(events) == ["You said: hello"]
        claims = server.server.pool.stats().claims
        assert (claims["spare"], claims["cold"]) == (1, 0)
