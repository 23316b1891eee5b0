"""Redis goes away: who holds a session is in the database, so named turns and sessions go on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from anthropic import AsyncAnthropic

from databases import RedisServer
from managed.driving import history, message, new_session, texts, turn
from running_server import KEY, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


async def test_named_turns_and_sessions_go_on_without_redis(own_redis: RedisServer, reachable_tmp_path: Path) -> None:
    settings = {"sandbox": "none", "security_level": "permissive", "redis_url": own_redis.url}
    async with (
        running(reachable_tmp_path, **settings) as server,
        AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0) as client,
    ):
        session = (await new_session(client)).id
        await turn(client, session, message("remember the plum"))
        assert (await server.ask("remember the fig", session_id="chat")).status == 200
        await asyncio.to_thread(own_redis.kill)
        named = await server.ask("[[recall]]", session_id="chat")
        assert named.status == 200, named.body
        assert "remember the fig" in named.text
        assert (await server.ask("a new name", session_id="another")).status == 200
        assert "remember the plum" in texts(await turn(client, session, message("[[recall]]")))[0]
        async with server.http.get("/health") as answer:
            assert (await answer.json())["checks"]["redis"]["ok"] is False, "what is missing can be seen"
        await asyncio.to_thread(own_redis.start)
        await turn(client, session, message("and back"))
        assert [one.type for one in await history(client, session)].count("agent.message") == 3
