"""Stores that go away under open requests: each client is told, none is left hanging."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from claude_wrapper.storage import Database, migrations
from claude_wrapper.testing.stores import PostgresServer, RedisServer
from claude_wrapper.wire.sse import SSEDecoder
from running_server import running

pytestmark = [pytest.mark.anyio, pytest.mark.process]


async def test_a_blob_store_that_is_away_shows_in_health_and_takes_nobody_out_of_service(
    reachable_tmp_path: Path,
) -> None:
    blobs = reachable_tmp_path / "blobs"
    async with running(reachable_tmp_path, spares=0, blob_url=str(blobs)) as server:

        async def health() -> tuple[int, list[str]]:
            async with server.http.get("/health") as response:
                return response.status, (await response.json())["failing"]

        async def becomes(failing: list[str]) -> None:
            async with asyncio.timeout(20):
                while (found := await health()) != (200, failing):
                    assert found[0] == 200, "it does not matter to readiness"
                    await asyncio.sleep(0.1)  # a report is given again for a second

        await becomes([])
        blobs.rename(reachable_tmp_path / "away")
        blobs.write_bytes(b"")  # as after a lost mount: something else is there
        await becomes(["blobs"])
        blobs.unlink()
        (reachable_tmp_path / "away").rename(blobs)
        await becomes([])


async def test_an_event_stream_whose_stores_have_all_gone_ends_with_a_clear_error(
    own_redis: RedisServer, own_postgres: PostgresServer, reachable_tmp_path: Path
) -> None:
    stores = {"redis_url": own_redis.url, "database_url": own_postgres.admin_url}
    database = Database(own_postgres.admin_url)
    await migrations.migrate(database)
    await database.close()
    async with running(reachable_tmp_path, spares=0, **stores) as server:

        async def made(path: str, body: dict[str, object]) -> str:
            async with server.http.post(path, json=body) as response:
                assert response.status == 200, await response.text()
                return str((await response.json())["id"])

        agent = await made("/v1/agents", {"name": "a", "model": "claude-sonnet-5-5"})
        environment = await made("/v1/environments", {"name": "e", "config": {"type": "cloud"}})
        session = await made("/v1/sessions", {"agent": agent, "environment_id": environment})
        async with server.http.get(f"/v1/sessions/{session}/events/stream") as stream:
            assert stream.status == 200
            await asyncio.to_thread(own_redis.kill)  # alone it would not matter: the stream looks into the database
            await asyncio.to_thread(own_postgres.kill)
            async with asyncio.timeout(20):
                events = SSEDecoder().feed(await stream.read())
        last = events[-1]
        assert last.event == "error"
        assert b"storage_unavailable" in last.data
        assert b"req_" in last.data
