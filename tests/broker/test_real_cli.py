"""The real CLI behind an endpoint: priming, the placeholder, a failing upstream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.world import MODEL, Process, World, binding, turn
from claude_wrapper.broker import SYSTEM_PLACEHOLDER

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

FIRST = "6f4a1c8e-1111-4222-8333-444455556666"


class Cli:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def send(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line).encode() + b"\n")
        await self._process.stdin.drain()

    async def until(self, kind: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            frame = json.loads(await self._process.stdout.readline())
            if frame["type"] == kind:
                return frame

    async def control(self, **request: Any) -> dict[str, Any]:
        await self.send({"type": "control_request", "request_id": "r", "request": request})
        return await self.until("control_response")

    async def ask(self, text: str, uuid: str | None = None) -> dict[str, Any]:
        message = {"role": "user", "content": text}
        line = {"type": "user", "message": message, "parent_tool_use_id": None, "session_id": ""}
        await self.send(line | ({"uuid": uuid} if uuid else {}))
        return await self.until("result")


@asynccontextmanager
async def cli(
    real_cli: Path, tmp: Path, process: Process, *, tools: str = "", env: dict[str, str] | None = None
) -> AsyncIterator[Cli]:
    home, work = tmp / "home", tmp / "work"
    home.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    started = await asyncio.create_subprocess_exec(
        real_cli,
        *[
            "-p",
            "--input-format",
            "stream-json",
            "--output-format",
            "stream-json",
            "--verbose",
            "--include-partial-messages",
        ],
        *["--permission-prompt-tool", "stdio", "--strict-mcp-config", "--bare", "--setting-sources"],
        *("", "--tools", tools, "--model", MODEL),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=work,
        limit=2**24,
        env={
            "HOME": str(home),
            "PATH": "/usr/bin:/bin",
            "ANTHROPIC_BASE_URL": process.endpoint.base_url,
            "ANTHROPIC_API_KEY": process.endpoint.token,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_AUTOUPDATER": "1",
            "CLAUDE_CODE_MAX_RETRIES": "0",
            **(env or {}),
            **({"ANTHROPIC_UNIX_SOCKET": str(process.endpoint.socket)} if process.endpoint.socket else {}),
        },
    )
    try:
        yield Cli(started)
    finally:
        assert started.stdin is not None
        started.stdin.close()
        try:
            async with asyncio.timeout(5):
                await started.wait()
        except TimeoutError:
            started.kill()
            await started.wait()


@pytest.mark.parametrize("unix", [True, False])
async def test_a_primed_spare_gets_its_system_prompt_and_parameters_with_the_turn(
    world: World, real_cli: Path, tmp_path: Path, unix: bool
) -> None:
    process = await world.process(unix=unix, bound=False)
    endpoint = process.endpoint
    async with asyncio.timeout(30), cli(real_cli, tmp_path, process) as agent:
        await agent.control(subtype="initialize", systemPrompt=[SYSTEM_PLACEHOLDER], hooks=None)
        with endpoint.prime():
            primed = await agent.ask("prime", FIRST)
        assert not primed["is_error"]
        await agent.control(subtype="rewind_conversation", target_message_uuid=FIRST)
        assert not world.upstream.requests

        endpoint.bind(binding(world.upstream.url))
        blocks = [{"type": "text", "text": "You are a parrot."}]
        endpoint.begin(turn(system=blocks, overrides={"max_tokens": 77, "temperature": 1}, placeholder=True))
        answer = await agent.ask("[[say hello there]]")
        (call,) = await endpoint.end()

        # A cut stream: the CLI repeats it without streaming, which is the main request again.
        endpoint.begin(turn(turn="turn_2", system=blocks, overrides={"max_tokens": 78}, placeholder=True))
        repeated = await agent.ask("[[tokens 5]] [[cut 2]]")
        cut, whole = await endpoint.end()
    assert answer["result"] == "hello there"
    assert (call.main, call.status, call.stream_complete) == (True, 200, True)
    first, second, third = world.upstream.requests
    assert [block["text"] for block in first.body["system"]][2:] == ["You are a parrot."]
    assert (first.body["max_tokens"], first.body["temperature"]) == (77, 1)
    assert SYSTEM_PLACEHOLDER not in json.dumps([seen.body for seen in world.upstream.requests])
    assert not repeated["is_error"]
    assert (cut.error_type, cut.main, whole.main, whole.error_type) == ("stream_cut", True, True, None)
    assert (bool(second.body.get("stream")), bool(third.body.get("stream"))) == (True, False)
    assert (second.body["max_tokens"], third.body["max_tokens"]) == (78, 78)
    assert world.noted.faults == []


@pytest.mark.parametrize("status", [401, 429, 529])
async def test_a_failing_upstream_ends_the_turn_at_once_and_the_truth_is_known(
    world: World, real_cli: Path, tmp_path: Path, status: int
) -> None:
    process = await world.process()
    async with asyncio.timeout(30), cli(real_cli, tmp_path, process) as agent:
        await agent.control(subtype="initialize", hooks=None)
        result = await agent.ask(f"[[error {status}]] [[retry-after 100]]")
        assert (await process.endpoint.end())[-1].status == status
    assert result["is_error"]
    assert result["duration_ms"] < 5000
    assert len(world.upstream.requests) == 1
