"""Limits, budgets, credentials and the ledger through HTTP, with the real CLI: what a tenant meets."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from admin_world import Admin, Reply

from claude_wrapper.errors import BudgetExceeded, VaultSealed
from claude_wrapper.storage import Database, migrations
from claude_wrapper.wire.usage import Usage
from databases import PostgresServer, RedisServer
from running_server import running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

MODEL = "claude-sonnet-5-5"


@dataclass(frozen=True)
class Bound:
    """What the gate looks at of the broker's binding."""

    org: str
    workspace: str | None = None
    key_id: str | None = None
    user: str | None = None
    session: str = "sesn_1"


@dataclass(frozen=True)
class Used:
    """What the gate looks at of a call that has ended."""

    model: str
    usage: Usage
    started_at: datetime


async def turn(admin: Admin, key: str, text: str, **fields: Any) -> Reply:
    body = {"model": MODEL, "max_tokens": 1000, "messages": [{"role": "user", "content": text}], **fields}
    return await admin.post("/v1/messages", body, key=key)


async def pooled(admin: Admin, key: str, text: str) -> Reply:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "session_id": "one"}
    return await admin.post("/v1/messages/pooled", body, key=key)


async def supplied(admin: Admin, secret: str, *, key: str | None = None, **fields: Any) -> str:
    """An upstream credential of an organisation, for the scripted upstream."""
    body = {"kind": "custom", "name": secret, "base_url": admin.server.upstream.url, "secret": {"api_key": secret}}
    made = await admin.post("/credentials", body | fields, key=key)
    assert made.status == 200, made.body
    return str(made.body["id"])


async def eventually(check: Callable[[], Any], what: str) -> Any:
    """What `check` gives, once it gives something. The ledger is written behind the answer."""
    async with asyncio.timeout(20):
        while not (found := await check()):
            await asyncio.sleep(0.05)
    assert found, what
    return found


async def calls_of(admin: Admin, *, key: str | None = None) -> list[dict[str, Any]]:
    answer = await admin.get("/usage/export?starting_at=2026-01-01", key=key)
    return list(answer.body["data"])


async def test_a_hundred_requests_an_hour_for_a_user_is_one_line_of_configuration(reachable_tmp_path: Path) -> None:
    limits = "requests=100/hour burst 3"
    async with running(reachable_tmp_path, spares=1, upstream_private=True, user_limits=limits) as server:
        admin = await Admin.made(server)
        await supplied(admin, "sk-upstream")
        user = (await admin.post("/users", {"email": "ann@example.com", "role": "developer"})).body["id"]
        keys = [await admin.key("developer", user_id=user) for _ in range(2)]
        told = []
        for number in range(3):
            answer = await pooled(admin, keys[number % 2], "hello")
            assert answer.status == 200, answer.raw
            assert answer.headers["anthropic-ratelimit-requests-limit"] == "3"
            told.append(int(answer.headers["anthropic-ratelimit-requests-remaining"]))
        assert told == [2, 1, 0]
        refused = await pooled(admin, keys[0], "hello")
        assert (refused.status, refused.body["error"]["type"]) == (429, "rate_limit_error")
        assert refused.body["error"]["details"]["scope"] == "user"
        assert refused.body["error"]["details"]["limit"] == "requests"
        assert 1 <= int(refused.headers["retry-after"]) <= 36
        assert refused.headers["anthropic-ratelimit-requests-remaining"] == "0"
        without_user = await turn(admin, await admin.key("developer"), "hello")
        assert without_user.status == 200


async def test_each_organisation_is_served_with_its_own_key_the_narrowest_first(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, upstream_private=True) as server:
        admin = await Admin.made(server)
        user = (await admin.post("/users", {"email": "ann@example.com", "role": "developer"})).body["id"]
        space = (await admin.post("/workspaces", {"name": "Lab"})).body["id"]
        missing = await turn(admin, await admin.key("developer"), "hello")
        assert (missing.status, missing.body["error"]["code"]) == (403, "credential_missing")
        await supplied(admin, "sk-org")
        await supplied(admin, "sk-theirs", key=admin.their_owner)
        await supplied(admin, "sk-space", workspace_id=space)
        await supplied(admin, "sk-user", user_id=user)
        plain = await admin.key("developer")
        asked = (
            (plain, "sk-org"),
            (admin.their_owner, "sk-theirs"),
            (await admin.key("developer", workspace_id=space), "sk-space"),
            (await admin.key("developer", workspace_id=space, user_id=user), "sk-user"),
        )
        for key, expected in asked:
            before = server.upstream.count
            answer = await turn(admin, key, "hello")
            assert answer.status == 200, answer.body
            new = list(server.upstream.requests)[before - server.upstream.count :]
            assert {one.headers.get("x-api-key") for one in new if one.path == "/v1/messages"} == {expected}
        rows = await eventually(lambda: calls_of(admin, key=admin.their_owner), "their ledger")
        assert {row["org_id"] for row in rows} == {admin.theirs}
        restricted = await admin.key("developer", allowed_models=["claude-haiku-*"])
        refused = await turn(admin, restricted, "hello")
        assert (refused.status, refused.body["error"]["type"]) == (403, "permission_error")
        for role in ("billing", "viewer"):
            assert (await turn(admin, await admin.key(role), "hello")).status == 403


async def test_the_ledger_has_what_upstream_counted_and_reports_agree(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, upstream_private=True) as server:
        admin = await Admin.made(server)
        await supplied(admin, "sk-org")
        key = await admin.key("developer")
        for text in ("[[tokens 20]]", "[[think let me see]] [[tokens 7]]", "hello"):
            assert (await turn(admin, key, text)).status == 200
        total = server.upstream.usage_totals

        async def complete() -> list[dict[str, Any]]:
            rows = await calls_of(admin)
            return rows if len(rows) >= 3 else []

        rows = await eventually(complete, "three calls")
        counted = (
            "input_tokens",
            "output_tokens",
            "cache_read_tokens",
            "cache_write_5m_tokens",
            "cache_write_1h_tokens",
        )
        assert {name: sum(row[name] for row in rows) for name in counted} == {
            name: getattr(total, name) for name in counted
        }
        assert {(row["org_id"], row["model"], row["status"]) for row in rows} == {(admin.ours, MODEL, 200)}
        report = await admin.get(
            "/usage_report/messages?starting_at=2026-01-01&bucket_width=1d&limit=31&group_by[]=api_key_id"
        )
        found = [one for bucket in report.body["data"] for one in bucket["results"]]
        page = report.body["next_page"]
        while page:
            url = f"/usage_report/messages?starting_at=2026-01-01&bucket_width=1d&limit=31&group_by[]=api_key_id&page={page}"
            report = await admin.get(url)
            found += [one for bucket in report.body["data"] for one in bucket["results"]]
            page = report.body["next_page"]
        assert [(one["output_tokens"], one["requests"]) for one in found] == [(total.output_tokens, len(rows))]
        assert found[0]["api_key_id"] == rows[0]["key_id"]
        cost = (await admin.get("/analytics/cost?starting_at=2026-01-01")).body["data"][0]["cost"]
        assert float(cost["amount"]) == pytest.approx(sum(row["cost_micros"] for row in rows) / 10_000, abs=1e-4)
        hidden = await admin.get("/usage/export?starting_at=2026-01-01", key=key)
        assert "cost_micros" not in hidden.body["data"][0]


async def test_at_the_cap_a_budget_blocks_and_after_it_is_raised_the_session_goes_on(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, upstream_private=True) as server:
        admin = await Admin.made(server)
        await supplied(admin, "sk-org")
        key = await admin.key("developer")
        budget = {"scope": "organization", "cap_micros": 1, "action": "pause"}
        made = (await admin.post("/budgets", budget)).body
        first = await turn(admin, key, "remember the word tulip", session_id="talk")
        assert first.status == 200, first.body  # one call in flight may pass the cap; the next one is refused
        refused = await eventually(lambda: _refused(admin, key), "a refusal")
        assert (refused.status, refused.body["error"]["type"]) == (402, "billing_error")
        assert refused.body["error"]["details"]["action"] == "pause"
        await eventually(lambda: _spent(admin, made["id"]), "what the first call used")
        raised = await admin.post(f"/budgets/{made['id']}", {"cap_micros": 10**9, "version": made["version"]})
        assert raised.body["version"] == 2
        again = await turn(admin, key, "[[recall]]", session_id="talk")
        assert again.status == 200
        assert "tulip" in again.body["content"][0]["text"]
        await admin.post(f"/budgets/{made['id']}", {"cap_micros": 1, "action": "warn"})
        warned = await turn(admin, key, "hello", session_id="talk")
        assert warned.status == 200
        assert "organization budget" in warned.headers["x-budget-warning"]


async def _spent(admin: Admin, budget: str) -> int:
    return int((await admin.get(f"/budgets/{budget}")).body["spent_micros"])


async def _refused(admin: Admin, key: str, session_id: str | None = "talk") -> Reply | None:
    answer = await turn(admin, key, "hello", session_id=session_id)
    return answer if answer.status != 200 else None


async def test_a_budget_raced_by_a_hundred_calls_is_passed_by_one_call_at_most(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, spares=0, upstream_private=True) as server:
        admin = await Admin.made(server)
        gate = server.server.app.state.deps.tenants.admission.gate
        prices = server.server.app.state.deps.tenants.prices
        clock = server.server.clock
        used = Usage(output_tokens=1000)
        price = await prices.micros(admin.ours, MODEL, used, clock.now())
        cap = price * 10
        await admin.post("/budgets", {"scope": "organization", "cap_micros": cap})
        binding = Bound(admin.ours)

        async def one() -> int:
            try:
                held = await gate.reserve(binding, None, MODEL, used)
            except BudgetExceeded:
                return 0
            await asyncio.sleep(0)
            await held.settle(Used(MODEL, used, clock.now()))
            return 1

        passed = sum(await asyncio.gather(*(one() for _ in range(100))))
        assert passed == 10
        assert await one() == 0


async def test_a_running_agent_stops_cleanly_when_its_budget_is_used_up(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, upstream_private=True) as server:
        admin = await Admin.made(server)
        await supplied(admin, "sk-org")
        key = await admin.key("developer")
        await admin.post("/budgets", {"scope": "organization", "cap_micros": 1})
        # The first upstream call asks for a tool and uses the budget up; the second is refused by the broker.
        answer = await turn(admin, key, '[[tool Bash {"command": "true"}]]', agent={"tools": "default"})
        assert (answer.status, answer.body["error"]["type"]) == (402, "billing_error"), answer.body
        assert server.upstream.count == 1
        stats = await admin.get("/v1/pool/stats", **admin.as_operator())
        assert stats.body["states"].get("bound_busy", 0) == 0


async def test_the_database_goes_away_in_mid_turn_and_nothing_is_lost(
    own_postgres: PostgresServer, reachable_tmp_path: Path
) -> None:
    url = own_postgres.admin_url
    database = Database(url)
    await migrations.migrate(database)
    await database.close()
    async with running(reachable_tmp_path, upstream_private=True, database_url=url) as server:
        admin = await Admin.made(server)
        await supplied(admin, "sk-org")
        key = await admin.key("developer")
        assert (await turn(admin, key, "hello", session_id="talk")).status == 200
        # Unnamed: a named session's turn ends with 503 instead, because its event log cannot be written.
        running_turn = asyncio.ensure_future(turn(admin, key, "[[tokens 40]] [[delay 50]]"))
        async with asyncio.timeout(20):
            while server.upstream.count < 2 or not server.upstream.active:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(own_postgres.kill)
        answer = await running_turn
        assert answer.status == 200, answer.body
        await asyncio.to_thread(own_postgres.start)
        again = await eventually(lambda: _served(admin, key), "the server recovers by itself")
        assert again.status == 200

        async def complete() -> list[dict[str, Any]]:
            found = await admin.get("/usage/export?starting_at=2026-01-01")
            rows = found.body["data"] if found.status == 200 else []
            return (
                rows if sum(row["output_tokens"] for row in rows) >= server.upstream.usage_totals.output_tokens else []
            )

        rows = await eventually(complete, "the usage of the turn")
        assert sum(row["output_tokens"] for row in rows) == server.upstream.usage_totals.output_tokens
        assert len({row["id"] for row in rows}) == len(rows)


async def _served(admin: Admin, key: str, session_id: str | None = "talk") -> Reply | None:
    answer = await turn(admin, key, "hello", session_id=session_id)
    return answer if answer.status == 200 else None


async def test_a_server_with_the_wrong_master_key_says_so_and_does_not_start(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, spares=0, upstream_private=True) as server:
        admin = await Admin.made(server)
        await supplied(admin, "sk-org")
    wrong = base64.b64encode(os.urandom(32)).decode()
    began = time.monotonic()
    with pytest.raises(VaultSealed, match="master key"):
        async with running(reachable_tmp_path, spares=0, master_key=wrong):
            pass
    assert time.monotonic() - began < 20


async def test_without_redis_rates_let_through_and_budgets_refuse(
    own_redis: RedisServer, reachable_tmp_path: Path
) -> None:
    limits = "requests=100/hour"
    async with running(
        reachable_tmp_path, spares=0, upstream_private=True, redis_url=own_redis.url, key_limits=limits
    ) as server:
        admin = await Admin.made(server)
        await supplied(admin, "sk-org")
        key = await admin.key("developer")
        first = await turn(admin, key, "hello")
        assert (first.status, first.headers["anthropic-ratelimit-requests-remaining"]) == (200, "99")
        await asyncio.to_thread(own_redis.kill)
        open_rates = await turn(admin, key, "hello")
        assert open_rates.status == 200, open_rates.body
        made = await admin.post("/budgets", {"scope": "organization", "cap_micros": 10**9})
        assert made.status == 200, made.body
        refused = await eventually(lambda: _refused(admin, key, session_id=None), "the new budget is known")
        assert (refused.status, refused.body["error"]["code"]) == (503, "storage_unavailable")
        await asyncio.to_thread(own_redis.start)
        assert (await eventually(lambda: _served(admin, key, session_id=None), "the server recovers")).status == 200
