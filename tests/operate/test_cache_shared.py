"""Two organisations of one company share answers, on a real server with the real CLI: by the Admin API, from end to end."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa

from admin.admin_world import Admin, Reply
from claude_wrapper.storage import Database, migrations
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.storage.tables.usage import usage_calls
from claude_wrapper.testing.upstream import ScriptedUpstream
from replicas import replica
from running_server import KEY, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


async def _ask(admin: Admin, key: str, text: str = "[[say once]]", **fields: Any) -> Reply:
    body = {
        "model": "claude-sonnet-5-5",
        "max_tokens": 1024,
        "system": "be brief",
        "messages": [{"role": "user", "content": text}],
        **fields,
    }
    answer = await admin.call("POST", "/v1/messages", body, key=key, headers={"cw-cache": "use"})
    assert answer.status == 200, answer.body
    return answer


async def _name(admin: Admin, key: str, *others: str) -> None:
    answer = await admin.post("/policies", {"cache_share_with": list(others)}, key=key)
    assert (answer.status, answer.body["cache_share_with"]) == (200, list(others))


async def test_answers_are_shared_while_both_want_it(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, upstream_private=True) as server:
        admin = await Admin.made(server)
        for key in (admin.owner, admin.their_owner):
            secret = {
                "kind": "custom",
                "name": "x",
                "secret": {"api_key": f"sk-{key[-4:]}"},
                "base_url": server.upstream.url,
            }
            assert (await admin.post("/credentials", secret, key=key)).status == 200

        async def seen(key: str, text: str = "[[say once]]") -> tuple[str, int]:
            answer = await _ask(admin, key, text)
            assert answer.body["content"][0]["text"] == "once"
            return answer.headers["cw-cache"], server.upstream.count

        assert await seen(admin.their_owner) == ("miss", 1)
        await _name(admin, admin.their_owner, admin.ours)
        assert await seen(admin.owner, "[[say once]] ") == ("miss", 2)  # one side alone
        await _name(admin, admin.owner, admin.theirs)
        # What was kept before both wanted it stays where it is; what is kept from now on is shared, in both directions.
        assert await seen(admin.owner) == ("miss", 3)
        assert await seen(admin.their_owner, "[[say once]]  ") == ("miss", 4)
        assert await seen(admin.owner, "[[say once]]  ") == ("hit", 4)
        assert await seen(admin.owner, "[[say once]]   ") == ("miss", 5)
        assert await seen(admin.their_owner, "[[say once]]   ") == ("hit", 5)
        await _name(admin, admin.their_owner)
        assert await seen(admin.owner, "[[say once]]  ") == ("miss", 6)

        tenants = server.server.app.state.deps.tenants
        await tenants.ledger.flush()
        async with tenants.database.read() as tx:
            rows = list(await tx.execute(sa.select(usage_calls).where(usage_calls.c.cache_hit)))
        assert {row.org_id for row in rows} == {admin.ours, admin.theirs}
        assert all((row.attempts, row.cost_micros, row.output_tokens) == (0, 0, 0) for row in rows)
        assert all(row.saved_tokens > 0 and row.saved_micros > 0 for row in rows)
        async with server.http.get("/metrics") as response:
            assert 'cache_requests_total{cache="upstream",outcome="shared"} 2.0' in await response.text()


async def test_on_two_replicas_a_name_that_is_taken_back_behind_their_backs_holds_at_once(
    empty_postgres_url: str, redis_url: str, reachable_tmp_path: Path
) -> None:
    database = Database(empty_postgres_url)
    await migrations.migrate(database)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(database.close)
        upstream = await stack.enter_async_context(ScriptedUpstream())
        settings = {"database_url": empty_postgres_url, "redis_url": redis_url, "upstream_private": True}
        starting = (
            stack.enter_async_context(replica(reachable_tmp_path / name, upstream, **settings)) for name in "ab"
        )
        first, second = await asyncio.gather(*starting)
        http = await stack.enter_async_context(aiohttp.ClientSession())

        async def post(url: str, path: str, body: Any, key: str = KEY, **headers: str) -> tuple[Any, str | None]:
            async with http.post(url + path, json=body, headers={"x-api-key": key, **headers}) as answer:
                assert answer.status == 200, await answer.text()
                return await answer.json(), answer.headers.get("cw-cache")

        orgs, keys = [], []
        for name in ("One", "Other"):
            org = (await post(first.url, "/v1/organizations", {"name": name}))[0]["id"]
            inside = {"cw-organization": org}
            key = {"name": "owner", "role": "owner"}
            keys.append((await post(first.url, "/v1/organizations/api_keys", key, **inside))[0]["secret"])
            secret = {"kind": "custom", "name": "x", "secret": {"api_key": f"sk-{name}"}, "base_url": upstream.url}
            await post(first.url, "/v1/organizations/credentials", secret, keys[-1])
            orgs.append(org)
        for other, key in zip(reversed(orgs), keys, strict=True):
            await post(first.url, "/v1/organizations/policies", {"cache_share_with": [other]}, key)

        async def ask(url: str, key: str) -> str | None:
            body = {"model": "claude-sonnet-5-5", "max_tokens": 1024, "temperature": 0}
            body["messages"] = [{"role": "user", "content": "[[say once]]"}]
            return (await post(url, "/v1/messages", body, key, **{"cw-cache": "use"}))[1]

        assert (await ask(first.url, keys[0]), upstream.count) == ("miss", 1)
        assert (await ask(second.url, keys[1]), upstream.count) == ("hit", 1)
        async with database.transaction() as tx:  # nobody is told: no announcement, and no replica that did it
            await tx.execute(sa.update(organizations).where(organizations.c.id == orgs[0]).values(settings={}))
        assert (await ask(second.url, keys[1]), upstream.count) == ("miss", 2)
