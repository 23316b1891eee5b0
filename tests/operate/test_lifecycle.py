"""The server as a process: SIGTERM lets streams end, SIGKILL leaves no process, SIGHUP changes what can change."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox.choose import choose
from claude_wrapper.sandbox.probe import probe
from claude_wrapper.testing.soak.served import ADMIN_KEY, Served, alive, descendants
from claude_wrapper.testing.upstream import ScriptedUpstream

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

SANDBOXES = ["none", "bwrap"]


@contextlib.asynccontextmanager
async def served(
    directory: Path, **settings: str
) -> AsyncIterator[tuple[Served, ScriptedUpstream, aiohttp.ClientSession]]:
    async with ScriptedUpstream() as upstream:
        server = Served(directory / "data", upstream.url, {"spares": "1", "agent_spares": "0", **settings})
        try:
            await server.start()
            async with aiohttp.ClientSession(server.url, headers={"x-api-key": ADMIN_KEY}) as http:
                yield server, upstream, http
        finally:
            await server.close()


def body(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "claude-sonnet-5-5", "max_tokens": 1024, "messages": messages, **fields}


async def eventually(what: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.02)


def sandbox_or_skip(level: str) -> str:
    try:
        choose(level, None, probe())
    except SandboxUnavailable as error:
        pytest.skip(error.message)
    return level


async def test_sigterm_ends_streams_refuses_new_work_and_exits_in_time(reachable_tmp_path: Path) -> None:
    async with served(reachable_tmp_path, drain_seconds="20") as (server, upstream, http):
        asked = body("[[tokens 30]] [[delay 100]]", stream=True)
        async with http.post("/v1/messages", json=asked) as stream:
            assert stream.status == 200
            await stream.content.readuntil(b"content_block_delta")
            server.signal(signal.SIGTERM)
            await eventually_draining(http)
            async with http.post("/v1/messages", json=body("too late")) as late:
                assert late.status == 503
                assert late.headers["retry-after"] == "1"
            async with http.get("/readyz") as ready:
                assert ready.status == 503
            async with http.get("/livez") as live:
                assert live.status == 200
            rest = (await stream.content.read()).decode()
        assert "30" in rest
        assert "message_stop" in rest
        assert await server.ended(15) == 0
        assert upstream.count == 1


async def eventually_draining(http: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(10):
        while True:
            async with http.get("/readyz") as ready:
                if (await ready.json())["status"] == "draining":
                    return
            await asyncio.sleep(0.02)


async def test_a_stream_that_outlasts_the_drain_is_cut_and_the_exit_is_still_clean(reachable_tmp_path: Path) -> None:
    async with served(reachable_tmp_path, drain_seconds="1") as (server, upstream, http):
        asked = body("[[tokens 5]] [[hang 2]]", stream=True)
        async with http.post("/v1/messages", json=asked) as stream:
            await stream.content.readuntil(b"content_block_delta")
            children = descendants(server.pid)
            server.signal(signal.SIGTERM)
            assert await server.ended(30) == 0
        assert children
        await eventually(lambda: not any(map(alive, children)))
        assert upstream.calls[-1].cancelled


async def test_whoever_still_waits_when_the_drain_is_over_is_told_so(reachable_tmp_path: Path) -> None:
    async with served(reachable_tmp_path, drain_seconds="1", max_processes="1", spares="0") as (server, upstream, http):
        running = asyncio.ensure_future(http.post("/v1/messages", json=body("[[hang]]")))
        await upstream.wait_for(1)
        queued = asyncio.ensure_future(http.post("/v1/messages", json=body("[[say waited]]")))
        while "pool_waiting 1.0" not in await (await http.get("/metrics")).text():
            await asyncio.sleep(0.02)
        server.signal(signal.SIGTERM)
        for answer in (await running, await queued):
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert (await answer.json())["error"]["code"] == "draining"
        assert await server.ended(30) == 0


@pytest.mark.parametrize("sandbox", SANDBOXES)
async def test_sigkill_of_the_server_leaves_no_process(reachable_tmp_path: Path, sandbox: str) -> None:
    async with served(reachable_tmp_path, sandbox=sandbox_or_skip(sandbox)) as (server, upstream, http):
        hanging = asyncio.ensure_future(http.post("/v1/messages", json=body("[[hang]]")))
        async with http.post("/v1/messages", json=body("[[say idle]]", session_id="kept")) as response:
            assert response.status == 200
        await upstream.wait_for(2)
        children = descendants(server.pid)
        assert len(children) >= 2
        server.signal(signal.SIGKILL)
        assert await server.ended(10) == -signal.SIGKILL
        await eventually(lambda: not any(map(alive, children)))
        with pytest.raises(aiohttp.ClientError):
            await hanging


async def test_a_server_that_was_killed_starts_again_on_the_same_data(reachable_tmp_path: Path) -> None:
    async with served(reachable_tmp_path) as (server, _, http):
        async with http.post("/v1/messages", json=body("[[say one]]")) as response:
            assert response.status == 200
        server.signal(signal.SIGKILL)
        await server.ended(10)
        leftovers = set((server.data_dir / "slots").iterdir())
        assert leftovers
        await server.start()
        assert not leftovers & set((server.data_dir / "slots").iterdir())
        async with aiohttp.ClientSession(server.url, headers={"x-api-key": ADMIN_KEY}) as again:
            response = await again.post("/v1/messages", json=body("[[say two]]"))
            assert (await response.json())["content"][0]["text"] == "two"


async def test_a_sighup_changes_the_log_level_and_a_file_that_is_wrong_changes_nothing(
    reachable_tmp_path: Path,
) -> None:
    file = reachable_tmp_path / "settings.toml"
    file.write_text('log_level = "error"\n')
    async with served(reachable_tmp_path, config=str(file)) as (server, _, http):

        async def requests_logged() -> int:
            async with http.get("/livez") as response:
                assert response.status == 200
            return server.log_file.read_text().count('"request.completed"')

        assert await requests_logged() == 0
        file.write_text('log_level = "info"\n')
        server.signal(signal.SIGHUP)
        async with asyncio.timeout(10):
            while not await requests_logged():
                await asyncio.sleep(0.02)
        file.write_text('log_level = "loud"\n')
        server.signal(signal.SIGHUP)
        await eventually(lambda: "settings.not_reloaded" in server.log_file.read_text())
        assert await requests_logged() > 0


async def test_a_sighup_takes_over_limits_and_says_what_needs_a_restart(reachable_tmp_path: Path) -> None:
    file = reachable_tmp_path / "settings.toml"
    file.write_text("max_turns = 100\n")
    async with served(reachable_tmp_path, config=str(file)) as (server, _, http):

        async def status() -> int:
            async with http.post("/v1/messages", json=body("[[say ok]]")) as response:
                return response.status

        def log_of(event: str) -> dict[str, Any]:
            lines = [json.loads(one) for one in server.log_file.read_text().splitlines() if f'"{event}"' in one]
            return dict(lines[-1]) if lines else {}

        assert [await status() for _ in range(2)] == [200, 200]
        file.write_text('max_turns = 50\norg_limits = "requests=1/hour"\nshed_lag_seconds = 9\n')
        server.signal(signal.SIGHUP)
        await eventually(lambda: bool(log_of("settings.reloaded")))
        told = log_of("settings.reloaded")
        assert told["taken_over"] == ["org_limits", "shed_lag_seconds"]
        assert told["needs_restart"] == ["max_turns"]
        assert [await status() for _ in range(2)] == [200, 429]
        file.write_text('org_limits = "requests=lots"\n')
        server.signal(signal.SIGHUP)
        await eventually(lambda: bool(log_of("settings.not_reloaded")))
        assert await status() == 429, "what is wrong changes nothing"
        file.write_text("max_turns = 100\n")
        server.signal(signal.SIGHUP)
        await eventually(lambda: log_of("settings.reloaded").get("needs_restart") == [])
        assert await status() == 200
