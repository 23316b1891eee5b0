"""The holder is killed in mid-turn, on what an operator runs: its words and its agent's files go on elsewhere."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
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


@asynccontextmanager
async def holder(
    place: Place, root: Path
) -> AsyncIterator[tuple[ScriptedUpstream, Replica, Callable[[], Awaitable[Replica]]]]:
    """The upstream, a server, and what gives the one that goes on when it has been killed."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(ScriptedUpstream())

        async def server(name: str) -> Replica:
            started = replica(root / name, upstream, environment=place.environment, **place.settings)
            return await stack.enter_async_context(started)

        old, *others = await asyncio.gather(*map(server, ["one", "other"] if place.apart else ["one"]))

        async def next_holder() -> Replica:
            return others[0] if others else await server("one")

        yield upstream, old, next_holder


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


READ_ASKS = {
    "type": "agent_toolset_20260401",
    "default_config": {"permission_policy": {"type": "always_allow"}},
    "configs": [{"name": "read", "permission_policy": {"type": "always_ask"}}],
}
WRITE_THEN_ASK = {
    "one after the other": '[[tool Bash {"command":"echo of the plum > note"}]] [[then]] [[tool Read {"file_path":"note"}]] [[then]]',
    "in one message": '[[tool Bash {"command":"echo of the plum > note"}]] [[tool Read {"file_path":"note"}]] [[then]]',
}


@pytest.mark.parametrize("prompt", WRITE_THEN_ASK.values(), ids=WRITE_THEN_ASK.keys())
@pytest.mark.parametrize("saved", [True, False], ids=["saved while it waited", "killed before that"])
async def test_a_holder_that_is_killed_while_its_turn_waits_for_an_approval_leaves_the_files(
    place: Place, reachable_tmp_path: Path, prompt: str, *, saved: bool
) -> None:
    async with holder(place, reachable_tmp_path) as (_upstream, old, next_holder), old.sdk() as client:
        session = (await new_session(client, tools=[READ_ASKS])).id
        await say(client, session, prompt)
        seen = await turn_seen(old, session, "0")
        asked = [one for one in seen if one.type == "agent.tool_use"][-1].body["id"]
        assert seen[-1].body["stop_reason"]["event_ids"] == [asked]
        if saved:
            await stored(place.database_url, session)
        old.signal(signal.SIGKILL)
        await old.gone()
        new = await next_holder()
        async with new.sdk() as after:
            allow: Any = {"type": "user.tool_confirmation", "tool_use_id": asked, "result": "allow"}
            await after.beta.sessions.events.send(session, events=[allow])
            await turn_seen(new, session, [one.cursor for one in seen if one.cursor][-1])
            log = await history(after, session)
    told = [one.error.message for one in log if one.type == "session.error"]
    results = [block.text for one in log if one.type == "agent.tool_result" for block in one.content]
    assert sum(one.type == "agent.tool_use" for one in log) == 2
    if saved:
        assert "of the plum" in results[-1]
        assert "of the plum" in texts(log)[-1]
        assert told == [], "nothing of the files was missing, so nothing is told"
    else:
        assert "of the plum" not in results[-1]
        # The client is told of files of calls whose results are in the log, the model of calls that may have run.
        lost = ("No files of this session were stored", "files that it wrote may be missing")
        assert sum(any(one in text for one in lost) for text in (*told, *results)) == 1


async def test_a_killed_holders_turn_and_files_go_on_elsewhere(place: Place, reachable_tmp_path: Path) -> None:
    async with holder(place, reachable_tmp_path) as (upstream, old, next_holder), old.sdk() as client:
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
        new = await next_holder()
        seen += await turn_seen(new, session, [one.cursor for one in seen if one.cursor][-1])
        async with new.sdk() as after:
            log = await history(after, session)
    kept = [one.body["id"] for one in seen if one.cursor]
    assert kept == [one.id for one in log], "every event once, in the log's order"
    said = texts(log)
    assert said[-2:] == ["Reading the note now:", "Tool said: of the plum\n640"]
    assert said.count("Reading the note now:") == 1
    types = [one.type for one in log]
    assert types.count("session.status_rescheduled") == 1
    assert types.count("agent.tool_use") == types.count("agent.tool_result") == 2
    assert "session.error" not in types, "nothing of the files was missing, so nothing is told"
