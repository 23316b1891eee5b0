"""One organisation cannot starve another."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from running_server import Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


async def _organization(server: Running, name: str) -> str:
    """A new organisation; returns a key of it."""
    async with server.http.post("/v1/organizations", json={"name": name}) as response:
        made = await response.json()
        assert response.status in (200, 201), made
    headers = {"cw-organization": made["id"]}
    credential = {"kind": "custom", "name": name, "secret": {"api_key": "sk-own"}, "base_url": server.upstream.url}
    async with server.http.post("/v1/organizations/credentials", json=credential, headers=headers) as response:
        assert response.status in (200, 201), await response.text()
    async with server.http.post("/v1/organizations/api_keys", json={"name": name}, headers=headers) as response:
        key = await response.json()
        assert response.status in (200, 201), key
    return str(key["secret"])


async def test_an_organisation_that_hogs_the_pool_does_not_starve_another(reachable_tmp_path: Path) -> None:
    async with running(
        reachable_tmp_path,
        max_processes=3,
        max_processes_per_org=2,
        spares=0,
        queue_seconds=60.0,
        upstream_private=True,
    ) as server:
        asked = await _organization(server, "modest")
        body: dict[str, Any] = {"model": "claude-sonnet-5-5", "max_tokens": 9}
        hogging = [asyncio.ensure_future(server.ask("[[hang]]", session_id=f"hog-{number}")) for number in range(8)]
        async with asyncio.timeout(30):
            await server.upstream.wait_for(2)
        began = time.monotonic()
        async with aiohttp.ClientSession(server.url, headers={"x-api-key": asked}) as http:
            body["messages"] = [{"role": "user", "content": "[[say still here]]"}]
            async with http.post("/v1/messages", json=body) as response:
                assert response.status == 200, await response.text()
        assert time.monotonic() - began < 30
        assert server.server.pool.stats().waiting == 6
        for one in hogging:
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await one
