"""An organisation's fall-backs, through a real server and the real CLI: who answers, what the caller and the ledger say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from claude_wrapper.storage.tables.usage import usage_calls
from running_server import Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

MODEL, OTHER = "claude-sonnet-5-5", "claude-haiku-4-5"


async def set_policies(server: Running, **policies: Any) -> None:
    async with server.http.post("/v1/organizations/policies", json=policies) as response:
        assert response.status == 200, await response.text()


async def ledger(server: Running) -> list[tuple[str, int]]:
    """(model, status) of the calls in the ledger, in order."""
    tenants = server.server.app.state.deps.tenants
    await tenants.ledger.flush()
    async with tenants.database.read() as tx:
        rows = await tx.execute(sa.select(usage_calls.c.model, usage_calls.c.status).order_by(usage_calls.c.started_ms))
        return [(row.model, row.status) for row in rows]


async def test_another_model_answers_and_everybody_is_told_which(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, upstream_attempts=1) as server:
        server.upstream.fail_models[MODEL] = 529
        assert (await server.ask("[[say first]]")).status == 529
        await set_policies(server, fallback_models={MODEL: [OTHER]})
        answer = await server.ask("[[say second]]")
        assert (answer.status, answer.text, answer.body["model"]) == (200, "second", OTHER)
        assert answer.headers["cw-fallback-model"] == OTHER
        body = {"model": MODEL, "max_tokens": 99, "stream": True}
        body["messages"] = [{"role": "user", "content": "[[say third]]"}]
        async with server.http.post("/v1/messages", json=body) as response:
            assert response.headers["cw-fallback-model"] == OTHER
            assert f'"model":"{OTHER}"' in await response.text()
        server.upstream.fail_models.clear()
        assert "cw-fallback-model" not in (await server.ask("[[say fourth]]")).headers
        assert await ledger(server) == [(MODEL, 529), (OTHER, 200), (OTHER, 200), (MODEL, 200)]
        async with server.http.get("/metrics") as response:
            assert 'upstream_fallbacks_total{kind="model"} 2.0' in await response.text()
