"""Calls of an MCP tool: straight to the server, through the broker, and answered by a kept result.

`python -m bench.mcp [--calls N]`. The server is a process of its own on loopback, and says what it is asked at once: what
remains is what the way to it costs. The three ways take turns, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import sqlalchemy as sa
from aiohttp import web

from claude_wrapper.broker.bridge import McpBridge
from claude_wrapper.broker.mcp import McpClient
from claude_wrapper.clock import SystemClock
from claude_wrapper.sessions.mcpservers import RemoteSpec, ToolRules
from claude_wrapper.sessions.remotes import Remote, RemoteServers
from claude_wrapper.sessions.spec import Owner
from claude_wrapper.storage import Database, migrations
from claude_wrapper.storage.cache import Bounds, Cache, MemoryStore
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.vault.keys import KeyMaterial, LocalMasterKey
from claude_wrapper.vault.orgkeys import OrgKeys
from claude_wrapper.vault.sealedcache import SealedCache

ORG = "org_bench"
HELLO = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "bench", "version": "1"}},
}


def _call(size: int) -> dict[str, Any]:
    return {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "give", "arguments": {"bytes": size}},
    }


async def _serve() -> None:
    """The server: prints its port, and ends with its standard input."""

    async def answer(request: web.Request) -> web.Response:
        message = await request.json()
        if "id" not in message:
            return web.Response(status=202)
        result: dict[str, Any] = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {}}
        if message["method"] == "tools/call":
            result = {"content": [{"type": "text", "text": "x" * message["params"]["arguments"]["bytes"]}]}
        return web.json_response({"jsonrpc": "2.0", "id": message["id"], "result": result})

    app = web.Application()
    app.router.add_post("/mcp", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


@contextlib.asynccontextmanager
async def _server() -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).resolve()),
        "--serve",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            port = int(await process.stdout.readline())
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.stdin.close()
        await process.wait()


@contextlib.asynccontextmanager
async def _remote(url: str, directory: Path) -> AsyncIterator[tuple[Remote, Remote]]:
    """A connection as a session has it, and one whose results are kept."""
    clock, db = SystemClock(), Database(f"sqlite:///{directory / 'bench.db'}")
    await migrations.migrate(db)
    async with db.transaction() as tx:
        await tx.execute(sa.insert(organizations).values(id=ORG, name=ORG, created_at=clock.now()))
    cache = SealedCache(
        Cache("tool", MemoryStore(clock, Bounds()), clock),
        OrgKeys(db, LocalMasterKey((KeyMaterial(bytes(32)),)), clock),
        clock,
    )
    client = McpClient(permitted=(ipaddress.ip_network("127.0.0.0/8"),))
    await client.start()
    servers = RemoteServers(lambda server: McpBridge(client, server), _NoVaults(), cache=cache)
    plain = await servers.connect(Owner(ORG, "key"), RemoteSpec("bench", url))
    kept = await servers.connect(
        Owner(ORG, "key"), RemoteSpec("bench", url, rules=ToolRules(kept_seconds={"give": 3600.0}))
    )
    for one in (plain, kept):
        await one.exchange(HELLO)
    try:
        yield plain, kept
    finally:
        await client.close()
        await db.close()


class _NoVaults:
    async def credential_for(self, principal: Any, vault_ids: Any, url: str) -> None:
        return None


async def _timed(work: Callable[[], Awaitable[Any]]) -> float:
    began = time.perf_counter()
    await work()
    return (time.perf_counter() - began) * 1000


async def _measure(calls: int, size: int) -> dict[str, float]:
    async with _server() as url, aiohttp.ClientSession() as session:
        with tempfile.TemporaryDirectory() as directory:
            async with _remote(url, Path(directory)) as (plain, kept):

                async def direct() -> None:
                    headers = {"accept": "application/json, text/event-stream"}
                    async with session.post(url, json=_call(size), headers=headers) as answer:
                        json.loads(await answer.read())

                ways = {
                    "direct": direct,
                    "broker": lambda: plain.exchange(_call(size)),
                    "kept": lambda: kept.exchange(_call(size)),
                }
                took: dict[str, list[float]] = {name: [] for name in ways}
                for number in range(calls + 20):
                    for name, work in ways.items():
                        seconds = await _timed(work)
                        if number >= 20:
                            took[name].append(seconds)
    found = {f"{name}_p50_ms": statistics.median(values) for name, values in took.items()}
    found |= {f"{name}_p99_ms": statistics.quantiles(values, n=100)[98] for name, values in took.items()}
    pairs = zip(took["broker"], took["direct"], strict=True)
    return found | {"added_p50_ms": statistics.median(ours - floor for ours, floor in pairs)}


async def _main(options: argparse.Namespace) -> dict[str, Any]:
    if options.serve:
        await _serve()
        return {}
    return {f"call_{size}_bytes": await _measure(options.calls, size) for size in (1_000, 200_000)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=600)
    parser.add_argument("--serve", action="store_true")
    chosen = parser.parse_args()
    found = asyncio.run(_main(chosen))
    if not chosen.serve:
        print(json.dumps(found))
