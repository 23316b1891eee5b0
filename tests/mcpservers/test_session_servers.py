"""Remote MCP servers of sessions: credentials from vaults, tools as configured, and what their clients are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

from managed.driving import MODEL, history, message, texts, turn
from mcpservers.far import Far, far_server
from running_server import KEY, Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

ALLOWED = {"enabled": True, "permission_policy": {"type": "always_allow"}}


@pytest.fixture
async def far() -> AsyncIterator[Far]:
    async with far_server() as one:
        yield one


@pytest.fixture
async def server(reachable_tmp_path: Path) -> AsyncIterator[Running]:
    async with running(reachable_tmp_path, sandbox="none", private_networks=("127.0.0.0/8",)) as one:
        yield one


@pytest.fixture
async def client(server: Running) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0) as one:
        yield one


def toolset(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "mcp_toolset", "mcp_server_name": name, "default_config": ALLOWED, **more}


async def session_with(
    client: AsyncAnthropic, servers: dict[str, str], vaults: list[str] | None = None, **more: Any
) -> Any:
    """A session whose agent has these servers: name → URL."""
    agent = await client.beta.agents.create(
        model=MODEL,
        name="with servers",
        mcp_servers=[{"type": "url", "name": name, "url": url} for name, url in servers.items()],
        tools=[toolset(name, **more) for name in servers],
    )
    environment = await client.beta.environments.create(name="here", config={"type": "cloud"})
    return await client.beta.sessions.create(agent=agent.id, environment_id=environment.id, vault_ids=vaults or [])


async def vault_with(client: AsyncAnthropic, **auth: Any) -> str:
    vault = await client.beta.vaults.create(display_name="tokens")
    await client.beta.vaults.credentials.create(vault.id, auth=auth)
    return vault.id


def call(name: str, text: str) -> dict[str, Any]:
    return message(f'[[tool {name} {{"text": "{text}"}}]] [[then]]')


def errors(events: list[Any]) -> list[tuple[str, str, str]]:
    return [
        (one.error.type, one.error.mcp_server_name, one.error.retry_status.type)
        for one in events
        if one.type == "session.error"
    ]


def told(events: list[Any]) -> list[dict[str, str]]:
    """What the clients were told of the servers' status."""
    return [
        {one["name"]: one["status"] for one in event.servers} for event in events if event.type == "session.mcp_status"
    ]


async def known(server: Running) -> list[dict[str, Any]]:
    async with server.http.get("/v1/mcp/servers") as response:
        return (await response.json())["data"]


async def probed(server: Running, **body: Any) -> dict[str, Any]:
    async with server.http.post("/v1/mcp/probe", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_a_vaults_bearer_reaches_its_server_and_nothing_else(
    client: AsyncAnthropic, server: Running, far: Far, reachable_tmp_path: Path
) -> None:
    far.token, far.streams = "PLANTED-bearer", True
    vault = await vault_with(client, type="static_bearer", token=far.token, mcp_server_url=f"{far.url}/mcp/")
    session = await session_with(client, {"The docs": f"{far.url}/mcp"}, [vault])
    listed = await turn(client, session.id, message("[[field tools]]"))
    (offered,) = {tool["name"] for tool in server.upstream.requests[-1].body["tools"] if "echo" in tool["name"]}
    assert offered.startswith("mcp__The-docs-")
    events = await turn(client, session.id, call(offered, "hello"))
    used = next(one for one in events if one.type == "agent.mcp_tool_use")
    assert (used.mcp_server_name, used.name, used.evaluated_permission) == ("The docs", "echo", "allow")
    assert "echo #1: hello" in texts(events)[0]
    assert set(far.tokens) == {"PLANTED-bearer"}
    assert far.calls["answer"] > 0, "the server's own question was answered"
    everything = repr(await history(client, session.id)) + repr(listed)
    everything += repr([request.body for request in server.upstream.requests])
    everything += "".join(
        path.read_text(errors="replace") for path in (reachable_tmp_path / "data").rglob("*") if path.is_file()
    )
    assert "PLANTED-bearer" not in everything


async def test_an_oauth_token_is_refreshed_when_it_has_ended_and_its_successor_kept(
    client: AsyncAnthropic, far: Far
) -> None:
    far.token = "access-2"  # the first one has ended
    vault = await vault_with(
        client,
        type="mcp_oauth",
        access_token="access-1",
        mcp_server_url=f"{far.url}/mcp",
        refresh={
            "client_id": "us",
            "refresh_token": "refresh-1",
            "token_endpoint": f"{far.url}/token",
            "token_endpoint_auth": {"type": "none"},
        },
    )
    first, second = [await session_with(client, {"docs": f"{far.url}/mcp"}, [vault]) for _ in range(2)]
    assert "echo #1" in texts(await turn(client, first.id, call("mcp__docs__echo", "a")))[0]
    assert "echo #2" in texts(await turn(client, second.id, call("mcp__docs__echo", "b")))[0]
    assert len(far.refreshes) == 1
    far.token = "access-3"  # ends early: the refresh token that came with the last one is used
    events = await turn(client, first.id, call("mcp__docs__echo", "c"))
    assert "echo #3" in texts(events)[0]
    assert [one["refresh_token"] for one in far.refreshes] == [["refresh-1"], ["refresh-2"]]


async def test_a_server_that_cannot_be_used_is_an_event_and_the_others_go_on(
    client: AsyncAnthropic, server: Running, far: Far
) -> None:
    far.token = "good"
    good = await vault_with(client, type="static_bearer", token="good", mcp_server_url=f"{far.url}/mcp")
    servers = {"docs": f"{far.url}/mcp", "denied": f"{far.url}/other", "gone": "http://127.0.0.1:9/mcp"}
    session = await session_with(client, servers, [good])
    events = await turn(client, session.id, call("mcp__docs__echo", "still"))
    assert "echo #1: still" in texts(events)[0]
    assert events[-1].stop_reason.type == "end_turn"
    found = errors(events)
    assert ("mcp_authentication_failed_error", "denied", "exhausted") in found
    assert [one[2] for one in found if one[1] == "gone"] == ["retrying", "exhausted"]
    assert {one[0] for one in found if one[1] == "gone"} == {"mcp_connection_failed_error"}
    assert len(found) == 3
    assert told(events) == [{"docs": "connected", "denied": "needs_auth", "gone": "failed"}]
    status = {one["name"]: one for one in await known(server)}
    assert {name: one["status"] for name, one in status.items()} == {
        "docs": "connected",
        "denied": "needs_auth",
        "gone": "failed",
    }
    assert (status["docs"]["tools"], status["docs"]["server_info"]["name"]) == (["echo", "shout"], "far")
    assert "reached" in status["gone"]["problem"]
    # The next turn tries again, and a credential that came meanwhile is found.
    await client.beta.vaults.credentials.create(
        good, auth={"type": "static_bearer", "token": "good", "mcp_server_url": f"{far.url}/other"}
    )
    again = await turn(client, session.id, call("mcp__denied__echo", "now"))
    assert "echo #2: now" in texts(again)[0]
    assert {one[1] for one in errors(again)} == {"gone"}
    assert told(again) == [{"docs": "connected", "denied": "connected", "gone": "failed"}]
    probes = [{"vault_ids": [good]}, {"authorization_token": "good"}, {"headers": {"Authorization": "Bearer x"}}, {}]
    found = [await probed(server, url=f"{far.url}/mcp", **body) for body in probes]
    assert [one["credential"] for one in found] == ["sent", "sent", "refused", "required"]
    assert [one["status"] for one in found] == ["connected", "connected", "needs_auth", "needs_auth"]
    assert [len(one["tools"]) for one in found] == [2, 2, 0, 0]
    assert len(await known(server)) == 3, "a probe is not one of the organisation's servers"
    # When the session is over, the server is told.
    ended = far.calls["DELETE"]
    await client.beta.sessions.archive(session.id)
    async with asyncio.timeout(10):
        while far.calls["DELETE"] < ended + 2:
            await asyncio.sleep(0.01)  # it is not waited for


async def test_only_enabled_tools_are_offered_and_can_be_called(
    client: AsyncAnthropic, server: Running, far: Far
) -> None:
    configs = [{"name": "shout", "enabled": False}, {"name": "echo", **ALLOWED, "cache_ttl_seconds": 600}]
    session = await session_with(client, {"docs": f"{far.url}/mcp"}, configs=configs)
    await turn(client, session.id, call("mcp__docs__shout", "no"))
    tools = {tool["name"] for tool in server.upstream.requests[-1].body["tools"]}
    assert "mcp__docs__echo" in tools
    assert "mcp__docs__shout" not in tools
    assert far.calls["shout"] == 0
    # A result that its configuration allows to be kept is given again, in other sessions too, and the event says so.
    other_session = await session_with(client, {"docs": f"{far.url}/mcp"}, configs=configs)
    hits = []
    for one in (session, session, other_session):
        events = await turn(client, one.id, call("mcp__docs__echo", "kept"))
        assert "echo #1: kept" in texts(events)[0]
        hits += [getattr(event, "cache_hit", False) for event in events if event.type == "agent.mcp_tool_result"]
    assert hits == [False, True, True]
    metrics = await (await server.http.get("/metrics")).text()
    assert 'cache_requests_total{cache="tool",outcome="hit"} 2.0' in metrics
    assert 'mcp_calls_total{outcome="ok",step="call"} 1.0' in metrics
    # The session's own servers and tools take the agent's place, also under the same name.
    async with far_server() as other:
        other.tools[0]["description"] = "the other one"
        await client.beta.sessions.update(
            session.id,
            agent={
                "mcp_servers": [{"type": "url", "name": "docs", "url": f"{other.url}/mcp"}],
                "tools": [toolset("docs")],
            },
        )
        assert "shout #1: yes" in texts(await turn(client, session.id, call("mcp__docs__shout", "yes")))[0]
        assert other.calls["shout"] == 1


async def test_vaults_that_cannot_be_used_are_refused_when_the_session_is_made(
    client: AsyncAnthropic, far: Far
) -> None:
    variable = await vault_with(
        client,
        type="environment_variable",
        secret_name="API_KEY",
        secret_value="x",
        networking={"type": "unrestricted"},
    )
    with pytest.raises(anthropic.BadRequestError, match=r"vault_ids\[0\].*API_KEY.*TLS"):
        await session_with(client, {"docs": f"{far.url}/mcp"}, [variable])
    with pytest.raises(anthropic.NotFoundError):
        await session_with(client, {"docs": f"{far.url}/mcp"}, ["vlt_01234567890123456789012345"])
