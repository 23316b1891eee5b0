"""The original system's requests, verbatim but for the address and what stood as `{...}`."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from claude_wrapper.wire.sse import SSEDecoder
from running_server import Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

TOKENS = {"access_token": "sk-ant-oat01-abc", "refresh_token": "sk-ant-ort01-abc", "expires_at": 1763000000}


async def _curl(url: str, *arguments: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed: apt-get install curl")
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "-N", *arguments, url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode == 0, output
    return output.decode()


def _events(output: str) -> list[dict[str, Any]]:
    return [json.loads(event.data) for event in SSEDecoder().feed(output.encode()) if event.event != "ping"]


async def _pooled(server: Running, text: str, tokens: dict[str, Any] = TOKENS) -> list[dict[str, Any]]:
    body = {"oauth_credentials": tokens, "messages": [{"content": text}], "model": "haiku"}
    return _events(
        await _curl(
            f"{server.url}/v1/messages/pooled",
            "-X", "POST", "-H", "Content-Type: application/json", "-d", json.dumps(body),
        )
    )  # fmt: skip


async def test_the_original_curl_streams_the_clis_events_and_ends_after_the_result(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, allow_oauth=True, spares=0) as server:
        events = await _pooled(server, "OK1")
        assert events[-1]["type"] == "result"
        assert "OK1" in events[-1]["result"]
        sent = server.upstream.calls[-1]
        assert sent.headers["authorization"] == "Bearer sk-ant-oat01-abc"
        assert "oauth-2025-04-20" in sent.headers["anthropic-beta"]
        assert "x-api-key" not in sent.headers
        assert sent.body["model"] == "claude-haiku-4-5"


async def test_two_owners_of_tokens_never_share_a_process(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, allow_oauth=True, spares=0) as server:
        await _pooled(server, "OK1")
        await _pooled(server, "OK2", {"access_token": "sk-ant-oat01-other"})
        stats = await (await server.http.get("/v1/pool/stats")).json()
        assert stats["pool_size"] == 2
        assert len({user["user_id"] for user in stats["active_users"]}) == 2
        assert len({user["pid"] for user in stats["active_users"]}) == 2
        assert (stats["max_idle_time"], stats["cleanup_interval"]) == (300.0, 60.0)


async def test_one_keys_pooled_requests_reuse_its_process_without_sharing_a_conversation(server: Running) -> None:
    async def ask(text: str) -> tuple[int, str]:
        body = {"messages": [{"content": text}], "model": "haiku"}
        async with server.http.post("/v1/messages/pooled", json=body) as response:
            events = _events((await response.read()).decode())
            stats = await (await server.http.get("/v1/pool/stats")).json()
            assert stats["process"]["pid"] == int(response.headers["cw-process-pid"])
            return stats["process"]["pid"], events[-1]["result"]

    first_pid, _ = await ask("my secret is 42")
    second_pid, recalled = await ask("[[recall]]")
    assert second_pid == first_pid
    assert recalled == "[]"


async def test_tokens_are_refused_by_default_and_the_answer_says_why(server: Running) -> None:
    async with aiohttp.ClientSession(server.url) as http:
        body = {"oauth_credentials": TOKENS, "messages": [{"content": "OK1"}], "model": "haiku"}
        async with http.post("/v1/messages/pooled", json=body) as response:
            assert response.status == 403
            message = (await response.json())["error"]["message"]
    assert "CLAUDE_WRAPPER_ALLOW_OAUTH" in message
    assert "provider's terms" in message


async def test_parameters_that_an_oauth_request_cannot_carry_are_refused_by_name(reachable_tmp_path: Path) -> None:
    async with (
        running(reachable_tmp_path, allow_oauth=True, spares=0) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        body = {"oauth_credentials": TOKENS, "messages": [{"role": "user", "content": "x"}], "model": "haiku"}
        async with http.post("/v1/messages", json={**body, "temperature": 0.1, "max_tokens": 5}) as response:
            assert response.status == 400
            assert "max_tokens, temperature" in (await response.json())["error"]["message"]
        async with http.post("/v1/messages", json=body) as response:
            assert (await response.json())["content"][0]["text"] == "You said: x"
