"""Outcomes: a grader judges what the agent made, by the client's rubric, until it is good or there is nothing left to try."""

from __future__ import annotations

import asyncio
import json

import anthropic
import pytest
from anthropic import AsyncAnthropic

from claude_wrapper.sessions import evaluation
from databases import scalar
from managed.driving import MODEL, WEATHER, history, message, new_session, texts, turn, until_idle
from managed.graded import asked_call_cut, asked_of_grader, ends, outcome, shown_to, spans, verdict
from managed.workspaces import TOOLS
from running_server import Running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server(shared_server: Running) -> Running:
    """On SQLite, and on Postgres and Redis."""
    return shared_server


async def test_an_outcome_that_is_met_at_once_ends_the_session_satisfied(
    client: AsyncAnthropic, server: Running
) -> None:
    server.upstream.forget()
    session = (await new_session(client)).id
    before = (await client.beta.sessions.retrieve(session)).usage.output_tokens
    events = await turn(
        client, session, outcome("[[think a secret plan]] [[say a fine poem]]", verdict("satisfied", "It rhymes."))
    )
    assert texts(events) == ["a fine poem"]
    assert spans(events) == ["start", "end"]
    defined, start, end = (
        next(one for one in events if one.type == kind)
        for kind in ("user.define_outcome", "span.outcome_evaluation_start", "span.outcome_evaluation_end")
    )
    assert defined.max_iterations == 3
    assert defined.outcome_id == start.outcome_id == end.outcome_id
    assert defined.outcome_id.startswith("outc_")
    assert (end.outcome_evaluation_start_id, end.iteration, end.result) == (start.id, 0, "satisfied")
    assert end.explanation == "It rhymes."
    assert events[-1].stop_reason.type == "end_turn"
    found = await client.beta.sessions.retrieve(session)
    [state] = found.outcome_evaluations
    assert (state.outcome_id, state.result, state.explanation) == (defined.outcome_id, "satisfied", "It rhymes.")
    assert state.completed_at is not None
    assert not state.model_extra, "nothing that the server keeps for itself"
    [asked] = asked_of_grader(server)
    assert asked["model"] == MODEL
    assert asked["messages"][0]["content"][1]["text"] == "The answer:\n\na fine poem", "not how it was made"
    assert end.usage.output_tokens > 0
    agent = sum(one.model_usage.output_tokens for one in events if one.type == "span.model_request_end")
    assert found.usage.output_tokens == (before or 0) + agent + end.usage.output_tokens, "metered as the session's"
    assert (await history(client, session))[-1].id == events[-1].id
    database = server.server.app.state.deps.tenants.database
    async with asyncio.timeout(20):  # the ledger is written behind the answer
        query = "SELECT sum(output_tokens) FROM usage_calls WHERE session_id = :one"
        while await scalar(database, query, one=session) != found.usage.output_tokens:
            await asyncio.sleep(0.05)


async def test_what_is_missing_is_told_to_the_agent_until_it_is_there(client: AsyncAnthropic, server: Running) -> None:
    server.upstream.forget()
    session = (await new_session(client)).id
    unmet = {"criterion": "has a title", "met": False, "reason": "[[say second try]]"}
    events = await turn(
        client,
        session,
        outcome(
            "[[say first try]]",
            verdict("needs_revision", "Not yet.", unmet),
            verdict("needs_revision", "[[say third try]]"),
            verdict("satisfied", "Now."),
            max_iterations=5,
        ),
    )
    assert texts(events) == ["first try", "second try", "third try"]
    assert ends(events) == [
        (0, "needs_revision", "Not yet.\n- has a title: [[say second try]]"),
        (1, "needs_revision", "[[say third try]]"),
        (2, "satisfied", "Now."),
    ]
    assert [one.type for one in events].count("session.status_idle") == 1, "it is at work until its outcome is reached"
    assert [one.type for one in events].count("user.message") == 0, "what the grader says is no message of the client"
    judged = [one["messages"][0]["content"][1]["text"] for one in asked_of_grader(server)]
    assert judged == [f"The answer:\n\n{one} try" for one in ("first", "second", "third")]
    [state] = (await client.beta.sessions.retrieve(session)).outcome_evaluations
    assert (state.iteration, state.result) == (2, "satisfied")


async def test_after_the_last_iteration_the_agent_has_one_more_word(client: AsyncAnthropic, server: Running) -> None:
    server.upstream.forget()
    session = (await new_session(client)).id
    events = await turn(
        client,
        session,
        outcome("[[say draft]]", verdict("needs_revision", "[[say another]]"), max_iterations=2),
    )
    assert texts(events) == ["draft", "another", "another"]
    assert [one[:2] for one in ends(events)] == [(0, "needs_revision"), (1, "max_iterations_reached")]
    assert len(asked_of_grader(server)) == 2
    assert events[-1].stop_reason.type == "end_turn"
    [state] = (await client.beta.sessions.retrieve(session)).outcome_evaluations
    assert (state.result, state.completed_at is None) == ("max_iterations_reached", False)
    assert texts(await turn(client, session, message("and now?"))) == ["You said: and now?"]
    assert len(asked_of_grader(server)) == 2


@pytest.mark.parametrize(
    "garbage",
    [
        "[[say I cannot judge]]",
        '[[say {"result": "perhaps", "explanation": "x"}]]',
        '[[say {"result": "satisfied", "explanation": ""}]]',
    ],
)
async def test_a_grader_that_gives_no_verdict_is_asked_once_more_and_then_the_outcome_has_failed(
    client: AsyncAnthropic, server: Running, garbage: str
) -> None:
    server.upstream.forget()
    session = (await new_session(client)).id
    events = await turn(client, session, outcome("[[say draft]]", garbage))
    [(_, result, explanation)] = ends(events)
    assert (result, "no verdict" in explanation) == ("failed", True)
    assert len(asked_of_grader(server)) == 2
    good = await turn(client, session, outcome("[[say draft]]", garbage, verdict("satisfied", "fine")))
    assert [one[1] for one in ends(good)] == ["satisfied"]
    states = (await client.beta.sessions.retrieve(session)).outcome_evaluations
    assert [one.result for one in states] == ["failed", "satisfied"]


async def test_a_rubric_that_does_not_fit_fails_the_outcome(client: AsyncAnthropic) -> None:
    session = (await new_session(client)).id
    events = await turn(client, session, outcome("[[say draft]]", verdict("failed", "This is about boats.")))
    assert ends(events) == [(0, "failed", "This is about boats.")]
    assert events[-1].stop_reason.type == "end_turn"


async def test_a_grader_that_cannot_be_asked_is_an_error_of_the_session(client: AsyncAnthropic) -> None:
    session = (await new_session(client)).id
    events = await turn(client, session, outcome("[[say draft]]", "[[error 400]]"))
    [(_, result, explanation)] = ends(events)
    assert (result, "Scripted error 400" in explanation) == ("failed", True)
    [error] = [one.error for one in events if one.type == "session.error"]
    assert error.type == "model_request_failed_error"
    assert events[-1].stop_reason.type == "retries_exhausted"
    assert texts(await turn(client, session, message("still there?"))) == ["You said: still there?"]


async def test_an_interrupt_ends_the_evaluation_and_the_outcome(
    client: AsyncAnthropic, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BEAT_SECONDS", 0.05)
    server.upstream.forget()
    session = (await new_session(client)).id
    async with await client.beta.sessions.events.stream(session) as stream:
        await client.beta.sessions.events.send(session, events=[outcome("[[say draft]]", "[[hang]]")])
        seen = []
        async with asyncio.timeout(30):
            async for event in stream:
                seen.append(event)
                if event.type == "span.outcome_evaluation_ongoing":
                    break
        await server.upstream.wait_until(lambda: len(asked_of_grader(server)) == 1)
        running_now = await client.beta.sessions.retrieve(session)
        assert (running_now.status, running_now.outcome_evaluations[0].result) == ("running", "evaluating")
        await client.beta.sessions.events.send(session, events=[{"type": "user.interrupt"}])
        seen += await until_idle(stream)
    start = next(one for one in seen if one.type == "span.outcome_evaluation_start")
    [end] = [one for one in seen if one.type == "span.outcome_evaluation_end"]
    assert (end.result, end.outcome_evaluation_start_id) == ("interrupted", start.id)
    assert seen[-1].stop_reason.type == "end_turn"
    [state] = (await client.beta.sessions.retrieve(session)).outcome_evaluations
    assert (state.result, state.completed_at is None) == ("interrupted", False)
    await asked_call_cut(server)
    assert texts(await turn(client, session, message("go on"))) == ["You said: go on"]


async def test_an_interrupt_of_the_agents_turn_ends_the_outcome_without_an_evaluation(
    client: AsyncAnthropic, server: Running
) -> None:
    server.upstream.forget()
    session = (await new_session(client)).id
    async with await client.beta.sessions.events.stream(session) as stream:
        definition = outcome("[[say begun]] [[hang 1]]", verdict("satisfied", "fine"))
        await client.beta.sessions.events.send(session, events=[definition])
        await server.upstream.wait_for(1)
        await client.beta.sessions.events.send(session, events=[{"type": "user.interrupt"}])
        events = await until_idle(stream)
    assert spans(events) == []
    [state] = (await client.beta.sessions.retrieve(session)).outcome_evaluations
    assert state.result == "interrupted"
    assert asked_of_grader(server) == []


async def test_a_message_meanwhile_comes_first_and_a_second_outcome_waits_for_the_first(
    client: AsyncAnthropic, server: Running
) -> None:
    session = (await new_session(client)).id
    events = await turn(
        client,
        session,
        outcome("[[say one]]", verdict("satisfied", "first")),
        message("[[say by the way]]"),
        outcome("[[say two]]", verdict("satisfied", "second")),
    )
    told = [
        *(
            one.content[0].text if one.type == "agent.message" else one.explanation
            for one in events
            if one.type in {"agent.message", "span.outcome_evaluation_end"}
        ),
    ]
    assert told == ["one", "by the way", "first", "two", "second"]
    states = (await client.beta.sessions.retrieve(session)).outcome_evaluations
    assert [one.result for one in states] == ["satisfied", "satisfied"]


async def test_a_turn_that_fails_leaves_its_outcome_open_for_the_next_one(
    client: AsyncAnthropic, server: Running
) -> None:
    server.upstream.forget()
    session = (await new_session(client)).id
    failed = await turn(client, session, outcome("[[error 400]]", verdict("satisfied", "fine")))
    assert failed[-1].stop_reason.type == "retries_exhausted"
    assert spans(failed) == []
    assert (await client.beta.sessions.retrieve(session)).outcome_evaluations[0].result == "running"
    events = await turn(client, session, message("[[say made after all]]"))
    assert ends(events) == [(0, "satisfied", "fine")]
    assert "made after all" in shown_to(asked_of_grader(server)[0])


async def test_an_outcome_whose_agent_waits_for_the_client_is_judged_when_it_has_gone_on(
    client: AsyncAnthropic,
) -> None:
    session = (await new_session(client, tools=[WEATHER])).id
    call = '[[tool mcp__client__get_weather {"city":"Rome"}]] [[then]]'
    asked = await turn(client, session, outcome(call, verdict("satisfied", "fine")))
    assert asked[-1].stop_reason.type == "requires_action"
    assert spans(asked) == []
    [call_id] = asked[-1].stop_reason.event_ids
    weather = [{"type": "text", "text": "sunny"}]
    events = await turn(
        client, session, {"type": "user.custom_tool_result", "custom_tool_use_id": call_id, "content": weather}
    )
    assert spans(events) == ["start", "end"]
    assert events[-1].stop_reason.type == "end_turn"


async def test_a_turn_of_the_messages_door_meanwhile_and_its_evaluation_both_come_to_their_end(
    client: AsyncAnthropic, server: Running
) -> None:
    server.upstream.forget()
    session = (await new_session(client)).id
    slow = "[[first 1500]] " + verdict("satisfied", "fine")
    await client.beta.sessions.events.send(session, events=[outcome("[[say draft]]", slow)])
    async with asyncio.timeout(30):
        await server.upstream.wait_until(lambda: len(asked_of_grader(server)) == 1)
    answer = await server.ask("[[say beside it]]", session_id=session)
    assert answer.text == "beside it"
    async with asyncio.timeout(30):
        while (found := await client.beta.sessions.retrieve(session)).status != "idle":
            await asyncio.sleep(0.05)
    assert found.outcome_evaluations[0].result == "satisfied"
    log = await history(client, session)
    assert spans(log) == ["start", "end"]
    assert texts(log) == ["draft", "beside it"]
    assert log[-1].type == "session.status_idle"


async def test_what_the_grader_uses_counts_to_the_budget_and_raising_it_goes_on(
    client: AsyncAnthropic, server: Running
) -> None:
    agent = await client.beta.agents.create(model=MODEL, name="spender")
    environment = await client.beta.environments.create(name="here", config={"type": "cloud"})
    cents = {"type": "limit", "max_list_cost": {"amount": "3", "currency": "USD"}}
    session = (await client.beta.sessions.create(agent=agent.id, environment_id=environment.id, budget=cents)).id
    answers = ("[[tokens 3000]]", verdict("needs_revision", "[[say mended]]"), verdict("satisfied", "good"))
    events = await turn(client, session, outcome("[[say draft]]", *answers))
    assert [one[:2] for one in ends(events)] == [(0, "needs_revision")]
    assert events[-1].stop_reason.type == "budget_reached"
    [usage] = [one for one in events if one.type == "session.usage"]
    assert int(usage.usage.list_cost.amount) >= 3
    assert texts(events) == ["draft"], "the revision waits for the budget"
    async with await client.beta.sessions.events.stream(session) as stream:
        raised = {"type": "limit", "max_list_cost": {"amount": "1000", "currency": "USD"}}
        await client.beta.sessions.update(session, budget=raised)
        rest = await until_idle(stream)
    assert texts(rest) == ["mended"]
    assert [one[:2] for one in ends(rest)] == [(1, "satisfied")]


async def test_the_rubric_may_be_a_file_and_the_grader_sees_the_outputs(
    client: AsyncAnthropic, server: Running
) -> None:
    server.upstream.forget()
    rubric = await client.beta.files.upload(file=("rubric.md", f"# Title\n{verdict('satisfied', 'ok')}".encode()))
    session = (await new_session(client, tools=[TOOLS])).id
    command = "echo the-report > .mnt/session/outputs/report.md; printf '\\000\\001' > .mnt/session/outputs/blob.bin"
    events = await turn(
        client,
        session,
        {
            "type": "user.define_outcome",
            "description": f"[[tool Bash {json.dumps({'command': command})}]] [[then]] [[say made it]]",
            "rubric": {"type": "file", "file_id": rubric.id},
            "max_iterations": None,
        },
    )
    assert [one[1] for one in ends(events)] == ["satisfied"]
    defined = next(one for one in events if one.type == "user.define_outcome")
    assert defined.rubric.type == "text"
    assert defined.rubric.content.startswith("# Title")
    [asked] = asked_of_grader(server)
    shown = shown_to(asked)
    assert "A file: report.md (11 bytes):\n\nthe-report\n" in shown
    assert "blob.bin (2 bytes), which is no text" in shown
    assert "echo the-report" not in shown.split("The answer:")[1], "its commands are not shown"


async def test_what_cannot_be_a_rubric_is_refused_by_name(client: AsyncAnthropic) -> None:
    session = (await new_session(client)).id
    binary = await client.beta.files.upload(file=("rubric.bin", b"\x00\x01"))
    for file_id, error, match in (
        (binary.id, anthropic.BadRequestError, r"events\[0\].rubric.file_id"),
        ("file_none", anthropic.NotFoundError, "file_none"),
    ):
        definition = {"type": "user.define_outcome", "description": "x", "rubric": {"type": "file", "file_id": file_id}}
        with pytest.raises(error, match=match):
            await client.beta.sessions.events.send(session, events=[definition])
    assert (await client.beta.sessions.retrieve(session)).outcome_evaluations == []
    assert await history(client, session) == []


async def test_a_session_may_be_made_with_its_outcome(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(model=MODEL, name="maker")
    environment = await client.beta.environments.create(name="here", config={"type": "cloud"})
    session = await client.beta.sessions.create(
        agent=agent.id,
        environment_id=environment.id,
        initial_events=[outcome("[[say it]]", verdict("satisfied", "done"))],
    )
    assert [one.result for one in session.outcome_evaluations] == ["pending"]
    async with asyncio.timeout(30):
        while (found := await client.beta.sessions.retrieve(session.id)).outcome_evaluations[0].result != "satisfied":
            await asyncio.sleep(0.05)
    assert found.outcome_evaluations[0].explanation == "done"


async def test_archiving_ends_an_evaluation(client: AsyncAnthropic, server: Running) -> None:
    server.upstream.forget()
    session = (await new_session(client)).id
    await client.beta.sessions.events.send(session, events=[outcome("[[say draft]]", "[[hang]]")])
    async with asyncio.timeout(30):
        await server.upstream.wait_until(lambda: len(asked_of_grader(server)) == 1)
    archived = await client.beta.sessions.archive(session)
    assert [one.result for one in archived.outcome_evaluations] == ["interrupted"]
    await asked_call_cut(server)
    assert [one[1] for one in ends(await history(client, session))] == ["interrupted"]
