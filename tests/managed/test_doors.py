"""The same conversation through both doors, and what is refused."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

from managed.driving import MODEL, WEATHER, history, message, new_session, texts, turn
from running_server import Running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


async def test_a_session_is_continued_through_messages_and_back(client: AsyncAnthropic, server: Running) -> None:
    session = (await new_session(client)).id
    await turn(client, session, message("remember the quince"))
    answer = await server.ask("[[recall]]", session_id=session)
    assert answer.status == 200, answer.body
    assert "remember the quince" in answer.text
    log = await history(client, session)
    assert [one.content[0].text for one in log if one.type == "user.message"] == ["remember the quince", "[[recall]]"]
    assert texts(log)[-1] == answer.text
    assert "[[recall]]" in texts(await turn(client, session, message("again [[recall]]")))[0]


async def test_a_named_messages_conversation_is_listed_and_continued_as_a_session(
    client: AsyncAnthropic, server: Running
) -> None:
    first = await server.ask("remember the medlar", session_id="my-chat")
    session = first.headers["cw-session-id"]
    assert session in [one.id async for one in client.beta.sessions.list()]
    assert texts(await history(client, session)) == [first.text]
    assert "remember the medlar" in texts(await turn(client, session, message("[[recall]]")))[0]
    again = await server.ask("[[recall]]", session_id="my-chat")
    assert again.headers["cw-session-id"] == session
    assert "remember the medlar" in again.text


async def test_tools_of_a_messages_caller_can_be_answered_through_the_session(
    client: AsyncAnthropic, server: Running
) -> None:
    tool = {name: value for name, value in WEATHER.items() if name != "type"}
    asked = await server.ask('[[tool mcp__client__get_weather {"city":"Rome"}]] [[then]]', session_id="t", tools=[tool])
    assert asked.body["stop_reason"] == "tool_use"
    session = asked.headers["cw-session-id"]
    call = next(one for one in await history(client, session) if one.type == "agent.custom_tool_use")
    answer = [{"type": "text", "text": "sunny in Rome"}]
    events = await turn(
        client, session, {"type": "user.custom_tool_result", "custom_tool_use_id": call.id, "content": answer}
    )
    assert "sunny in Rome" in texts(events)[-1]
    assert texts(await history(client, session))[-1] == texts(events)[-1]


async def _refused(client: AsyncAnthropic, session: str, *events: dict[str, Any]) -> anthropic.APIStatusError:
    with pytest.raises(anthropic.APIStatusError) as raised:
        await client.beta.sessions.events.send(session, events=list(events))
    return raised.value


async def test_answers_to_calls_that_are_unknown_answered_or_of_another_kind_are_refused(
    client: AsyncAnthropic,
) -> None:
    session = (await new_session(client, tools=[WEATHER])).id
    asked = await turn(client, session, message('[[tool mcp__client__get_weather {"city":"Rome"}]] [[then]]'))
    call = asked[-1].stop_reason.event_ids[0]
    unknown = await _refused(client, session, {"type": "user.custom_tool_result", "custom_tool_use_id": "sevt_none"})
    assert unknown.status_code == 400
    wrong = await _refused(client, session, {"type": "user.tool_confirmation", "tool_use_id": call, "result": "allow"})
    assert wrong.status_code == 400
    result = {"type": "user.custom_tool_result", "custom_tool_use_id": call}
    twice = await _refused(client, session, result, result)
    assert twice.status_code == 409
    assert [one.type for one in await history(client, session)][-1] == "session.status_idle", "all or nothing"
    await turn(client, session, result)
    late = await _refused(client, session, result)
    assert late.status_code == 409
    assert late.response.headers["x-should-retry"] == "false"


async def test_run_modes_of_a_busy_session(client: AsyncAnthropic, server: Running) -> None:
    session = (await new_session(client)).id
    await client.beta.sessions.events.send(session, events=[message("[[hang 1]]")])
    await server.upstream.wait_for(1)
    rejected = await _refused(client, session, message("no", run_mode="reject"))
    assert rejected.status_code == 409
    events = await turn(client, session, message("now", run_mode="interrupt"))
    assert texts(events)[-1] == "You said: now"


async def test_streams_and_lists_refuse_what_they_cannot_serve(client: AsyncAnthropic, server: Running) -> None:
    session = (await new_session(client)).id
    for path, status in (
        (f"/v1/sessions/{session}/events/stream?after=99", 400),
        (f"/v1/sessions/{session}/events/stream?after=x", 400),
        (f"/v1/sessions/{session}/events/stream?event_deltas=agent.tool_use", 400),
        (f"/v1/sessions/{session}/events?page=nonsense", 400),
        (f"/v1/sessions/{session}/events?limit=0", 400),
        ("/v1/sessions/sesn_somebody_elses/events/stream", 404),
        ("/v1/sessions/sesn_somebody_elses/events", 404),
        ("/v1/sessions?statuses[]=asleep", 400),
        (f"/v1/sessions/{session}/threads/sthr_none", 404),
    ):
        async with server.http.get(path) as response:
            assert (response.status, path) == (status, path)
    threads = [one async for one in client.beta.sessions.threads.list(session)]
    assert [one.parent_thread_id for one in threads] == [None]


async def test_events_are_paged_and_filtered(client: AsyncAnthropic) -> None:
    session = (await new_session(client)).id
    await turn(client, session, message("one"))
    everything = [one.id for one in await history(client, session)]
    assert [one.id for one in await history(client, session, limit=3)] == everything
    assert [one.id for one in await history(client, session, limit=3, order="desc")] == everything[::-1]
    said = await history(client, session, types=["agent.message", "user.message"])
    assert [one.type for one in said] == ["user.message", "agent.message"]


async def test_a_model_that_fails_is_an_error_of_the_session_which_goes_on(client: AsyncAnthropic) -> None:
    session = (await new_session(client)).id
    events = await turn(client, session, message("[[error 400]]"))
    error = next(one for one in events if one.type == "session.error").error
    assert error.type == "model_request_failed_error"
    assert events[-1].stop_reason.type == "retries_exhausted"
    assert texts(await turn(client, session, message("fine")))[-1].endswith("fine")
    assert MODEL
