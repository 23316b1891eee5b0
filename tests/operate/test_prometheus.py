"""A real Prometheus scrapes a real server: it takes the rules, and every panel of the dashboard gets an answer from it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from running_server import KEY, Running, running
from telemetry_expressions import DEPLOY, dashboard, rules

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.real_cli,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian: prometheus) is not installed"),
]

MOVED = {"Requests by status", "Turns by outcome", "Time to first token, p95", "Tokens", "Memory", "Processes by state"}
"""Panels that show more than zeros for a server that answered."""


@contextlib.asynccontextmanager
async def prometheus(directory: Path, server: Running) -> AsyncIterator[aiohttp.ClientSession]:
    """One that scrapes the server every second with a key, as the documents say, and evaluates the shipped rules."""
    (directory / "key").write_text(KEY)
    target = urlsplit(server.url).netloc
    (directory / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(DEPLOY / "prometheus/alerts.yml")],
                "scrape_configs": [
                    {
                        "job_name": "claude-wrapper",
                        "authorization": {"credentials_file": str(directory / "key")},
                        "static_configs": [{"targets": [target]}],
                    }
                ],
            }
        )
    )
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'series'}",
        "--web.listen-address=127.0.0.1:0",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    reading: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(60):
            while b"Listening on" not in (line := await process.stderr.readline()):
                assert line, "prometheus ended before it listened"
        address = line.decode().rpartition("address=")[2].split()[0].strip('"')
        reading = asyncio.ensure_future(_drained(process.stderr))
        async with aiohttp.ClientSession(f"http://{address}") as http:
            yield http
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        if reading is not None:
            await reading


async def _drained(stream: asyncio.StreamReader) -> None:
    while await stream.readline():
        pass


async def ask(http: aiohttp.ClientSession, path: str, **query: str) -> Any:
    async with http.get(f"/api/v1/{path}", params=query) as response:
        said = await response.json()
    assert said["status"] == "success", (query, said)
    return said["data"]


def expression(panel: str) -> str:
    """What Grafana sends: its variables filled in."""
    return panel.replace("$__rate_interval", "1m").replace("$job", ".*").replace("$instance", ".*")


async def test_panels_and_rules_work_in_a_real_prometheus(reachable_tmp_path: Path) -> None:
    directory = reachable_tmp_path / "prometheus"
    directory.mkdir()
    async with running(reachable_tmp_path / "server") as server, prometheus(directory, server) as http:
        async with asyncio.timeout(90):
            scraped = 0
            while scraped < 3:  # a rate takes two scrapes of one series; turns come between them
                assert (await server.ask(f"[[say {scraped}]]", session_id="s")).status == 200
                async with server.http.get("/health") as response:
                    assert response.status == 200
                found = await ask(http, "query", query='count_over_time(up{job="claude-wrapper"}[1h])')
                scraped = int(found["result"][0]["value"][1]) if found["result"] else 0
                await asyncio.sleep(0.2)
            up = await ask(http, "query", query='min_over_time(up{job="claude-wrapper"}[1h])')
            assert up["result"][0]["value"][1] == "1"
            shown: dict[str, float] = {}
            for panel in dashboard()["panels"]:
                for target in panel.get("targets", ()):
                    points = (await ask(http, "query", query=expression(target["expr"])))["result"]
                    assert points, f"{panel['title']} shows nothing: {target['expr']}"
                    values = [float(point["value"][1]) for point in points]
                    shown[panel["title"]] = max(0.0, shown.get(panel["title"], 0.0), *filter(math.isfinite, values))
            assert all(shown[title] > 0 for title in MOVED), shown
            evaluated: list[dict[str, Any]] = []
            while not evaluated or any(rule["health"] == "unknown" for rule in evaluated):
                groups = (await ask(http, "rules"))["groups"]
                evaluated = [rule for group in groups for rule in group["rules"]]
                await asyncio.sleep(0.2)
    assert {rule["name"] for rule in evaluated} == {rule["alert"] for rule in rules()}
    assert {rule["health"] for rule in evaluated} == {"ok"}, [rule for rule in evaluated if rule["health"] != "ok"]
    assert [rule["name"] for rule in evaluated if rule["state"] == "firing"] == []
