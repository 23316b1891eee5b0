"""A real server in this process: real sandbox, real CLI, scripted upstream, real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from claude_wrapper.app import Server
from claude_wrapper.cli.serve import serve
from claude_wrapper.config import Settings
from claude_wrapper.testing.upstream import ScriptedUpstream

KEY = "sk-cw-test-operator-key"


@dataclass
class Running:
    """A server under test and what is around it."""

    url: str
    server: Server
    upstream: ScriptedUpstream
    http: aiohttp.ClientSession

    async def ask(
        self,
        text: str,
        *,
        history: list[dict[str, Any]] | None = None,
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> Answer:
        """One non-streaming request with the operator's key."""
        body = {
            "model": "claude-sonnet-5-5",
            "max_tokens": 1024,
            "messages": [*(history or []), {"role": "user", "content": text}],
            **fields,
        }
        data = io.BytesIO(json.dumps(body).encode())
        sent = {"content-type": "application/json", **(headers or {})}
        async with self.http.post("/v1/messages", data=data, headers=sent) as response:
            return Answer(response.status, dict(response.headers), await response.json())


@dataclass
class Answer:
    """A response, read."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def text(self) -> str:
        return "".join(block["text"] for block in self.body["content"] if block["type"] == "text")

    @property
    def pid(self) -> int:
        return int(self.headers["cw-process-pid"])


@contextlib.asynccontextmanager
async def running(directory: Path, **overrides: Any) -> AsyncIterator[Running]:
    """Start a server with these settings; stop it and check that nothing is left."""
    directory.mkdir(exist_ok=True)
    directory.chmod(0o711)
    async with ScriptedUpstream() as upstream:
        settings = Settings(
            **{
                "data_dir": directory / "data",
                "port": 0,
                "admin_key": KEY,
                "upstream_url": upstream.url,
                "anthropic_api_key": "sk-ant-real-secret",
                "log_level": "error",
                "spares": 1,
                "agent_spares": 0,
                "drain_seconds": 10.0,
            }
            | overrides
        )
        stop = asyncio.Event()
        started: asyncio.Future[tuple[str, Server]] = asyncio.get_running_loop().create_future()
        serving = asyncio.ensure_future(
            serve(settings, announce=lambda url, server: started.set_result((url, server)), stop=stop)
        )
        async with asyncio.timeout(60):
            await asyncio.wait([serving, asyncio.ensure_future(_settled(started))], return_when="FIRST_COMPLETED")
        if not started.done():
            await serving
        url, server = started.result()
        try:
            async with aiohttp.ClientSession(url, headers={"authorization": f"Bearer {KEY}"}) as http:
                yield Running(url, server, upstream, http)
        finally:
            stop.set()
            async with asyncio.timeout(60):
                await serving


async def _settled(future: asyncio.Future[Any]) -> None:
    await asyncio.wait({future})
