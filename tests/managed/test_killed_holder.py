"""The holder is killed in mid-turn, on what an operator runs: its words and its agent's files go on elsewhere."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import boto3
import pytest
from moto.server import ThreadedMotoServer

from claude_wrapper.storage import Database, migrations
from claude_wrapper.testing.upstream import ScriptedUpstream
from databases import PostgresServer, RedisServer, scalar
from managed.driving import history, new_session, say, texts
from managed.workspaces import bash
from replicas import Replica, replica
from running_server import KEY

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

TOOLS = [{"type": "agent_toolset_20260401", "default_config": {"permission_policy": {"type": "always_allow"}}}]
HEADERS = {"authorization": f"Bearer {KEY}"}
TURN = (
    '[[say Reading the note now:]] [[tool Bash {"command":"cat note; stat -c %a note"}]] [[hang 2]] [[once]] [[then]]'
)


@dataclass(frozen=True)
class Place:
    """Where servers keep what outlives them."""

    database_url: str
    settings: dict[str, Any]
    environment: dict[str, str]
    apart: bool
    """Two replicas, each with a data directory of its own; else a server that starts again on its own."""


@pytest.fixture(params=["postgres, redis and s3", "embedded"])
def place(request: pytest.FixtureRequest, reachable_tmp_path: Path) -> Iterator[Place]:
    """Sync, because servers must not be started inside an event loop."""
    if request.param == "embedded":
        yield Place(f"sqlite:///{reachable_tmp_path / 'one/data/claude-wrapper.db'}", {}, {}, apart=False)
        return
    postgres: PostgresServer = request.getfixturevalue("postgres_server")
    state: RedisServer = request.getfixturevalue("redis_server")
    state.flush()
    name = postgres.create()
    asyncio.run(_migrated(postgres.url(name)))
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    endpoint = "http://{}:{}".format(*s3.get_host_and_port())
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys).create_bucket(Bucket="files")
    # As an operator gives them: the environment variables that every S3 client knows.
    environment = {name.upper(): value for name, value in keys.items()}
    environment |= {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}
    settings = {"database_url": postgres.url(name), "redis_url": state.url, "blob_url": "s3://files/snapshots"}
    yield Place(postgres.url(name), settings, environment, apart=True)
    s3.stop()
    postgres.drop(name)


async def _migrated(url: str) -> None:
    db = Database(url)
    await migrations.migrate(db)
    await db.close()


@dataclass(frozen=True)
class Sent:
    """One event of the stream, as it came over the wire."""

    cursor: str
    """What a client gives back as `Last-Event-ID`; empty for what is not in the log (a preview)."""
    type: str
    body: dict[str, Any]


async def streamed(url: str, session: str, after: str) -> AsyncIterator[Sent]:
    """What a client that reconnects sees, until its connection breaks."""
    timeout = aiohttp.ClientTimeout(total=60)
    path = f"{url}/v1/sessions/{session}/events/stream"
    async with (
        aiohttp.ClientSession(headers=HEADERS, timeout=timeout) as http,
        http.get(path, headers={"last-event-id": after}) as stream,
    ):
        assert stream.status == 200
        fields: dict[str, str] = {}
        async for line in stream.content:
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name:
                fields[name] = value
            elif "data" in fields:
                yield Sent(fields.get("id", ""), fields["event"], json.loads(fields["data"]))
                fields = {}


async def turn_seen(one: Replica, session: str, after: str) -> list[Sent]:
    """Events after a cursor, up to and with the next `session.status_idle`."""
    seen = []
    async for event in streamed(one.url, session, after):
        seen.append(event)
        if event.type == "session.status_idle":
            return seen
    raise AssertionError(f"the stream ended: {[one.type for one in seen]}")


async def stored(url: str, session: str) -> None:
    """Return when the session has a snapshot; nothing tells a client, so the database is asked."""
    db = Database(url)
    try:
        async with asyncio.timeout(30):
            while not await scalar(db, "SELECT count(*) FROM session_snapshots WHERE session_id = :one", one=session):
                await asyncio.sleep(0.05)
    finally:
        await db.close()


async def test_a_killed_holders_turn_and_files_go_on_elsewhere(place: Place, reachable_tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(ScriptedUpstream())

        async def server(name: str) -> Replica:
            started = replica(reachable_tmp_path / name, upstream, environment=place.environment, **place.settings)
            return await stack.enter_async_context(started)

        names = ["one", "other"] if place.apart else ["one"]
        old, *others = await asyncio.gather(*map(server, names))
        client = await stack.enter_async_context(old.sdk())
        session = (await new_session(client, tools=TOOLS)).id
        write = bash("echo of the plum > note; chmod 640 note")
        await client.beta.sessions.events.send(session, events=[write])
        seen = await turn_seen(old, session, "0")
        await stored(place.database_url, session)
        calls = len(upstream.calls)
        await say(client, session, TURN)
        async for event in streamed(old.url, session, seen[-1].cursor):
            seen.append(event)
            if event.type == "span.model_request_start":
                break
        await upstream.wait_for(calls + 1)
        old.signal(signal.SIGKILL)
        await old.gone()
        new = others[0] if others else await server("one")
        seen += await turn_seen(new, session, [one.cursor for one in seen if one.cursor][-1])
        async with new.sdk() as client:
            log = await history(client, session)
    kept = [one.body["id"] for one in seen if one.cursor]
    assert kept == [one.id for one in log], "every event once, in the log's order"
    said = texts(log)
    assert said[-2:] == ["Reading the note now:", "Tool said: of the plum\n640"]
    assert said.count("Reading the note now:") == 1
    types = [one.type for one in log]
    assert types.count("session.status_rescheduled") == 1
    assert types.count("agent.tool_use") == types.count("agent.tool_result") == 2
    assert "session.error" not in types, "nothing of the files was missing, so nothing is told"
