"""Servers that hang, lie, flood, redirect or forget, and results that are kept: without a process around it."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from aiohttp import web

from claude_wrapper.broker.bridge import McpBridge, McpFailed, Outcome
from claude_wrapper.broker.mcp import McpClient, McpServer
from claude_wrapper.clock import SystemClock
from claude_wrapper.sessions.bridge import Bridge, Trouble
from claude_wrapper.sessions.mcpprobe import probe
from claude_wrapper.sessions.mcpservers import RemoteSpec, ToolRules
from claude_wrapper.sessions.remotes import RemoteServers
from claude_wrapper.sessions.spec import Owner
from claude_wrapper.storage import Database
from claude_wrapper.storage.cache import Bounds, Cache, MemoryStore
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.testing.clock import ManualClock
from claude_wrapper.vault.keys import KeyMaterial, LocalMasterKey
from claude_wrapper.vault.orgkeys import OrgKeys
from claude_wrapper.vault.sealedcache import SealedCache
from mcpservers.far import ECHO, Far, far_server, hang

pytestmark = pytest.mark.anyio

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
OWNER = Owner("org_one", "apikey_one")
HELLO = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
}
LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}


def call(tool: str = "echo", **arguments: Any) -> dict[str, Any]:
    params = {"name": tool, "arguments": arguments, "_meta": {"claudecode/toolUseId": "toolu_1"}}
    return {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": params}


class NoVaults:
    async def credential_for(self, principal: Any, vault_ids: Any, url: str) -> None:
        return None


class OneVault:
    """Every organisation's vault has this token, under one id."""

    identity = "vcrd_1"

    async def credential_for(self, principal: Any, vault_ids: Any, url: str) -> OneVault:
        return self

    async def headers(self, *, refused: bool) -> dict[str, str]:
        return {"authorization": "Bearer of the vault"}


class Both:
    """Two organisations that share with each other."""

    async def mutual(self, org: str) -> tuple[str, ...]:
        return ("org_two",) if org == "org_one" else ("org_one",)

    named = mutual


@asynccontextmanager
async def remotes(
    cache: SealedCache | None = None, *, vaults: Any = None, **bounds: Any
) -> AsyncIterator[RemoteServers]:
    client = McpClient(permitted=LOOPBACK)
    await client.start()

    def opened(server: McpServer) -> McpBridge:
        return McpBridge(client, replace(server, **bounds))

    try:
        async with asyncio.timeout(30):
            yield RemoteServers(opened, vaults or NoVaults(), cache=cache)
    finally:
        await client.close()


@pytest.fixture
async def far() -> AsyncIterator[Far]:
    async with far_server() as one:
        yield one


def at(far: Far, path: str = "/mcp", **more: Any) -> RemoteSpec:
    return RemoteSpec("docs", far.url + path, **more)


async def flood(request: web.Request) -> web.StreamResponse:
    """100 MB, or until nobody listens."""
    response = web.StreamResponse(headers={"content-type": "application/json"})
    await response.prepare(request)
    for _ in range(1600):
        await response.write(b"x" * 65_536)
    return response


@pytest.mark.parametrize(
    ("how", "outcome", "words"),
    [
        ("hang", Outcome.TIMEOUT, "within 0.3 s"),
        ("flood", Outcome.TOO_LARGE, "larger than"),
        ("private", Outcome.FORBIDDEN, "private"),
        ("moved", Outcome.STATUS, "302"),
        ("nowhere", Outcome.UNREACHABLE, "no URL"),
        ("denied", Outcome.AUTHENTICATION, "needs a credential"),
        ("broken", Outcome.PROTOCOL, "JSON-RPC"),
        ("refused", Outcome.PROTOCOL, "not today"),
    ],
)
async def test_a_hostile_server_fails_within_its_bounds_and_says_how(
    far: Far, how: str, outcome: Outcome, words: str
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if how == "private":
            return web.Response(status=307, headers={"location": "http://169.254.169.254/latest"})
        if how == "nowhere":
            return web.Response(status=307, headers={"location": "http://[::1"})
        if how == "moved":
            return web.Response(status=302, headers={"location": "/other"})
        if how == "denied":
            return web.Response(status=401)
        if how == "broken":
            return web.Response(text="<html>", content_type="application/json")
        message = await request.json()
        return web.json_response({"jsonrpc": "2.0", "id": message["id"], "error": {"code": 1, "message": "not today"}})

    far.handle = {"hang": hang, "flood": flood}.get(how, answer)
    async with remotes(connect_seconds=0.3, max_answer_bytes=1_000_000) as servers:
        remote = await servers.connect(OWNER, at(far))
        with pytest.raises(McpFailed, match=words) as failed:
            await remote.exchange(HELLO)
        assert failed.value.outcome is outcome
        found = await probe(servers, OWNER, at(far))
        assert found["error"]["type"] == outcome.value
        assert found["reachable"] == (outcome not in {Outcome.TIMEOUT, Outcome.FORBIDDEN, Outcome.UNREACHABLE})
        assert found["status"] == ("needs_auth" if how == "denied" else "failed")


async def test_a_session_that_the_server_forgot_is_begun_again_and_ended_at_the_end(far: Far) -> None:
    far.streams = True
    async with remotes() as servers:
        remote = await servers.connect(OWNER, at(far))
        first = await remote.exchange(HELLO)
        assert first is not None
        assert first["result"]["capabilities"] == {"tools": {"listChanged": False}}
        assert len((await remote.exchange(LIST) or {})["result"]["tools"]) == 2
        far.sessions.clear()
        answer = await remote.exchange(call(text="a"))
        assert answer is not None
        assert answer["result"]["content"][0]["text"] == "echo #1: a"
        assert far.calls["initialize"] == 2
        assert "_meta" not in far.messages[-2]["params"], "what the CLI adds for us stays here"
        assert far.messages[-1]["error"]["code"] == -32601, "a question of the server is answered, with a no"
        await remote.close()
        assert far.calls["DELETE"] == 1
        assert not far.sessions & {"s2"}


async def test_the_transport_of_before_is_found_out_and_must_stay_at_its_origin(far: Far) -> None:
    streams: list[web.StreamResponse] = []
    target, closing = "/messages?session=1", asyncio.Event()

    async def old(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            await response.write(f"event: endpoint\ndata: {target}\n\n".encode())
            streams.append(response)
            await closing.wait()
            return response
        if request.path != "/messages":
            return web.Response(status=405)
        message = await request.json()
        if "id" in message:
            result = far._result(message["method"], message.get("params", {}))
            answer = json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result})
            await streams[-1].write(f"event: message\ndata: {answer}\n\n".encode())
        return web.Response(status=202)

    far.handle = old
    async with remotes(connect_seconds=2) as servers:
        for spec in (at(far, "/sse"), at(far, "/sse", legacy=True)):
            found = await probe(servers, OWNER, spec)
            assert (found["status"], [tool["name"] for tool in found["tools"]]) == ("connected", ["echo", "shout"])
        remote = await servers.connect(OWNER, at(far, "/sse"))
        await remote.exchange(HELLO)
        await remote.exchange(call(text="a"))
        closing.set()  # the stream ends: the next call opens another
        while remote._bridge._legacy is not None and remote._bridge._legacy.open_still:
            await asyncio.sleep(0)
        closing.clear()
        assert (await remote.exchange(call(text="b")) or {})["result"]["content"][0]["text"] == "echo #2: b"
        await remote.close()
        target = "http://127.0.0.1:9/steal"
        found = await probe(servers, OWNER, at(far, "/sse"))
        assert found["error"]["type"] == "forbidden"


async def test_the_bridge_tries_twice_then_lets_the_turn_go_on_and_tries_again_in_the_next(far: Far) -> None:
    told: list[Trouble] = []
    async with remotes(connect_seconds=0.2) as servers:
        bridge = Bridge(servers, OWNER)
        bridge.on_trouble = told.append
        gone = RemoteSpec("gone", "http://127.0.0.1:9/mcp")
        offered, anew = await bridge.serve({}, {"docs": at(far), "gone": gone}, with_client_tools=False)
        assert (set(offered), anew) == ({"docs", "gone"}, frozenset())
        for _ in range(3):
            assert "error" in await bridge.handle("gone", HELLO)
        assert [(one.server, one.final) for one in told] == [("gone", False), ("gone", True)]
        assert "result" in await bridge.handle("docs", HELLO)
        far.handle = hang
        again, anew = await bridge.serve({}, {"docs": at(far), "gone": at(far, "/moved")}, with_client_tools=False)
        assert (again, anew) == (offered, {"gone"})
        assert "error" in await bridge.handle("gone", HELLO)
        assert [one.final for one in told[2:]] == [True], "a server that hangs is waited for once a turn"
        barred = at(far, barred=True)
        await bridge.serve({}, {"docs": barred}, with_client_tools=False)
        assert "allowed_hosts" in (await bridge.handle("docs", HELLO))["error"]["message"]
        local = {"here": {"type": "stdio", "command": "/nothing"}}
        await bridge.serve(local, {}, with_client_tools=False)
        bridge.note_failures({"here": "Connection closed"})
        assert told[-1].event()["error"]["message"] == "The MCP server here could not be started: Connection closed."
        assert (await bridge.serve(local, {}, with_client_tools=False))[1] == {"here"}, "the next turn tries again"
        assert (await bridge.serve(local, {}, with_client_tools=False))[1] == frozenset()
        await bridge.close()


@pytest.fixture
async def sealed(sqlite_url: str) -> AsyncIterator[tuple[SealedCache, ManualClock, MemoryStore]]:
    clock, database = ManualClock(), Database(sqlite_url)
    async with database.transaction() as tx:
        for org in ("org_one", "org_two"):
            await tx.execute(sa.insert(organizations).values(id=org, name=org, created_at=SystemClock().now()))
    keys = OrgKeys(database, LocalMasterKey((KeyMaterial(bytes(32)),)), SystemClock())
    store = MemoryStore(clock, Bounds())
    yield SealedCache(Cache("tool", store, clock), keys, clock), clock, store
    await database.close()


async def test_results_are_kept_for_the_tools_that_are_named_for_one_organisation_and_credential(
    far: Far, sealed: tuple[SealedCache, ManualClock, MemoryStore]
) -> None:
    cache, clock, store = sealed
    rules = ToolRules(kept_seconds={"echo": 60.0})
    spec = at(far, rules=rules)

    async def said(servers: RemoteServers, owner: Owner, spec: RemoteSpec, tool: str = "echo", text: str = "a") -> Any:
        remote = await servers.connect(owner, spec)
        await remote.exchange(HELLO)
        reused: list[bool] = []
        answer = await remote.exchange(call(tool, text=text), reused=lambda: reused.append(True))
        assert answer is not None
        assert answer["id"] == 7
        return answer["result"]["content"][0]["text"], bool(reused)

    async with remotes(cache) as servers:
        together = await asyncio.gather(*(said(servers, OWNER, spec) for _ in range(5)))
        assert {one[0] for one in together} == {"echo #1: a"}
        assert sum(not one[1] for one in together) == 1, "one asks, the others get its answer"
        assert await said(servers, OWNER, spec, text="b") == ("echo #2: b", False)
        assert await said(servers, OWNER, spec, "shout") == ("shout #1: a", False)
        assert await said(servers, OWNER, spec, "shout") == ("shout #2: a", False), "not named: always asked for"
        assert await said(servers, Owner("org_two", "k"), spec) == ("echo #3: a", False)
        other = replace(spec, headers={"Authorization": "Bearer x"})
        assert await said(servers, OWNER, other) == ("echo #4: a", False)
        assert await said(servers, OWNER, spec) == ("echo #1: a", True)
        assert not any(b"echo #" in value for value, _ in store._entries.values())
        await clock.advance(61)
        assert await said(servers, OWNER, spec) == ("echo #5: a", False)
        far.tools = [ECHO]
        far._result = lambda method, params: (  # type: ignore[method-assign]
            Far._result(far, method, params) if method != "tools/call" else {"content": [], "isError": True}
        )
        remote = await servers.connect(OWNER, spec)
        await remote.exchange(HELLO)
        for _ in range(2):
            assert (await remote.exchange(call(text="bad")) or {})["result"]["isError"]
        assert far.calls["tools/call"] == 9, "errors are not kept"


@pytest.mark.parametrize(
    ("changes", "vaults", "shared"),
    [
        ({}, NoVaults(), True),
        ({"vault_ids": ("vlt_1",)}, NoVaults(), True),  # the vault has nothing for this server: nothing was shown
        ({"vault_ids": ("vlt_1",)}, OneVault(), False),
        ({"headers": {"Authorization": "Bearer same"}}, NoVaults(), False),
    ],
)
async def test_partners_are_given_the_results_that_no_credential_saw_and_no_others(
    far: Far,
    sealed: tuple[SealedCache, ManualClock, MemoryStore],
    changes: dict[str, Any],
    vaults: Any,
    shared: bool,
) -> None:
    kept, clock, _ = sealed
    cache = SealedCache(kept._cache, kept._keys, clock, Both())
    spec = replace(at(far, rules=ToolRules(kept_seconds={"echo": 60.0})), **changes)
    hits = []
    async with remotes(cache, vaults=vaults) as servers:
        for org in ("org_two", "org_one"):
            remote = await servers.connect(Owner(org, "k"), spec)
            await remote.exchange(HELLO)
            reused: list[bool] = []
            await remote.exchange(call(text="a"), reused=lambda seen=reused: seen.append(True))  # type: ignore[misc]
            hits.append(bool(reused))
    assert hits == [False, shared]
    assert far.calls["echo"] == (1 if shared else 2)
