"""Sessions whose tools run at the customer's: the official `EnvironmentWorker`, unmodified, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from anthropic import AsyncAnthropic, BadRequestError, ConflictError, PermissionDeniedError
from anthropic.lib.environments import EnvironmentWorker

from managed.driving import MODEL, WEATHER, history, message, say, texts, turn, until_idle
from running_server import KEY, Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

SETTINGS: dict[str, Any] = {"sandbox": "none", "security_level": "permissive", "drain_seconds": 1.0}
TOOLSET = {
    "type": "agent_toolset_20260401",
    "configs": [{"name": "web_fetch", "enabled": False}, {"name": "web_search", "enabled": False}],
}
ASKING = {**TOOLSET, "default_config": {"permission_policy": {"type": "always_ask"}}}
SKILL = b"---\nname: greeting\ndescription: How to greet people here.\n---\nSay hello in Latin.\n"


def sdk(server: Running) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0)


async def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Another process has got there."""
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if await found if inspect.isawaitable(found) else found:
                return
            await asyncio.sleep(0.05)


async def until_end(stream: Any) -> list[Any]:
    """Everything up to the end of a turn that waits for its worker in between."""
    events = await until_idle(stream, seconds=60)
    while events[-1].stop_reason.type == "requires_action":
        events += await until_idle(stream, seconds=60)
    return events


async def new_environment(server: Running, client: AsyncAnthropic) -> tuple[str, str]:
    """A self-hosted environment and a key of it."""
    made = await client.beta.environments.create(name="theirs", config={"type": "self_hosted"})
    body = {"environment_id": made.id, "name": "laptop"}
    async with server.http.post("/v1/organizations/environment_keys", json=body) as response:
        key = await response.json()
        assert response.status == 200, key
    assert key["secret"].startswith("sk-env-")
    return made.id, key["secret"]


async def hosted_session(client: AsyncAnthropic, environment: str, **agent: Any) -> Any:
    made = await client.beta.agents.create(model=MODEL, name="tester", **{"tools": [TOOLSET], **agent})
    return await client.beta.sessions.create(agent=made.id, environment_id=environment)


@contextlib.asynccontextmanager
async def serving(server: Running, environment: str, key: str, workdir: Path, **options: Any) -> AsyncIterator[None]:
    """The official worker, at work until the block ends."""
    workdir.mkdir(exist_ok=True)
    async with AsyncAnthropic(base_url=server.url, api_key="not-used", max_retries=0) as client:
        worker = EnvironmentWorker(client, environment_id=environment, environment_key=key, workdir=workdir, **options)
        task = asyncio.ensure_future(worker.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})


async def test_the_official_worker_runs_an_agents_tools(
    server: Running, client: AsyncAnthropic, tmp_path: Path
) -> None:
    environment, key = await new_environment(server, client)
    session = (await hosted_session(client, environment, tools=[TOOLSET, WEATHER])).id
    theirs = tmp_path / "theirs"
    async with serving(server, environment, key, theirs):
        events = await turn(
            client,
            session,
            message(
                '[[tool mcp__sandbox__bash {"command":"pwd"}]] '
                '[[tool mcp__sandbox__write {"file_path":"a.txt","content":"from the model"}]] [[then]]'
            ),
        )
        while events[-1].stop_reason.type == "requires_action":
            async with await client.beta.sessions.events.stream(session) as stream:
                events += await until_idle(stream)
    assert str(theirs) in texts(events)[-1]
    assert (theirs / "a.txt").read_text() == "from the model"


async def test_skills_are_there_and_a_person_decides_what_the_worker_runs(
    server: Running, client: AsyncAnthropic, tmp_path: Path
) -> None:
    environment, key = await new_environment(server, client)
    skill = await client.beta.skills.create(files=[("greeting/SKILL.md", SKILL, "text/markdown")])
    wanted = [{"type": "custom", "skill_id": skill.id, "version": "latest"}]
    session = (await hosted_session(client, environment, tools=[ASKING], skills=wanted)).id
    assert "skills/greeting/SKILL.md" in texts(await turn(client, session, message("[[system]]")))[0]
    asked = await turn(
        client,
        session,
        message(
            '[[tool mcp__sandbox__bash {"command":"cat skills/greeting/SKILL.md"}]] '
            '[[tool mcp__sandbox__bash {"command":"touch never"}]] [[then]]'
        ),
    )
    calls = [event for event in asked if event.type == "agent.tool_use"]
    assert [(one.name, one.evaluated_permission) for one in calls] == [("bash", "ask"), ("bash", "ask")]
    assert asked[-1].stop_reason.event_ids == [one.id for one in calls]
    theirs = tmp_path / "theirs"
    async with serving(server, environment, key, theirs), await client.beta.sessions.events.stream(session) as stream:
        verdicts = [("deny", {"deny_message": "not that one"}), ("allow", {})]
        for call, (verdict, more) in zip(reversed(calls), verdicts, strict=True):
            event = {"type": "user.tool_confirmation", "tool_use_id": call.id, "result": verdict, **more}
            await client.beta.sessions.events.send(session, events=[event])
        rest = await until_end(stream)
    assert "Say hello in Latin" in texts(rest)[-1]
    assert "not that one" in texts(rest)[-1]
    assert not (theirs / "never").exists()
    log = await history(client, session)
    assert [one.tool_use_id for one in log if one.type == "user.tool_result"] == [calls[0].id]
    assert [one.tool_use_id for one in log if one.type == "agent.tool_result"] == [calls[1].id]


async def test_wrong_and_doubled_results_change_nothing_and_open_calls_outlive_a_restart(
    reachable_tmp_path: Path, tmp_path: Path
) -> None:
    async with running(reachable_tmp_path, **SETTINGS) as server, sdk(server) as client:
        environment, key = await new_environment(server, client)
        session = (await hosted_session(client, environment)).id
        asked = await turn(
            client,
            session,
            message(
                '[[tool mcp__sandbox__bash {"command":"one"}]] [[tool mcp__sandbox__bash {"command":"echo two"}]] '
                "[[tool mcp__sandbox__format_disk {}]] [[then]]"
            ),
        )
        calls = [event for event in asked if event.type == "agent.tool_use"]
        assert [one.evaluated_permission for one in calls] == ["allow", "allow", "deny"], "not every name is a tool"
        assert asked[-1].stop_reason.event_ids == [one.id for one in calls[:2]]
        first = {"type": "user.tool_result", "tool_use_id": calls[0].id, "content": [{"type": "text", "text": "uno"}]}
        left = await turn(client, session, first)
        assert left[-1].stop_reason.event_ids == [calls[1].id]
        confirmed = {"type": "user.tool_confirmation", "tool_use_id": calls[1].id, "result": "allow"}
        for wrong in (first, {**first, "tool_use_id": "sevt_none"}, {**first, "tool_use_id": calls[2].id}, confirmed):
            with pytest.raises(BadRequestError):
                await client.beta.sessions.events.send(session, events=[wrong])
        before = len(server.upstream.calls)
    async with running(reachable_tmp_path, **SETTINGS) as server, sdk(server) as client:
        async with (
            await client.beta.sessions.events.stream(session) as stream,
            serving(server, environment, key, tmp_path / "theirs"),
        ):
            rest = await until_end(stream)
        said = texts(rest)[-1]
        assert "uno" in said
        assert "two" in said
        assert (before, len(server.upstream.calls)) == (1, 1), "what was said is not asked for again"
        results = [one.tool_use_id for one in await history(client, session) if one.type == "user.tool_result"]
        assert results == [one.id for one in calls[:2]]
        cut = (await turn(client, session, message('[[tool mcp__sandbox__bash {"command":"rm x"}]] [[then]]')))[-1]
        assert cut.stop_reason.type == "requires_action"
        assert (await turn(client, session, {"type": "user.interrupt"}))[-1].stop_reason.type == "end_turn"
        said_so = [one for one in await history(client, session) if one.type == "user.tool_result"][-1]
        assert said_so.is_error, "or the next worker would run it"
        assert [said_so.tool_use_id] == cut.stop_reason.event_ids
        with pytest.raises(BadRequestError):
            await client.beta.sessions.events.send(session, events=[{**first, "tool_use_id": said_so.tool_use_id}])


VANISHING = """
import asyncio, sys
from anthropic import AsyncAnthropic
url, environment, key, workdir = sys.argv[1:]
async def main():
    client = AsyncAnthropic(base_url=url, api_key="not-used")
    await client.beta.environments.work.worker(
        environment_id=environment, environment_key=key, workdir=workdir
    ).run()
asyncio.run(main())
"""


async def test_a_worker_that_vanishes_in_a_call_is_replaced_and_the_call_runs_again(
    reachable_tmp_path: Path, tmp_path: Path
) -> None:
    begun, fifo = tmp_path / "begun", tmp_path / "fifo"
    os.mkfifo(fifo)
    command = f"if test -e {begun}; then echo again; else touch {begun}; read x < {fifo}; fi"
    call = json.dumps({"command": command})
    async with running(reachable_tmp_path, work_lease_seconds=3, **SETTINGS) as server, sdk(server) as client:
        environment, key = await new_environment(server, client)
        session = (await hosted_session(client, environment)).id
        (tmp_path / "first").mkdir()
        first = await asyncio.create_subprocess_exec(
            sys.executable, "-c", VANISHING, server.url, environment, key, str(tmp_path / "first"),
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        )  # fmt: skip
        try:
            asked = await turn(client, session, message(f"[[tool mcp__sandbox__bash {call}]] [[then]]"))
            assert asked[-1].stop_reason.type == "requires_action"
            await until(begun.exists)
        finally:
            first.kill()
            await first.wait()
        async with (
            await client.beta.sessions.events.stream(session) as stream,
            serving(server, environment, key, tmp_path / "second"),
        ):
            rest = await until_end(stream)
        assert "again" in texts(rest)[-1]
        assert rest[-1].stop_reason.type == "end_turn"
    with contextlib.suppress(OSError):
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))  # lets the orphaned shell go


async def test_a_stopped_worker_leaves_and_a_dormant_session_is_queued_when_it_is_spoken_to(
    reachable_tmp_path: Path, tmp_path: Path
) -> None:
    async with running(reachable_tmp_path, work_lease_seconds=4, **SETTINGS) as server, sdk(server) as client:
        environment, key = await new_environment(server, client)
        session = (await hosted_session(client, environment)).id
        items = client.beta.environments.work
        async with (
            serving(server, environment, key, tmp_path / "theirs"),
            AsyncAnthropic(base_url=server.url, auth_token=key) as worker,
            await client.beta.sessions.events.stream(session) as stream,
        ):
            for text, stopped in (("one", 0), ("two", 1)):
                await say(client, session, f'[[tool mcp__sandbox__bash {{"command":"echo {text}"}}]] [[then]]')
                assert text in texts(await until_end(stream))[-1]
                found = [one async for one in worker.beta.environments.work.list(environment)]
                assert [one.state for one in found] == ["active", *["stopped"] * stopped]
                asked = await items.stop(found[0].id, environment_id=environment)
                assert asked.state == "stopping"
                assert asked.stop_requested_at is not None

                async def ended(work_id: str = found[0].id) -> bool:
                    return (await items.retrieve(work_id, environment_id=environment)).state == "stopped"

                await until(ended)
            with pytest.raises(ConflictError):
                await items.stop(found[0].id, environment_id=environment)
            noted = await items.update(found[0].id, environment_id=environment, metadata={"seen": "yes"})
            assert noted.metadata == {"seen": "yes"}
            assert noted.secret is None
            stats = await items.stats(environment)
            assert (stats.depth, stats.pending, stats.workers_polling) == (0, 0, 1)
            for refused in (worker.beta.environments.work.retrieve, worker.beta.environments.work.update):
                more = {} if refused == worker.beta.environments.work.retrieve else {"metadata": {}}
                with pytest.raises(PermissionDeniedError):
                    await refused(found[0].id, environment_id=environment, **more)
