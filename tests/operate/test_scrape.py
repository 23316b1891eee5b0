"""What a scrape of a server that worked shows: every family that one conversation can move has moved."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from running_server import Running, running
from telemetry_expressions import BY_PROMETHEUS, expressions, series_of

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
async def server(reachable_tmp_path: Path) -> AsyncIterator[Running]:
    async with running(reachable_tmp_path, upstream_attempts=2) as one:
        yield one


async def scrape(server: Running, **headers: str) -> Samples:
    async with server.http.get("/metrics", headers=headers) as response:
        assert response.status == 200, await response.text()
        text = await response.text()
    parse = parse_openmetrics if "openmetrics" in response.headers["content-type"] else parse_text
    return {(one.name, frozenset(one.labels.items())): one.value for family in parse(text) for one in family.samples}


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum over all series of this name that have these labels."""
    wanted = frozenset(labels.items())
    return sum(value for (found, has), value in samples.items() if found == name and wanted <= has)


MOVED = {
    "requests": [("pooled_requests_total", {"route": "/v1/messages", "status": "200", "dialect": "anthropic"})],
    "durations": [("request_duration_seconds_count", {"route": "/v1/messages"})],
    "claims": [("pool_claims_total", {"kind": "warm"}), ("pool_claim_seconds_count", {"kind": "warm"})],
    "spawns": [("process_spawn_seconds_count", {"profile": "chat"})],
    "pool": [("pool_size", {}), ("pool_capacity", {}), ("pool_memory_bytes", {})],
    "processes": [("pool_processes", {"state": "idle"})],
    "turns": [("turns_total", {"outcome": "completed"}), ("turn_duration_seconds_count", {"outcome": "completed"})],
    "first tokens": [("turn_first_token_seconds_count", {"kind": "warm"}), ("turn_events_sum", {})],
    "failed turns": [("turns_total", {"outcome": "failed"})],
    "sessions": [("sessions", {"state": "idle"})],
    "upstream": [
        ("upstream_calls_total", {"status": "200"}),
        ("upstream_calls_total", {"status": "400"}),
        ("upstream_call_seconds_count", {}),
        ("upstream_first_byte_seconds_count", {}),
        ("upstream_retries_total", {"reason": "overloaded"}),
    ],
    "tokens": [("tokens_total", {"kind": "input"}), ("tokens_total", {"kind": "output"}), ("cost_dollars_total", {})],
    "ledger": [("ledger_rows_total", {"outcome": "ok"})],
    "authentication": [
        ("authentication_failures_total", {"reason": "missing"}),
        ("authentication_failures_total", {"reason": "unknown"}),
    ],
    "budgets": [("budget_alerts_total", {"share": "0.8"}), ("budget_alerts_total", {"share": "1"})],
    "limits": [("limits_hit_total", {"limit": "requests", "scope": "organization"})],
    "server": [
        ("process_open_fds", {}),
        ("process_max_fds", {}),
        ("process_children", {}),
        ("process_threads", {}),
        ("process_resident_memory_bytes", {}),
        ("process_cpu_seconds", {}),
        ("process_start_time_seconds", {}),
        ("event_loop_tasks", {}),
        ("event_loop_lag_seconds_count", {}),
        ("build_info", {}),
        ("log_lines_total", {}),
    ],
    "health": [("health_check", {"check": "database"}), ("health_check", {"check": "pool"})],
}


async def test_every_family_that_a_conversation_can_move_moves(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, upstream_attempts=2, org_limits="requests=4", log_level="info") as server:
        before = await scrape(server)
        budget = {"scope": "organization", "cap_micros": 1, "action": "warn"}
        async with server.http.post("/v1/organizations/budgets", json=budget) as response:
            assert response.status == 200, await response.text()
        first = await server.ask("[[say one]]", session_id="s")
        assert first.status == 200
        assert (await server.ask("[[error-once 529]] again", session_id="s")).status == 200
        assert (await server.ask("[[error 400]]", session_id="s")).status == 400
        assert (await server.ask("[[say two]]", session_id="s")).pid == first.pid
        assert (await server.ask("one too many", session_id="s")).status == 429
        async with aiohttp.ClientSession(server.url) as stranger:
            for headers in ({}, {"x-api-key": "sk-cw-nobody"}):
                async with stranger.post("/v1/messages", json=_body(), headers=headers) as response:
                    assert response.status == 401
        async with server.http.get("/health") as response:
            assert response.status == 200
        after = await scrape(server)
        with contextlib.suppress(TimeoutError):  # an answer is given before its books are closed
            async with asyncio.timeout(10):
                while _still(after) or total(after, "turns_in_flight"):
                    after = await scrape(server)
    assert not _still(after)
    grown = [name for what in ("requests", "turns", "upstream", "tokens") for name, _ in MOVED[what]]
    assert all(total(after, name) > total(before, name) for name in grown)
    assert total(after, "requests_in_flight", dialect="anthropic") == 0
    assert total(after, "turns_in_flight") == 0
    assert total(after, "metrics_pull_errors_total") == 0


def _still(samples: Samples) -> list[tuple[str, str, dict[str, str]]]:
    return [
        (what, name, labels)
        for what, series in MOVED.items()
        for name, labels in series
        if not total(samples, name, **labels) > 0
    ]


def _body() -> dict[str, object]:
    return {"model": "claude-sonnet-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}


async def test_the_dashboards_and_alerts_series_are_in_a_real_scrape(server: Running) -> None:
    await server.ask("hello")
    async with server.http.get("/health") as response:
        assert response.status == 200
    names = {name for name, _ in await scrape(server)}
    missing = {
        name
        for _, expression in expressions()
        for name, _ in series_of(expression)
        if name not in names | BY_PROMETHEUS
    }
    assert not missing


async def test_the_document_lists_what_is_scraped_and_nothing_else(server: Running) -> None:
    scraped = {name for name, _ in await scrape(server)}
    written = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    listed = {line.split("`")[1] for line in written.splitlines() if line.startswith("| `")}
    ends = ("", "_bucket", "_sum", "_count")
    assert {name for name in listed if not any(name + end in scraped for end in ends)} <= {"health_check"}
    assert {name for name in scraped if not any(name == one + end for one in listed for end in ends)} == set()


async def test_openmetrics_is_given_to_who_asks_for_it(server: Running) -> None:
    await server.ask("hello")
    samples = await scrape(server, accept="application/openmetrics-text; version=1.0.0")
    assert total(samples, "pooled_requests_total", route="/v1/messages") == 1


async def test_metrics_need_the_operators_key_unless_they_are_public(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, spares=0) as server, aiohttp.ClientSession(server.url) as stranger:
        for path in ("/metrics", "/api/metrics"):
            async with stranger.get(path) as response:
                assert response.status == 401
            async with server.http.get(path) as response:
                assert response.status == 200


async def test_public_metrics_need_no_key(reachable_tmp_path: Path) -> None:
    async with (
        running(reachable_tmp_path, spares=0, metrics_public=True) as server,
        aiohttp.ClientSession() as stranger,
    ):
        response = await stranger.get(f"{server.url}/api/metrics")
        assert response.status == 200
