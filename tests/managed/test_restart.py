"""What waits for a client outlives the process, and the server."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from anthropic import AsyncAnthropic

from claude_wrapper.testing.upstream import ScriptedUpstream
from managed.driving import BOTH_ASK, WEATHER, history, message, new_session, texts, turn, until_idle
from running_server import KEY, Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

SETTINGS = {"sandbox": "none", "security_level": "permissive", "drain_seconds": 1.0}


def sdk(server: Running) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0)


async def test_pending_approvals_and_custom_calls_outlive_a_restart_of_the_server(reachable_tmp_path: Path) -> None:
    prompt = (
        '[[tool Bash {"command":"echo from-the-shell"}]] [[tool mcp__client__get_weather {"city":"Rome"}]] '
        '[[tool Bash {"command":"echo never"}]] [[then]]'
    )
    async with running(reachable_tmp_path, **SETTINGS) as server, sdk(server) as client:
        session = (await new_session(client, tools=[BOTH_ASK, WEATHER])).id
        await turn(client, session, message("remember the plum"))
        asked = await turn(client, session, message(prompt))
        calls = [event.id for event in asked if event.type in {"agent.tool_use", "agent.custom_tool_use"}]
        assert asked[-1].stop_reason.event_ids == calls
    async with running(reachable_tmp_path, **SETTINGS) as server, sdk(server) as client:
        found = await client.beta.sessions.retrieve(session)
        assert found.status == "idle"
        before = await history(client, session)
        await turn(client, session, {"type": "user.tool_confirmation", "tool_use_id": calls[0], "result": "allow"})
        weather = [{"type": "text", "text": "sunny in Rome"}]
        left = await turn(
            client, session, {"type": "user.custom_tool_result", "custom_tool_use_id": calls[1], "content": weather}
        )
        assert left[-1].stop_reason.event_ids == [calls[2]]
        assert server.upstream.calls == []
        rest = await turn(
            client, session, {"type": "user.tool_confirmation", "tool_use_id": calls[2], "result": "deny"}
        )
        assert rest[-1].stop_reason.type == "end_turn"
        said = texts(rest)[-1]
        assert "from-the-shell" in said
        assert "sunny in Rome" in said
        assert len(server.upstream.calls) == 1, "the model message that was said again is not paid again"
        log = await history(client, session)
        assert [one.id for one in log[: len(before)]] == [one.id for one in before]
        assert len({one.id for one in log}) == len(log)
        assert sum(one.type == "agent.tool_use" for one in log) == 2
        assert "remember the plum" in texts(await turn(client, session, message("[[recall]]")))[0]


async def test_a_process_that_dies_while_it_waits_costs_nothing(client: AsyncAnthropic, server: Running) -> None:
    session = (await new_session(client, tools=[BOTH_ASK])).id
    asked = await turn(client, session, message('[[tool Bash {"command":"echo alive"}]] [[then]]'))
    call = next(event for event in asked if event.type == "agent.tool_use")
    conversation = server.server.conversations.find(session)
    assert conversation is not None
    assert conversation.process is not None
    os.kill(conversation.process.pid, signal.SIGKILL)
    await conversation.settled()
    events = await turn(client, session, {"type": "user.tool_confirmation", "tool_use_id": call.id, "result": "allow"})
    assert "alive" in texts(events)[-1]
    assert events[-1].stop_reason.type == "end_turn"
    kinds = [one.type for one in await history(client, session)]
    assert "session.error" not in kinds
    assert kinds.count("agent.tool_result") == 1


@pytest.mark.parametrize("given_up", [True, False], ids=["given up", "drain"])
async def test_an_answer_that_comes_while_a_waiting_turn_is_ended_is_not_lost(
    client: AsyncAnthropic, server: Running, monkeypatch: pytest.MonkeyPatch, *, given_up: bool
) -> None:
    """The answer is in the log, and before its runner looks the server drains, or gives the waiting process up."""
    sessions = server.server.sessions
    session = (await new_session(client, tools=[WEATHER])).id
    asked = await turn(client, session, message('[[tool mcp__client__get_weather {"city":"Rome"}]] [[then]]'))
    call = next(event.id for event in asked if event.type == "agent.custom_tool_use")
    conversation = server.server.conversations.find(session)
    assert conversation is not None
    sunny = [{"type": "text", "text": "sunny in Rome"}]
    answer = {"type": "user.custom_tool_result", "custom_tool_use_id": call, "content": sunny}
    async with await client.beta.sessions.events.stream(session) as stream:
        with monkeypatch.context() as unseen:
            unseen.setattr(sessions, "start", lambda *_: None)
            await client.beta.sessions.events.send(session, events=[answer])
        if given_up:
            await conversation.suspend()
            await conversation.settled()
            await client.beta.sessions.retrieve(session)  # looks after it
        else:
            sessions._runners[session].drain()
        rest = await until_idle(stream)
    assert "sunny in Rome" in texts(rest)[-1]
    assert rest[-1].stop_reason.type == "end_turn"
    assert len(server.upstream.calls) == 2, "the message that called is not paid again"


async def test_what_failed_turns_left_unanswered_is_told_once(client: AsyncAnthropic, server: Running) -> None:
    session = (await new_session(client)).id
    for number in range(3):
        async with await client.beta.sessions.events.stream(session) as stream:
            await client.beta.sessions.events.send(session, events=[message(f"left-{number} [[hang]]")])
            await server.upstream.wait_for(number + 1)
            conversation = server.server.conversations.find(session)
            assert conversation is not None
            assert conversation.process is not None
            os.kill(conversation.process.pid, signal.SIGKILL)
            assert "session.error" in [one.type for one in await until_idle(stream)]
    assert texts(await turn(client, session, message("[[say well again]]"))) == ["well again"]
    told = json.dumps(server.upstream.calls[-1].body["messages"])
    assert [told.count(f"left-{number}") for number in range(3)] == [1, 1, 1]


async def test_a_call_that_ran_before_the_restart_does_not_run_again(reachable_tmp_path: Path) -> None:
    counter = reachable_tmp_path / "ran"
    prompt = f'[[tool Bash {{"command":"echo x >> {counter}; echo first"}}]] [[tool Bash {{"command":"echo second"}}]] [[then]]'
    async with running(reachable_tmp_path, **SETTINGS) as server, sdk(server) as client:
        session = (await new_session(client, tools=[BOTH_ASK])).id
        asked = await turn(client, session, message(prompt))
        calls = [event.id for event in asked if event.type == "agent.tool_use"]
        async with await client.beta.sessions.events.stream(session) as stream:
            confirmation = {"type": "user.tool_confirmation", "tool_use_id": calls[0], "result": "allow"}
            await client.beta.sessions.events.send(session, events=[confirmation])
            async for event in stream:
                if event.type == "agent.tool_result":
                    break
    assert counter.read_text() == "x\n"
    async with running(reachable_tmp_path, **SETTINGS) as server, sdk(server) as client:
        rest = await turn(
            client, session, {"type": "user.tool_confirmation", "tool_use_id": calls[1], "result": "allow"}
        )
        assert "first" in texts(rest)[-1]
        assert "second" in texts(rest)[-1]
        results = [one for one in await history(client, session) if one.type == "agent.tool_result"]
        assert len(results) == 2
    assert counter.read_text() == "x\n"


async def test_a_turn_whose_server_stopped_goes_on_in_the_next_one(reachable_tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream:
        settings = {**SETTINGS, "upstream_url": upstream.url}
        async with running(reachable_tmp_path, **settings) as server, sdk(server) as client:
            session = (await new_session(client)).id
            await turn(client, session, message("remember the fig"))
            async with await client.beta.sessions.events.stream(session) as stream:
                await client.beta.sessions.events.send(session, events=[message("[[recall]] [[hang 1]] [[once]]")])
                await upstream.wait_for(2)
                async for event in stream:
                    if event.type == "span.model_request_start":
                        break
            before = await history(client, session)
        async with running(reachable_tmp_path, **settings) as server, sdk(server) as client:
            async with await client.beta.sessions.events.stream(
                session, extra_headers={"last-event-id": str(len(before))}
            ) as stream:
                rest = await until_idle(stream)
            assert [one.type for one in rest].count("session.status_rescheduled") == 1
            assert len(texts(rest)) == 1, "the whole answer, once"
            assert "remember the fig" in texts(rest)[0]
            log = await history(client, session)
            assert "session.error" not in [one.type for one in log]
            opened = {one.id for one in log if one.type == "span.model_request_start"}
            assert opened == {one.model_request_start_id for one in log if one.type == "span.model_request_end"}
