"""Outcomes where a server stops in the middle, and where a grader cannot be asked."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import anthropic
import pytest
from anthropic import AsyncAnthropic

from claude_wrapper.testing.upstream import ScriptedUpstream
from managed.driving import history, new_session, texts
from managed.graded import ends, outcome, spans, verdict
from replicas import SHARED, replica
from running_server import KEY, Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

SETTINGS = {"sandbox": "none", "security_level": "permissive"}


async def test_a_server_that_stops_in_mid_evaluation_leaves_it_to_the_next_one(
    reachable_tmp_path: Path, stores: dict[str, str]
) -> None:
    settings = {**SETTINGS, **SHARED, **stores, "drain_seconds": 0.5}
    async with ScriptedUpstream() as upstream:
        settings["upstream_url"] = upstream.url
        definition = outcome(
            "[[say draft]]", verdict("needs_revision", "[[say better]]"), "[[hang]]", verdict("satisfied", "good")
        )
        async with running(reachable_tmp_path, **settings) as server, sdk(server) as client:
            session = (await new_session(client)).id
            await client.beta.sessions.events.send(session, events=[definition])
            async with asyncio.timeout(30):
                await upstream.wait_for(4)
            before = await history(client, session)
            assert spans(before) == ["start", "end", "start"]
        async with running(reachable_tmp_path, **settings) as server, sdk(server) as client:
            async with asyncio.timeout(30):
                while (found := await client.beta.sessions.retrieve(session)).status != "idle":
                    await asyncio.sleep(0.05)
            log = await history(client, session)
    assert spans(log) == ["start", "end", "start", "ongoing", "end"]
    assert [one[:2] for one in ends(log)] == [(0, "needs_revision"), (1, "satisfied")]
    assert [one.id for one in log[: len(before)]] == [one.id for one in before]
    assert texts(log) == ["draft", "better"]
    assert [one.type for one in log].count("session.status_idle") == 1
    [state] = found.outcome_evaluations
    assert (state.iteration, state.result) == (1, "satisfied")


@pytest.mark.parametrize("stores", ["postgres and redis"], indirect=True)
async def test_a_holder_that_is_killed_in_mid_evaluation_leaves_it_to_the_other_replica(
    reachable_tmp_path: Path, stores: dict[str, str]
) -> None:
    async with ScriptedUpstream() as upstream:
        definition = outcome("[[say draft]]", "[[hang]]", verdict("needs_revision", "[[say better]]"), "[[hang]]")
        definition["rubric"]["content"] += f" [[again]] {verdict('satisfied', 'good')}"
        names = ("one", "other")
        async with AsyncExitStack() as stack:
            starting = [
                stack.enter_async_context(replica(reachable_tmp_path / one, upstream, **stores)) for one in names
            ]
            one, other = await asyncio.gather(*starting)
            async with one.sdk() as client:
                session = (await new_session(client)).id
                await client.beta.sessions.events.send(session, events=[definition])
                async with asyncio.timeout(30):
                    await upstream.wait_for(2)
                before = await history(client, session)
            one.signal(signal.SIGKILL)
            await one.gone()
            async with asyncio.timeout(60):
                await upstream.wait_for(
                    5
                )  # the other one's: the verdict, the revision, and its evaluation, which hangs
            other.signal(signal.SIGKILL)
            await other.gone()
            last = await stack.enter_async_context(replica(reachable_tmp_path / "last", upstream, **stores))
            async with last.sdk() as client, asyncio.timeout(60):
                while (found := await client.beta.sessions.retrieve(session)).status != "idle":
                    await asyncio.sleep(0.05)
                log = await history(client, session)
    assert [one.id for one in log[: len(before)]] == [one.id for one in before]
    assert len({one.id for one in log}) == len(log)
    assert spans(log) == ["start", "ongoing", "end", "start", "ongoing", "end"]
    assert [one[:2] for one in ends(log)] == [(0, "needs_revision"), (1, "satisfied")]
    assert texts(log) == ["draft", "better"]
    assert [one.type for one in log].count("session.status_idle") == 1
    assert found.outcome_evaluations[0].result == "satisfied"


@pytest.mark.parametrize("stores", ["postgres and redis"], indirect=True)
async def test_a_server_that_drains_waits_for_the_verdict_and_leaves_the_revision_to_another(
    reachable_tmp_path: Path, stores: dict[str, str]
) -> None:
    slow = "[[first 3000]] " + verdict("needs_revision", "[[say better]]")
    async with ScriptedUpstream() as upstream, AsyncExitStack() as stack:
        one = await stack.enter_async_context(replica(reachable_tmp_path / "one", upstream, **stores))
        other = await stack.enter_async_context(replica(reachable_tmp_path / "other", upstream, **stores))
        async with one.sdk() as client:
            session = (await new_session(client)).id
            definition = outcome("[[say draft]]", slow, verdict("satisfied", "good"))
            await client.beta.sessions.events.send(session, events=[definition])
            async with asyncio.timeout(30):
                await upstream.wait_for(2)
        one.signal(signal.SIGTERM)
        async with other.sdk() as client, asyncio.timeout(60):
            while (await client.beta.sessions.retrieve(session)).status != "idle":
                await asyncio.sleep(0.05)
            log = await history(client, session)
        assert await one.gone() == 0
        assert spans(log) == ["start", "end", "start", "end"], "nobody asked for the first verdict again"
        assert texts(log) == ["draft", "better"]
        assert len(upstream.calls) == 4


async def test_outcomes_are_refused_by_name_under_an_oauth_credential(reachable_tmp_path: Path) -> None:
    settings = {**SETTINGS, "allow_oauth": True}
    async with running(reachable_tmp_path, **settings) as server, sdk(server) as client:
        session = (await new_session(client)).id
        stored = {"kind": "oauth", "name": "mine", "secret": {"access_token": "sk-ant-oat01-mine"}}
        async with server.http.post("/v1/organizations/credentials", json=stored) as made:
            assert made.status == 200, await made.text()
        with pytest.raises(anthropic.PermissionDeniedError, match=r"events\[0\].*OAuth"):
            await client.beta.sessions.events.send(session, events=[outcome("x", "y")])
        assert server.upstream.calls == []


def sdk(server: Running) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0)
