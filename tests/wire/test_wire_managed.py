"""Turns of the CLI as Managed Agents events."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.wire.managed import Output, TurnTranslator, delta_frames
from claude_wrapper.wire.managed_input import CLIENT_EVENTS, check_events
from claude_wrapper.wire.managed_tools import shown
from claude_wrapper.wire.streamjson import Frame
from cliframes import assistant, event, line, request, result, tool_result


def translator(**verdicts: str) -> TurnTranslator:
    numbers = itertools.count(1)
    return TurnTranslator(lambda prefix: f"{prefix}_{next(numbers)}", lambda name, _: verdicts.get(name, "allow"))


def fed(turn: TurnTranslator, frames: Iterable[Frame]) -> list[Output]:
    return [turn.feed(frame) for frame in frames]


def events_of(outputs: list[Output]) -> list[dict[str, Any]]:
    return [event for output in outputs for event in output.events]


TEXT = {"type": "text", "text": "hello there"}
BASH = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls", "timeout": 5}}


def test_a_plain_answer_is_a_span_and_a_message_whose_previews_join_to_it() -> None:
    turn = translator()
    outputs = fed(turn, [*request("m1", [TEXT]), result()])
    events = events_of(outputs)
    assert [one["type"] for one in events] == ["span.model_request_start", "agent.message", "span.model_request_end"]
    deltas = [one for output in outputs for one in output.previews]
    assert "".join(one.text for one in deltas) == TEXT["text"]
    assert {one.event_id for one in deltas} == {events[1]["id"]}
    assert events[2]["model_request_start_id"] == events[0]["id"]
    assert events[2]["model_usage"]["output_tokens"] == 7
    assert turn.outcome is not None
    assert turn.outcome.stop_reason == {"type": "end_turn"}


def test_thinking_is_a_signal_without_its_text() -> None:
    block = {"type": "thinking", "thinking": "secret thoughts", "signature": "sig"}
    events = events_of(fed(translator(), request("m1", [block, TEXT])))
    assert [one["type"] for one in events][1:3] == ["agent.thinking", "agent.message"]
    assert "secret" not in json.dumps(events)


def test_calls_are_published_with_the_servers_verdict_and_joined_with_their_results() -> None:
    ask = {**BASH, "id": "toolu_2", "name": "Read", "input": {"file_path": "a", "offset": 3, "limit": 2}}
    custom = {"type": "tool_use", "id": "toolu_3", "name": "mcp__client__weather", "input": {}}
    remote = {"type": "tool_use", "id": "toolu_4", "name": "mcp__docs__find", "input": {}}
    turn = translator(Read="ask")
    outputs = fed(turn, request("m1", [BASH, ask, custom, remote], "tool_use"))
    calls = [one for one in events_of(outputs) if one["type"].endswith("_use")]
    assert [(one["type"], one["name"], one.get("evaluated_permission")) for one in calls] == [
        ("agent.tool_use", "bash", "allow"),
        ("agent.tool_use", "read", "ask"),
        ("agent.custom_tool_use", "weather", None),
        ("agent.mcp_tool_use", "find", "allow"),
    ]
    assert calls[0]["input"] == {"command": "ls", "timeout_ms": 5}
    assert calls[1]["input"] == {"file_path": "a", "view_range": [3, 4]}
    assert [call.kind for output in outputs for call in output.calls] == ["tool", "approval", "custom", "tool"]
    assert outputs[-1].settled
    results = events_of(fed(turn, [tool_result(f"toolu_{number}") for number in (1, 2, 3, 4)]))
    assert [one["type"] for one in results] == ["agent.tool_result", "agent.tool_result", "agent.mcp_tool_result"]
    assert results[0]["tool_use_id"] == calls[0]["id"]
    assert results[2]["mcp_tool_use_id"] == calls[3]["id"]


def test_a_request_that_dies_is_closed_as_an_error() -> None:
    turn = translator()
    frames = request("m1", [TEXT])[:5]
    events = events_of(fed(turn, [*frames, *request("m2", [TEXT])]))
    ends = [one for one in events if one["type"] == "span.model_request_end"]
    assert [one["is_error"] for one in ends] == [True, False]


def test_sub_agents_are_threads_whose_asks_are_told_on_the_sessions_own_stream() -> None:
    turn = translator(Read="ask")
    task = {"type": "tool_use", "id": "toolu_t", "name": "Task", "input": {"subagent_type": "reader"}}
    fed(turn, request("m1", [task], "tool_use"))
    read = {"type": "tool_use", "id": "toolu_r", "name": "Read", "input": {"file_path": "a"}}
    child = line(
        type="assistant",
        parent_tool_use_id="toolu_t",
        message={"id": "c1", "model": "claude-x", "role": "assistant", "content": [TEXT, read], "usage": {}},
    )
    output = turn.feed(child)
    assert [one["type"] for one in output.events] == [
        "session.thread_created",
        "session.thread_status_running",
        "span.model_request_start",
        "agent.message",
        "agent.tool_use",
    ]
    assert output.events[0]["agent_name"] == "reader"
    assert output.events[3]["session_thread_id"] == output.events[0]["session_thread_id"]
    assert output.events[4]["cross_posted"]
    ended = turn.feed(tool_result("toolu_t"))
    assert ended.threads[0][2] == "idle"


@pytest.mark.parametrize(
    ("fields", "reason", "error"),
    [
        ({}, "end_turn", None),
        ({"subtype": "error_max_turns", "is_error": True}, "retries_exhausted", "tool_use_limit_reached_error"),
        ({"subtype": "error_max_budget_usd", "is_error": True}, "budget_reached", None),
        ({"is_error": True, "api_error_status": 429}, "retries_exhausted", "model_rate_limited_error"),
        ({"is_error": True, "api_error_status": 529}, "retries_exhausted", "model_overloaded_error"),
        ({"is_error": True, "api_error_status": 402}, "retries_exhausted", "billing_error"),
        ({"is_error": True, "api_error_status": 500}, "retries_exhausted", "model_request_failed_error"),
        ({"is_error": True}, "retries_exhausted", "unknown_error"),
        ({"is_error": True, "terminal_reason": "aborted_streaming"}, "end_turn", None),
    ],
)
def test_how_a_turn_ends(fields: dict[str, Any], reason: str, error: str | None) -> None:
    turn = translator()
    turn.feed(result(**fields))
    assert turn.outcome is not None
    assert turn.outcome.stop_reason["type"] == reason
    assert (turn.outcome.error or {}).get("type") == error


def test_a_refusal_keeps_its_details() -> None:
    turn = translator()
    frames = request("m1", [TEXT], "refusal")
    fed(turn, [*frames, result(is_error=True)])
    assert turn.outcome is not None
    assert turn.outcome.stop_reason == {"type": "refusal"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "id", "content"]), inner),
    max_leaves=8,
)
blocks = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_use", "thinking", "tool_result", "web_search_tool_result", "odd"])},
    optional={
        "id": json_values,
        "name": json_values,
        "input": json_values,
        "text": json_values,
        "tool_use_id": json_values,
    },
)


@st.composite
def odd_frames(draw: st.DrawFn) -> Frame:
    kind = draw(st.sampled_from(["assistant", "user", "stream_event", "system", "result", "unheard_of"]))
    fields: dict[str, Any] = {"type": kind, "subtype": draw(st.sampled_from(["init", "compact_boundary", "x"]))}
    fields["parent_tool_use_id"] = draw(st.sampled_from([None, "toolu_1"]))
    content = draw(st.lists(blocks, max_size=3) | json_values)
    fields["message"] = draw(
        st.just({"id": draw(json_values), "content": content, "usage": draw(json_values)}) | json_values
    )
    fields["mcp_servers"] = draw(json_values)
    if kind == "stream_event":
        name = draw(
            st.sampled_from(
                ["message_start", "content_block_start", "content_block_delta", "message_delta", "message_stop", "y"]
            )
        )
        data = {"type": name, "index": draw(json_values), "delta": draw(json_values), "message": draw(json_values)}
        fields["event"] = {**data, "content_block": draw(blocks | json_values), "usage": draw(json_values)}
    return line(**fields)


@settings(max_examples=150, deadline=None)
@given(st.lists(odd_frames(), max_size=12))
def test_no_frame_of_the_untrusted_process_is_an_error_and_ids_are_never_used_twice(frames: list[Frame]) -> None:
    turn = translator()
    outputs = [*fed(turn, frames), turn.close()]
    events = events_of(outputs)
    assert len({one["id"] for one in events}) == len(events)
    starts = {one["id"] for one in events if one["type"] == "span.model_request_start"}
    ends = [one["model_request_start_id"] for one in events if one["type"] == "span.model_request_end"]
    assert len(ends) == len(set(ends))
    assert set(ends) == starts
    json.dumps(events)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=3), min_size=1, max_size=3))
def test_previews_of_any_text_join_to_the_events(requests: list[list[str]]) -> None:
    turn = translator()
    joined: dict[str, str] = {}
    for number, texts in enumerate(requests):
        for output in fed(turn, request(f"m{number}", [{"type": "text", "text": text} for text in texts])):
            for delta in output.previews:
                assert delta.start or delta.offset == len(joined[delta.event_id])
                joined[delta.event_id] = joined.get(delta.event_id, "") + delta.text
                assert next(one["type"] for one in delta_frames(delta)) in {"event_start", "event_delta"}
            for one in output.events:
                if one["type"] == "agent.message":
                    assert joined[one["id"]] == one["content"][0]["text"]


def test_tool_names_of_later_versions_pass_through() -> None:
    assert shown("NotebookEdit", {"a": 1}).name == "notebookedit"
    assert shown("mcp__a__b__c", {}).name == "b__c"


def test_event_of_a_whole_frame_without_partial_messages() -> None:
    turn = translator()
    events = events_of(fed(turn, [assistant("m1", TEXT), event(type="ping"), result()]))
    assert [one["type"] for one in events] == ["span.model_request_start", "agent.message", "span.model_request_end"]


# What clients send ---------------------------------------------------------------------------------------------------

FIELDS = ("content", "tool_use_id", "custom_tool_use_id", "result", "is_error", "rubric", "run_mode")
HELLO = {"type": "user.message", "content": [TEXT]}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ([], ""),
        ({}, "events"),
        ({"events": []}, "events"),
        ({"events": [HELLO] * 51}, "events"),
        ({"events": [HELLO], "more": 1}, "more"),
        ({"events": ["x"]}, "events[0]"),
        ({"events": [{"type": "agent.message"}]}, "events[0].type"),
        ({"events": [{"type": ["user.message"]}]}, "events[0].type"),
        ({"events": [{"type": "user.message"}]}, "events[0].content"),
        ({"events": [{"type": "user.message", "content": []}]}, "events[0].content"),
        ({"events": [{"type": "user.message", "content": [{"type": "tool_use"}]}]}, "events[0].content[0].type"),
        ({"events": [{"type": "user.message", "content": [{"type": "text"}]}]}, "events[0].content[0].text"),
        ({"events": [{"type": "user.message", "content": [{"type": "image"}]}]}, "events[0].content[0].source"),
        ({"events": [{**HELLO, "run_mode": "later"}]}, "events[0].run_mode"),
        ({"events": [{**HELLO, "extra": 1}]}, "events[0].extra"),
        ({"events": [{"type": "user.tool_confirmation", "result": "allow"}]}, "events[0].tool_use_id"),
        ({"events": [{"type": "user.tool_confirmation", "tool_use_id": "a", "result": "maybe"}]}, "events[0].result"),
        (
            {
                "events": [
                    {"type": "user.tool_confirmation", "tool_use_id": "a", "result": "allow", "deny_message": "x"}
                ]
            },
            "events[0].deny_message",
        ),
        ({"events": [{"type": "user.custom_tool_result"}]}, "events[0].custom_tool_use_id"),
        (
            {"events": [{"type": "user.custom_tool_result", "custom_tool_use_id": "a", "is_error": 1}]},
            "events[0].is_error",
        ),
        ({"events": [{"type": "system.message", "content": [TEXT]}]}, "events[0].type"),
        ({"events": [HELLO, {"type": "system.message", "content": [TEXT]}, HELLO]}, "events[1].type"),
        ({"events": [{"type": "user.define_outcome", "description": "d"}]}, "events[0].rubric"),
        (
            {
                "events": [
                    {
                        "type": "user.define_outcome",
                        "description": "d",
                        "rubric": {"type": "text", "content": "r"},
                        "max_iterations": 21,
                    }
                ]
            },
            "events[0].max_iterations",
        ),
    ],
)
def test_what_a_client_may_not_send_names_the_field(body: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check_events(body)
    assert (raised.value.field or "") == field


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {"type": st.sampled_from(sorted(CLIENT_EVENTS)) | json_values},
        optional=dict.fromkeys(FIELDS, json_values),
    )
)
def test_any_event_is_taken_or_refused_with_a_field(given_event: dict[str, Any]) -> None:
    refused: list[str | None] = []
    try:
        check_events({"events": [given_event]})
    except InvalidRequest as error:
        refused.append(error.field)
    assert None not in refused
