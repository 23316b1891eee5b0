"""A stored subscription credential of the operator's own: its access token is refreshed before it ends. Real CLI."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from aiohttp import web

from claude_wrapper.storage.tables.vault import vault_credentials
from running_server import Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


@asynccontextmanager
async def token_endpoint(*answers: tuple[int, dict[str, Any]]) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """(its URL, what it was asked); gives one answer after the other."""
    asked: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(await request.json())
        status, body = answers[len(asked) - 1]
        return web.json_response(body, status=status)

    app = web.Application()
    app.router.add_post("/token", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/token", asked
    finally:
        await runner.cleanup()


async def keep(server: Running, *, ends_in: float) -> None:
    body = {
        "kind": "oauth",
        "name": "mine",
        "secret": {"access_token": "sk-ant-oat01-first", "refresh_token": "sk-ant-ort01-first"},
        "expires_at": (datetime.now(UTC) + timedelta(seconds=ends_in)).isoformat(),
    }
    async with server.http.post("/v1/organizations/credentials", json=body) as response:
        assert response.status == 200, await response.text()
    tenants = server.server.app.state.deps.tenants
    async with tenants.database.transaction() as tx:  # tokens of a subscription go to the provider alone
        await tx.execute(sa.update(vault_credentials).values(base_url=server.upstream.url))
    tenants.resolver.forget(tenants.operator.org)


def shown(server: Running) -> list[str]:
    """The tokens that the upstream was shown for messages, in order."""
    return [seen.headers["authorization"] for seen in server.upstream.requests if seen.path.startswith("/v1/messages")]


async def test_turns_go_on_with_a_refreshed_token_and_the_pair_is_replaced(reachable_tmp_path: Path) -> None:
    grants = [
        (200, {"access_token": f"sk-ant-oat01-{name}", "refresh_token": f"sk-ant-ort01-{name}", "expires_in": ends})
        for name, ends in (("second", 60), ("third", 3600))
    ]
    async with token_endpoint(*grants) as (url, asked):
        settings: dict[str, Any] = {"allow_oauth": True, "oauth_token_url": url, "oauth_client_id": "client-1"}
        async with running(reachable_tmp_path, spares=0, upstream_private=True, **settings) as server:
            await keep(server, ends_in=100)
            for text in ("one", "two", "three"):
                answer = await server.ask(f"[[say {text}]]", session_id="a", max_tokens=None)
                assert (answer.status, answer.text) == (200, text), answer.body
            tokens = shown(server)
        assert [one["refresh_token"] for one in asked] == ["sk-ant-ort01-first", "sk-ant-ort01-second"]
        assert {one["client_id"] for one in asked} == {"client-1"}
        assert "Bearer sk-ant-oat01-first" not in tokens
        assert tokens[-1] == "Bearer sk-ant-oat01-third"


async def test_a_refused_refresh_is_told_to_the_caller_and_shown_with_the_credential(reachable_tmp_path: Path) -> None:
    async with token_endpoint((400, {"error": "invalid_grant"})) as (url, asked):
        settings: dict[str, Any] = {"allow_oauth": True, "oauth_token_url": url, "oauth_client_id": "client-1"}
        async with running(reachable_tmp_path, spares=0, upstream_private=True, **settings) as server:
            await keep(server, ends_in=-1)
            for _ in range(2):
                answer = await server.ask("hello", max_tokens=None)
                assert answer.status in (401, 403), answer.body
                assert "invalid_grant" in str(answer.body)
            async with server.http.get("/v1/organizations/credentials") as response:
                (one,) = (await response.json())["data"]
            assert (one["status"], one["problem"]) == ("invalid", "invalid_grant")
        assert len(asked) == 1
