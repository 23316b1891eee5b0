"""Remote MCP servers: reached with credentials that the process never sees, and only where they may be."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from broker.test_egress import LOOPBACK, Names
from claude_wrapper.broker import FixedHeaders, McpServer
from claude_wrapper.broker.bridge import McpBridge
from claude_wrapper.broker.mcp import McpAsk, McpClient
from claude_wrapper.errors import InvalidRequest, PermissionDenied
from claude_wrapper.wire.extensions import check_headers

pytestmark = pytest.mark.anyio

TOKEN = "mcp-secret-token"
CREDENTIAL = FixedHeaders({"Authorization": f"Bearer {TOKEN}"})
INITIALIZE = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": {}}
CALL = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "add"}}
Handle = Callable[[web.Request], Any]


class Remote:
    """A small Streamable HTTP server; `handle` may replace its answer."""

    def __init__(self) -> None:
        self.seen: list[Mapping[str, str]] = []
        self.handle: Handle | None = None
        self.port = 0
        self.streams = False

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.seen.append({name.lower(): value for name, value in request.headers.items()} | {":": request.method})
        if self.handle is not None:
            return await self.handle(request)  # type: ignore[no-any-return]
        if request.method != "POST":
            return web.Response(status=200)
        message = await request.json()
        if "id" not in message:
            return web.Response(status=202)
        result = {"protocolVersion": "2025-06-18"} if message["method"] == "initialize" else {"echo": message["method"]}
        answer = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        if not self.streams:
            return web.json_response(answer, headers={"mcp-session-id": "s1", "x-echo": TOKEN})
        progress = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {}}
        text = "".join(f"event: message\ndata: {json.dumps(each)}\n\n" for each in (progress, answer))
        return web.Response(text=text, content_type="text/event-stream", headers={"mcp-session-id": "s1"})


@asynccontextmanager
async def remote() -> AsyncIterator[Remote]:
    made = Remote()
    runner = web.ServerRunner(web.Server(made), shutdown_timeout=0.1)  # type: ignore[arg-type]
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.port = runner.addresses[0][1]
    try:
        yield made
    finally:
        await runner.cleanup()


@asynccontextmanager
async def client(names: Names | None = None, **changes: Any) -> AsyncIterator[McpClient]:
    made = McpClient(**({"permitted": LOOPBACK, "resolver": names} | changes))
    await made.start()
    try:
        async with asyncio.timeout(20):
            yield made
    finally:
        await made.close()


def server(port: int, path: str = "/mcp", host: str = "127.0.0.1", **changes: Any) -> McpServer:
    return McpServer(**({"name": "docs", "url": f"http://{host}:{port}{path}", "credential": CREDENTIAL} | changes))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_checked_again_and_carry_no_credential_to_another_origin(status: int) -> None:
    async with remote() as near, remote() as far, client() as made:
        there = f"http://127.0.0.1:{far.port}/mcp"

        async def redirect(request: web.Request) -> web.Response:
            return web.Response(status=status, headers={"location": there})

        near.handle = redirect
        answer = await made.ask(server(near.port), McpAsk("POST", [("mcp-session-id", "s")], b"{}"))
        answer.close()
        followed = status in {307, 308}
        assert (len(far.seen), answer.status == status) == (followed, not followed)
        assert not followed or not {"authorization", "mcp-session-id"} & set(far.seen[0])

        there = "http://169.254.169.254/latest/meta-data"
        with pytest.raises(PermissionDenied, match="private"):
            (await made.ask(server(near.port), McpAsk("GET", [], None))).close()


async def test_no_header_of_a_caller_makes_the_next_callers_request_a_part_of_its_own() -> None:
    # The server answers before it has the body that was announced, and the connection is used again.
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            seen.append(data)
            writer.write(b"HTTP/1.1 401 no\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    framing = {"Content-Length": "1000", "Host": "elsewhere.example", "X-Own": "kept"}
    async with listening, client() as mcp:
        ask = McpAsk("POST", [("content-type", "application/json")], b'{"x":1}')
        answer = await mcp.ask(server(port, credential=FixedHeaders(framing)), ask)
        answer.close()
    sent = b"".join(seen).lower()
    assert b"content-length: 7\r\n" in sent
    assert b"x-own: kept" in sent
    assert b"1000" not in sent
    assert b"elsewhere" not in sent
    for name in framing.keys() - {"X-Own"}:
        with pytest.raises(InvalidRequest, match="itself"):
            check_headers({name: framing[name]}, "headers")


async def test_redirects_come_to_an_end() -> None:
    async with remote() as far, client() as made:

        async def again(request: web.Request) -> web.Response:
            return web.Response(status=307, headers={"location": "/mcp"})

        far.handle = again
        with pytest.raises(Exception, match="redirects"):
            await made.ask(server(far.port), McpAsk("POST", [], b"{}"))
        assert len(far.seen) == 4


@pytest.mark.parametrize(
    "url",
    ["http://example.com/mcp", "https://127.0.0.1/mcp", "https://[::1]/mcp", "https://169.254.169.254/", "ftp://x/y", "https://user:password@example.com/", "https:///mcp", "https://inside.example/mcp", "https://2130706433/", "https://169.254.169.254./", "https://127.1./"],
)  # fmt: skip
async def test_private_addresses_and_plain_http_are_refused(url: str) -> None:
    names = Names(**{"inside_example": ["10.0.0.1"], "2130706433": ["127.0.0.1"]})
    async with client(names, permitted=()) as made:
        with pytest.raises(PermissionDenied):
            await made.ask(McpServer("docs", url), McpAsk("POST", [], b"{}"))


async def test_the_address_that_was_checked_is_the_one_that_is_dialled() -> None:
    names = Names(mcp_example=["127.0.0.1"])
    only = (ipaddress.ip_network("127.0.0.1/32"),)
    async with remote() as far, client(names, permitted=only) as made:
        answer = await made.ask(server(far.port, host="mcp.example"), McpAsk("POST", [], json.dumps(CALL).encode()))
        assert answer.status == 200
        answer.close()
        assert far.seen[0]["host"] == f"mcp.example:{far.port}"
        assert names.asked == ["mcp.example"]
        names.table["mcp.example"] = ["127.0.0.2"]
        async with client(names, permitted=only) as other:
            with pytest.raises(PermissionDenied):
                await other.ask(server(far.port, host="mcp.example"), McpAsk("POST", [], b"{}"))


class Expiring:
    """A token that is renewed when it was refused."""

    def __init__(self) -> None:
        self.number = 1

    async def headers(self, *, refused: bool) -> Mapping[str, str]:
        self.number += refused
        return {"Authorization": f"Bearer token-{self.number}"}


async def test_an_expired_token_is_renewed_once() -> None:
    async with remote() as far, client() as made:

        async def guarded(request: web.Request) -> web.Response:
            return web.Response(status=200 if request.headers["authorization"] == "Bearer token-2" else 401)

        far.handle = guarded
        credential = Expiring()
        for expected in (2, 3):
            answer = await made.ask(server(far.port, credential=credential), McpAsk("POST", [], b"{}"))
            answer.close()
            assert (answer.status, len(far.seen), credential.number) == (200, expected, 2)


@pytest.mark.parametrize("streams", [False, True])
async def test_the_bridge_answers_json_rpc_with_json_rpc(streams: bool) -> None:
    async with remote() as far, client() as made:
        far.streams = streams
        bridge = McpBridge(made, server(far.port))
        first = await bridge.send(INITIALIZE)
        assert first is not None
        assert first["result"]["protocolVersion"] == "2025-06-18"
        assert await bridge.send({"jsonrpc": "2.0", "method": "notifications/initialized"}) is None
        assert await bridge.send(CALL) == {"jsonrpc": "2.0", "id": 7, "result": {"echo": "tools/call"}}
        await bridge.close()
        assert [seen.get("mcp-session-id") for seen in far.seen] == [None, "s1", "s1", "s1"]
        assert [seen.get("mcp-protocol-version") for seen in far.seen] == [None, *["2025-06-18"] * 3]
        assert [seen[":"] for seen in far.seen] == ["POST", "POST", "POST", "DELETE"]
        assert all(seen["authorization"] == f"Bearer {TOKEN}" for seen in far.seen)


async def test_servers_that_hang_flood_lie_or_fail_are_json_rpc_errors() -> None:
    async def hang(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        for _ in range(200):
            await response.write(b"x" * 10_000)
        return response

    def fixed(status: int, text: str) -> Handle:
        async def answer(request: web.Request) -> web.Response:
            return web.Response(status=status, text=text, content_type="application/json")

        return answer

    cases: list[tuple[Handle, str]] = [
        (hang, "within 0.2 s"),
        (flood, "larger than 100000 bytes"),
        (fixed(500, "no"), "answered 500"),
        (fixed(202, ""), "did not answer"),
        (fixed(200, "[" * 100_000), "early"),
        (fixed(200, '{"jsonrpc":"2.0","id":8,"result":{}}'), "early"),
    ]
    async with remote() as far, client() as made:
        bridge = McpBridge(made, server(far.port, call_seconds=0.2, max_answer_bytes=100_000))
        for handle, problem in cases:
            far.handle = handle
            answer = await bridge.send(CALL)
            assert answer is not None
            assert answer["id"] == 7
            assert problem in answer["error"]["message"]
            assert TOKEN not in repr(answer)
    async with client() as made:
        unreachable = await McpBridge(made, server(9)).send(CALL)
        assert unreachable is not None
        assert "cannot be reached" in unreachable["error"]["message"]
