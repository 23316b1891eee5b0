"""The shared cache through a real server and the real CLI: the caller, the ledger and the metrics say what it saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from claude_wrapper.storage.tables.usage import usage_calls
from running_server import Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

USE = {"cw-cache": "use"}


async def _rows(server: Running) -> list[Any]:
    tenants = server.server.app.state.deps.tenants
    await tenants.ledger.flush()
    async with tenants.database.read() as tx:
        return list(await tx.execute(sa.select(usage_calls).order_by(usage_calls.c.started_ms, usage_calls.c.id)))


async def _metric(server: Running, line: str) -> float:
    async with server.http.get("/metrics") as response:
        text = await response.text()
    return next((float(one.rsplit(" ", 1)[1]) for one in text.splitlines() if one.startswith(line)), 0.0)


async def test_an_answer_that_was_asked_for_before_comes_from_the_cache(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path) as server:
        question = {"system": "be brief", "headers": USE}
        first = await server.ask("[[say once]]", **question)
        assert (first.text, first.headers["cw-cache"]) == ("once", "miss")
        second = await server.ask("[[say once]]", **question)
        assert (second.text, second.headers["cw-cache"]) == ("once", "hit")
        assert first.pid != second.pid or first.headers["cw-session-id"] != second.headers["cw-session-id"]
        assert server.upstream.count == 1
        body = {"model": "claude-sonnet-5-5", "max_tokens": 1024, "stream": True, "system": "be brief"}
        body["messages"] = [{"role": "user", "content": "[[say once]]"}]
        async with server.http.post("/v1/messages", json=body, headers=USE) as response:
            text = await response.text()
            assert response.headers["cw-cache"] == "hit"
            assert text.count("event: message_stop") == 1
        assert "cw-cache" not in (await server.ask("[[say once]]", system="be brief")).headers
        assert server.upstream.count == 2
        paid, hit, streamed, asked = await _rows(server)
        assert (paid.cache_hit, asked.cache_hit) == (False, False)
        for row in (hit, streamed):
            assert (row.cache_hit, row.attempts, row.status, row.cost_micros, row.output_tokens) == (True, 0, 200, 0, 0)
            prompt = paid.input_tokens + paid.cache_write_5m_tokens + paid.cache_read_tokens
            assert row.saved_tokens == prompt + paid.output_tokens
            assert row.saved_micros == paid.cost_micros > 0
        assert await _metric(server, 'cache_requests_total{cache="upstream",outcome="hit"}') == 2
        assert await _metric(server, 'cache_saved_tokens_total{cache="upstream"}') == 2 * hit.saved_tokens
        assert await _metric(server, "cache_bytes") > 0
        bad = await server.ask("[[say no]]", headers={"cw-cache": "maybe"})
        assert (bad.status, bad.body["error"]["param"]) == (400, "cw-cache")


async def test_counts_lists_and_what_is_deterministic_by_policy(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path) as server:
        question = {"model": "claude-sonnet-5-5", "messages": [{"role": "user", "content": "how long?"}]}
        seen = []
        for _ in range(2):
            async with server.http.post("/v1/messages/count_tokens", json=question) as response:
                counted = await response.json()
                seen.append((response.headers["cw-cache"], counted["input_tokens"] > 0))
            async with server.http.get("/v1/models?limit=5") as response:
                seen.append((response.headers["cw-cache"], len((await response.json())["data"]) > 0))
        assert seen == [("miss", True), ("miss", True), ("hit", True), ("hit", True)]
        assert len(server.upstream.requests) == 2
        async with server.http.post("/v1/organizations/policies", json={"cache_answers": "deterministic"}) as response:
            assert response.status == 200
        for text, temperature, count in [("a", 0, 1), ("a", 0, 1), ("b", 1, 2), ("b", 1, 3)]:
            assert (await server.ask(f"[[say {text}]]", temperature=temperature)).text == text
            assert server.upstream.count == count
