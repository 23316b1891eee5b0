"""Two organisations of one company share answers, on a real server with the real CLI: by the Admin API, from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from admin.admin_world import Admin, Reply
from claude_wrapper.storage.tables.usage import usage_calls
from running_server import running

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
