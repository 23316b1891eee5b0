"""The official SDK drives sessions: only its base URL is ours."""

from __future__ import annotations

import asyncio

import anthropic
import pytest
from anthropic import AsyncAnthropic

from managed.driving import BOTH_ASK, MODEL, WEATHER, history, message, new_session, say, texts, turn, until_idle
from running_server import Running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server(shared_server: Running) -> Running:
    """On SQLite, and on Postgres and Redis."""
    return shared_server


async def test_a_session_answers_and_its_log_is_what_was_streamed(client: AsyncAnthropic) -> None:
    session = await new_session(client, system="Be brief.")
    assert (session.type, session.status) == ("session", "idle")
    events = await turn(client, session.id, message("good morning"))
    assert texts(events) == ["You said: good morning"]
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "user.message",
        "session.status_running",
        "session.thread_status_running",
        "span.model_request_start",
    ]
    assert kinds[-3:] == ["session.usage", "session.thread_status_idle", "session.status_idle"]
    assert events[-1].stop_reason.type == "end_turn"
    listed = await history(client, session.id)
    assert [one.id for one in listed] == [one.id for one in events]
    assert all(one.processed_at for one in listed)
    after = await client.beta.sessions.retrieve(session.id)
    assert after.status == "idle"
    assert after.usage.output_tokens > 0


async def test_a_second_turn_remembers_the_first(client: AsyncAnthropic) -> None:
    session = await new_session(client)
    await turn(client, session.id, message("remember the pear"))
    events = await turn(client, session.id, message("[[recall]]"))
    assert "remember the pear" in texts(events)[0]


async def test_previews_join_to_the_message(client: AsyncAnthropic) -> None:
    session = await new_session(client)
    async with await client.beta.sessions.events.stream(session.id, event_deltas=["agent.message"]) as stream:
        await say(client, session.id, "[[tokens 30]]")
        events = await until_idle(stream)
    started = [event.event.id for event in events if event.type == "event_start"]
    joined = "".join(event.delta.content.text for event in events if event.type == "event_delta")
    final = next(event for event in events if event.type == "agent.message")
    assert started == [final.id]
    assert joined == final.content[0].text
    assert sum(event.type == "event_delta" for event in events) > 1


async def test_approvals_are_asked_for_several_at_once_and_answered_one_by_one(client: AsyncAnthropic) -> None:
    session = await new_session(client, tools=[BOTH_ASK])
    prompt = '[[tool Bash {"command":"echo one"}]] [[tool Bash {"command":"echo two"}]] [[then]]'
    asked = await turn(client, session.id, message(prompt))
    calls = [event for event in asked if event.type == "agent.tool_use"]
    assert [(call.name, call.evaluated_permission) for call in calls] == [("bash", "ask")] * 2
    assert asked[-1].stop_reason.type == "requires_action"
    assert asked[-1].stop_reason.event_ids == [call.id for call in calls]
    first = await turn(
        client, session.id, {"type": "user.tool_confirmation", "tool_use_id": calls[0].id, "result": "allow"}
    )
    assert first[-1].stop_reason.event_ids == [calls[1].id]
    rest = await turn(
        client,
        session.id,
        {"type": "user.tool_confirmation", "tool_use_id": calls[1].id, "result": "deny", "deny_message": "not two"},
    )
    results = {event.tool_use_id: event for event in first + rest if event.type == "agent.tool_result"}
    assert "one" in results[calls[0].id].content[0].text
    assert "not two" in results[calls[1].id].content[0].text
    assert results[calls[1].id].is_error
    assert rest[-1].stop_reason.type == "end_turn"


async def test_custom_tools_are_run_by_the_sdks_tool_runner(client: AsyncAnthropic) -> None:
    @anthropic.beta_async_tool
    async def get_weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: Which one.
        """
        return f"sunny in {city}"

    session = await new_session(client, tools=[WEATHER])
    calls = " ".join(f'[[tool mcp__client__get_weather {{"city":"{city}"}}]]' for city in ("Paris", "Rome"))
    await say(client, session.id, f"{calls} [[then]]")
    async with asyncio.timeout(40):
        runner = client.beta.sessions.events.tool_runner(session.id, tools=[get_weather], max_idle=0.5)
        done = [call async for call in runner]
    assert len(done) == 2
    said = " ".join(texts(await history(client, session.id)))
    assert "sunny in Paris" in said
    assert "sunny in Rome" in said


async def test_an_interrupt_ends_the_turn_and_the_session_goes_on(client: AsyncAnthropic, server: Running) -> None:
    session = await new_session(client)
    async with await client.beta.sessions.events.stream(session.id) as stream:
        before = server.upstream.count
        await say(client, session.id, "[[tokens 3]] [[hang 2]]")
        await server.upstream.wait_for(before + 1)
        await client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
        events = await until_idle(stream)
    assert events[-1].stop_reason.type == "end_turn"
    assert texts(await turn(client, session.id, message("still there?"))) == ["You said: still there?"]


async def test_an_archived_session_is_readable_and_takes_no_events(client: AsyncAnthropic) -> None:
    session = await new_session(client)
    await turn(client, session.id, message("hello"))
    archived = await client.beta.sessions.archive(session.id)
    assert archived.status == "terminated"
    assert (await history(client, session.id))[-1].type == "session.status_terminated"
    with pytest.raises(anthropic.ConflictError, match="archived"):
        await say(client, session.id, "more")
    assert session.id not in [one.id async for one in client.beta.sessions.list()]
    assert session.id in [one.id async for one in client.beta.sessions.list(include_archived=True)]


async def test_a_deleted_session_ends_its_streams_and_is_gone(client: AsyncAnthropic) -> None:
    session = await new_session(client)
    async with await client.beta.sessions.events.stream(session.id) as stream:
        deleted = await client.beta.sessions.delete(session.id)
        assert deleted.type == "session_deleted"
        async with asyncio.timeout(10):
            assert [event.type async for event in stream] == ["session.deleted"]
    with pytest.raises(anthropic.NotFoundError):
        await client.beta.sessions.retrieve(session.id)


async def test_the_whole_life_of_a_session(client: AsyncAnthropic) -> None:
    """Agents, environment, vault with a credential, file, session, events with files, archive, delete."""
    agent = await client.beta.agents.create(model=MODEL, name="clerk", tools=[BOTH_ASK])
    changed = await client.beta.agents.update(agent.id, version=agent.version, system="Be brief.")
    assert changed.version > agent.version
    environment = await client.beta.environments.create(name="office", config={"type": "cloud"})
    vault = await client.beta.vaults.create(display_name="keys")
    auth = {"type": "static_bearer", "token": "a-secret-token", "mcp_server_url": "https://tools.example.com/mcp"}
    credential = await client.beta.vaults.credentials.create(vault.id, auth=auth)
    assert "a-secret-token" not in credential.to_json()
    notes = await client.beta.files.upload(file=("notes.txt", b"buy quinces", "text/plain"))
    session = await client.beta.sessions.create(
        agent=agent.id,
        environment_id=environment.id,
        vault_ids=[vault.id],
        resources=[{"type": "file", "file_id": notes.id}],
        metadata={"ticket": "7"},
    )
    (mounted,) = session.resources
    asked = await turn(client, session.id, message(f'[[tool Read {{"file_path":"{mounted.mount_path}"}}]] [[then]]'))
    (call_id,) = asked[-1].stop_reason.event_ids
    rest = await turn(client, session.id, {"type": "user.tool_confirmation", "tool_use_id": call_id, "result": "allow"})
    (read,) = (event for event in rest if event.type == "agent.tool_result")
    assert read.tool_use_id == call_id
    assert rest[-1].stop_reason.type == "end_turn"
    renamed = await client.beta.sessions.update(session.id, title="done")
    assert (renamed.title, renamed.metadata) == ("done", {"ticket": "7"})
    assert (await client.beta.sessions.archive(session.id)).archived_at is not None
    assert (await client.beta.sessions.delete(session.id)).type == "session_deleted"
    await client.beta.vaults.credentials.delete(credential.id, vault_id=vault.id)
    await client.beta.vaults.archive(vault.id)
    await client.beta.environments.archive(environment.id)
    assert (await client.beta.agents.archive(agent.id)).archived_at is not None


async def test_a_session_that_has_spent_its_budget_waits_until_it_is_raised(
    client: AsyncAnthropic, server: Running
) -> None:
    agent = await client.beta.agents.create(model=MODEL, name="spender", tools=[{"type": "agent_toolset_20260401"}])
    environment = await client.beta.environments.create(name="here", config={"type": "cloud"})
    cent = {"type": "limit", "max_list_cost": {"amount": "1", "currency": "USD"}}
    session = await client.beta.sessions.create(agent=agent.id, environment_id=environment.id, budget=cent)
    before = server.upstream.count
    events = await turn(client, session.id, message('[[tokens 2000]] [[tool Bash {"command":"sleep 2"}]] [[then]]'))
    assert events[-1].stop_reason.type == "budget_reached"
    assert server.upstream.count == before + 1, "stopped on the way"
    (spent,) = (event for event in events if event.type == "session.usage")
    assert int(spent.usage.list_cost.amount) >= 1
    assert spent.budget.max_list_cost.amount == "1"
    with pytest.raises(anthropic.ConflictError, match="budget"):
        await say(client, session.id, "more")
    raised = {"type": "limit", "max_list_cost": {"amount": "100", "currency": "USD"}}
    changed = await client.beta.sessions.update(session.id, budget=raised)
    assert changed.usage.list_cost == spent.usage.list_cost
    assert texts(await turn(client, session.id, message("and now?")))[-1] == "You said: and now?"
