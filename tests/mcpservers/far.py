"""A remote MCP server of the tests: well-behaved at `/mcp`, with a token if it is told one; hostile elsewhere."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs

from aiohttp import web

Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]
ECHO = {
    "name": "echo",
    "description": "Says it again.",
    "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}},
}


class Far:
    """The server and what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.token: str | None = None
        """What `Authorization: Bearer` must hold."""
        self.tools: list[Any] = [ECHO, {**ECHO, "name": "shout"}]
        self.calls: Counter[str] = Counter()
        """Methods, and names of called tools."""
        self.tokens: list[str | None] = []
        self.messages: list[dict[str, Any]] = []
        self.refreshes: list[dict[str, list[str]]] = []
        self.sessions: set[str] = set()
        self.streams = False
        self.handle: Handle | None = None
        """Answers everything in place of the server, when it is set."""

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            return await self._grant(request)
        if self.handle is not None:
            return await self.handle(request)
        token = request.headers.get("authorization", "").removeprefix("Bearer ") or None
        self.tokens.append(token)
        if self.token is not None and token != self.token:
            return web.Response(status=401, headers={"www-authenticate": "Bearer"})
        if request.method != "POST":
            self.calls[request.method] += 1
            self.sessions.discard(request.headers.get("mcp-session-id", ""))
            return web.Response(status=200 if request.method == "DELETE" else 405)
        return self._answer(request, await request.json())

    def _answer(self, request: web.Request, message: dict[str, Any]) -> web.StreamResponse:
        method = message.get("method", "answer")
        self.calls[method] += 1
        self.messages.append(message)
        session = request.headers.get("mcp-session-id")
        if method == "initialize":
            session = f"s{self.calls['initialize']}"
            self.sessions.add(session)
        elif session not in self.sessions:
            return web.Response(status=404)
        headers = {"mcp-session-id": str(session)}
        if "id" not in message or method == "answer":
            return web.Response(status=202, headers=headers)
        answer = {"jsonrpc": "2.0", "id": message["id"], "result": self._result(method, message.get("params", {}))}
        if not self.streams:
            return web.json_response(answer, headers=headers)
        question = {"jsonrpc": "2.0", "id": "q", "method": "sampling/createMessage", "params": {}}
        text = "".join(f"event: message\ndata: {json.dumps(one)}\n\n" for one in (question, answer))
        return web.Response(text=text, content_type="text/event-stream", headers=headers)

    def _result(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        if method == "initialize":
            return {
                "protocolVersion": params["protocolVersion"],
                "capabilities": {"tools": {}, "prompts": {}},
                "serverInfo": {"name": "far", "version": "1"},
            }
        if method == "tools/list":
            return {"tools": self.tools}
        self.calls[params["name"]] += 1
        said = f"{params['name']} #{self.calls[params['name']]}: {params.get('arguments', {}).get('text')}"
        return {"content": [{"type": "text", "text": said}]}

    async def _grant(self, request: web.Request) -> web.StreamResponse:
        """A token endpoint whose refresh tokens are good for one use."""
        self.refreshes.append(form := parse_qs(await request.text()))
        if form["refresh_token"] != [f"refresh-{len(self.refreshes)}"]:
            return web.json_response({"error": "invalid_grant"}, status=400)
        number = len(self.refreshes) + 1
        self.token = f"access-{number}"
        return web.json_response(
            {"access_token": self.token, "refresh_token": f"refresh-{number}", "expires_in": 3600, "token_type": "x"}
        )


@asynccontextmanager
async def far_server() -> AsyncIterator[Far]:
    """A running one."""
    far = Far()
    runner = web.ServerRunner(web.Server(far), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    far.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield far
    finally:
        await runner.cleanup()


async def hang(request: web.Request) -> web.StreamResponse:
    """Takes the message and says nothing."""
    await asyncio.Event().wait()
    raise AssertionError
