"""The holder is taken for dead before each of its writes in turn: the log has no gap, nothing twice, and the whole answer."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from anthropic import AsyncAnthropic
from sqlalchemy.util.concurrency import await_

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.sessions import eventlog
from claude_wrapper.storage import Database, migrations
from claude_wrapper.storage.tables.sessions import sessions
from claude_wrapper.testing.upstream import ScriptedUpstream
from managed.driving import history, message, new_session, texts
from replicas import SHARED
from running_server import KEY, Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli, pytest.mark.timeout(400)]

ALLOWED = {
    "type": "agent_toolset_20260401",
    "default_config": {"enabled": False},
    "configs": [{"name": "bash", "enabled": True, "permission_policy": {"type": "always_allow"}}],
}


def sdk(server: Running) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0)


async def buried(new: Running, session: str) -> None:
    """The new holder takes the session, as it does when the database has not heard of the old one for a lease."""
    own = new.server.sessions.books.own
    async with new.server.sessions.books.db.transaction() as tx:
        await tx.execute(sa.text("SET LOCAL lock_timeout = '500ms'"))
        taken = await tx.execute(
            sa.update(sessions)
            .where(sessions.c.id == session)
            .values(holder=own.replica, fence=sessions.c.fence + 1)
            .returning(sessions.c.fence)
        )
        fence = taken.scalar_one()
    own.made(session, fence)


async def until_idle(client: AsyncAnthropic, session: str) -> list[Any]:
    async with asyncio.timeout(40):
        while True:
            log = await history(client, session)
            if log and log[-1].type == "session.status_idle":
                return log
            await asyncio.sleep(0.05)


async def test_whichever_write_the_holder_dies_at_the_log_is_whole(
    empty_postgres_url: str, redis_url: str, reachable_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = Database(empty_postgres_url)
    await migrations.migrate(db)
    await db.close()
    real = eventlog.EventLog.write_now
    dies_at, seen = 0, 0
    servers: list[Running] = []

    def write(self: Any, tx: Any, principal: Any, session: str, *given: Any, **kw: Any) -> Any:
        nonlocal seen
        if kw.get("fence") is not None and servers and self is servers[0].server.sessions.books.log:
            seen += 1
            if seen == dies_at:
                # Outside of this transaction, which has locked nothing of the session yet.
                # A holder that has locked the row cannot lose the session before it has written: nothing to take then.
                with contextlib.suppress(StorageUnavailable, sa.exc.DBAPIError):
                    await_(asyncio.create_task(buried(servers[1], session)))
        return real(self, tx, principal, session, *given, **kw)

    monkeypatch.setattr(eventlog.EventLog, "write_now", write)
    async with ScriptedUpstream() as upstream:
        settings = {
            "database_url": empty_postgres_url,
            "redis_url": redis_url,
            "upstream_url": upstream.url,
            "sandbox": "none",
            "security_level": "permissive",
            "lease_seconds": 1.0,
            **SHARED,
        }
        async with (
            running(reachable_tmp_path / "old", **settings) as old,
            running(reachable_tmp_path / "new", **settings) as new,
            sdk(old) as client,
            sdk(new) as other,
        ):
            servers += [old, new]
            points = 0
            while True:
                dies_at, seen = points + 1, 0
                counter = reachable_tmp_path / f"ran{points}"
                session = (await new_session(client, tools=[ALLOWED])).id
                prompt = f'[[tool Bash {{"command":"echo x >> {counter}; echo ran"}}]] [[then]]'
                await client.beta.sessions.events.send(session, events=[message(prompt)])
                log = await until_idle(other, session)
                kinds = [one.type for one in log]
                where = f"write {dies_at}: {kinds}"
                assert len({one.id for one in log}) == len(log), where
                # That the workspace of an unfinished turn is not on the new holder's machine is said, and nothing else.
                errors = [one.error.message for one in log if one.type == "session.error"]
                assert all("empty workspace" in one for one in errors), errors
                assert kinds.count("agent.tool_use") == 1, where
                assert kinds.count("agent.tool_result") == 1, where
                assert len(texts(log)) == 1, where
                assert texts(log)[0].startswith("Tool said: "), where
                opened = {one.id for one in log if one.type == "span.model_request_start"}
                assert opened == {one.model_request_start_id for one in log if one.type == "span.model_request_end"}, (
                    where
                )
                ran = counter.read_text().count("x") if counter.exists() else 0
                assert ran <= 1, where
                if seen < dies_at:
                    assert ran == 1
                    break
                points += 1
            assert points >= 4, "begin, the call, its result, the answer"
