"""The server protects itself and its upstream: breaker, shedding, shares of organisations, deadlines, drain."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from claude_wrapper.api.deadlines import turn_seconds
from claude_wrapper.errors import InvalidRequest
from running_server import Running, running

pytestmark = pytest.mark.anyio
real_cli = pytest.mark.real_cli


async def _health(server: Running) -> tuple[int, dict[str, dict[str, object]]]:
    async with server.http.get("/health") as response:
        body = await response.json()
        return response.status, body


async def _metric(server: Running, line: str) -> float:
    async with server.http.get("/metrics") as response:
        text = await response.text()
    return next((float(one.rsplit(" ", 1)[1]) for one in text.splitlines() if one.startswith(line)), 0.0)


@real_cli
async def test_an_open_breaker_answers_at_once_and_says_when_to_come_back(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, breaker_failures=2, breaker_seconds=30.0, upstream_attempts=1) as server:
        for _ in range(2):
            assert (await server.ask("[[error 500]]")).status == 500
        asked = server.upstream.count
        refused = await server.ask("[[say hello]]")
        assert (refused.status, refused.body["error"]["code"]) == (503, "upstream_unavailable")
        assert 1 <= int(refused.headers["Retry-After"]) <= 30
        assert server.upstream.count == asked
        status, health = await _health(server)
        assert (status, health["status"], health["failing"]) == (200, "degraded", ["upstream"])
        assert health["checks"]["upstream"]["breakers"] == {"open": 1, "half_open": 0}
        assert await _metric(server, 'upstream_breakers{provider="custom",state="open"}') == 1
        assert await _metric(server, 'upstream_breaker_openings_total{provider="custom"}') == 1


@real_cli
async def test_a_breaker_closes_after_a_probe_that_works(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, breaker_failures=1, breaker_seconds=1.0, upstream_attempts=1) as server:
        assert (await server.ask("[[error 500]]")).status == 500
        async with asyncio.timeout(20):
            while (answer := await server.ask("[[say back]]")).status == 503:
                await asyncio.sleep(float(answer.headers["Retry-After"]))
        assert answer.text == "back"
        assert (await _health(server))[1]["status"] == "healthy"


@real_cli
async def test_a_machine_short_of_memory_refuses_new_turns_and_ends_the_running_ones(
    reachable_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from claude_wrapper.telemetry.pressure import MemoryReader

    used = [0.5]
    monkeypatch.setattr(MemoryReader, "share", lambda self: used[0])
    async with running(reachable_tmp_path) as server:
        running_turn = asyncio.ensure_future(server.ask("[[first 1500]] [[say done]]"))
        await server.upstream.wait_for(1)
        used[0] = 0.97
        await asyncio.sleep(0.6)  # a reading is used for half a second
        refused = await server.ask("one more")
        assert (refused.status, refused.body["error"]["type"]) == (529, "overloaded_error")
        assert refused.headers["Retry-After"] == "5"
        assert "memory" in refused.body["error"]["message"]
        assert (await running_turn).text == "done"
        assert await _metric(server, 'requests_shed_total{reason="memory"}') == 1
        status, health = await _health(server)
        assert (status, health["failing"]) == (503, ["memory"])
        async with server.http.get("/livez") as response:
            assert response.status == 200
        async with server.http.get("/readyz") as response:
            assert response.status == 503
        used[0] = 0.5
        await asyncio.sleep(0.6)
        assert (await server.ask("again")).status == 200


@pytest.mark.parametrize(
    ("headers", "streamed", "seconds"),
    [
        ({}, False, 600.0),
        ({"x-stainless-timeout": "NOT_GIVEN"}, False, 600.0),
        ({"x-stainless-timeout": "nan"}, False, 600.0),
        ({"x-stainless-timeout": "0"}, False, 600.0),
        ({"x-stainless-timeout": "20"}, False, 20.0),
        ({"x-stainless-timeout": "20"}, True, 600.0),
        ({"x-stainless-timeout": "20", "x-stainless-read-timeout": "15"}, False, 15.0),
        ({"x-stainless-timeout": "9999"}, False, 600.0),
        ({"cw-turn-seconds": "7.5"}, True, 7.5),
        ({"cw-turn-seconds": "9999"}, True, 600.0),
        ({"cw-turn-seconds": "30", "x-stainless-timeout": "10"}, False, 10.0),
    ],
)
async def test_a_turn_runs_no_longer_than_its_caller_waits(
    headers: dict[str, str], streamed: bool, seconds: float
) -> None:
    assert turn_seconds(headers, 600.0, streamed=streamed) == seconds


@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf", ""])
async def test_a_deadline_of_ours_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match="cw-turn-seconds"):
        turn_seconds({"cw-turn-seconds": value}, 600.0, streamed=False)


@real_cli
async def test_a_deadline_ends_the_turn_and_frees_its_process(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path) as server:
        body = {"model": "claude-sonnet-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "[[hang]]"}]}
        async with server.http.post("/v1/messages", json=body, headers={"cw-turn-seconds": "1"}) as response:
            assert response.status == 504
            assert "1 s" in (await response.json())["error"]["message"]
        assert (await server.ask("[[say fine]]")).status == 200


@contextlib.asynccontextmanager
async def _stranger(server: Running, key: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(server.url, headers={"x-api-key": key}) as http:
        yield http
