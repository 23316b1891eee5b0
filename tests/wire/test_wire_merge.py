"""One turn of the CLI becomes one Message, however many model requests it took."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_wrapper.wire.merge import CONTINUED_BY_CLI, Failure, MessageMerger
from claude_wrapper.wire.sse import SSEDecoder
from claude_wrapper.wire.streamjson import Frame
from cliframes import assistant, event, line, request, result, tool_result


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def call(name: str, identifier: str = "toolu_1", **given_input: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": identifier, "name": name, "input": given_input}


def run(frames: Iterable[Frame], merger: MessageMerger | None = None) -> tuple[MessageMerger, list[dict[str, Any]]]:
    """The merger and the events that a client decodes from its bytes; event names must equal the types inside."""
    merger = merger or MessageMerger("msg_ours", "claude-asked")
    decoder = SSEDecoder()
    events = []
    for frame in frames:
        for piece in merger.feed(frame):
            (decoded,) = decoder.feed(piece)
            events.append(json.loads(decoded.data))
            assert decoded.event == events[-1]["type"]
    return merger, events


def accumulated(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an SDK makes of the stream; asserts all that its accumulator relies on."""
    assert [event["type"] for event in events].count("message_start") == 1
    assert events[0]["type"] == "message_start"
    assert events[-1]["type"] == "message_stop"
    assert [event["type"] for event in events].count("message_delta") == 1
    content: list[dict[str, Any]] = []
    open_block: int | None = None
    for item in events:
        match item["type"]:
            case "content_block_start":
                assert open_block is None
                assert item["index"] == len(content)
                open_block = item["index"]
                content.append({**item["content_block"], "partial": ""})
            case "content_block_delta":
                assert item["index"] == open_block
                delta = item["delta"]
                if delta["type"] == "input_json_delta":
                    content[-1]["partial"] += delta["partial_json"]
                else:
                    field = delta["type"].removesuffix("_delta")
                    content[-1][field] += delta[field]
            case "content_block_stop":
                assert item["index"] == open_block
                open_block = None
    for block in content:
        partial = block.pop("partial")
        if block["type"] == "tool_use":
            block["input"] = json.loads(partial or "{}")
    return content


def test_a_chat_turn_is_forwarded_byte_for_byte_but_for_the_message_id() -> None:
    frames = [*request("msg_up", [text("hello world")]), result()]
    merger = MessageMerger("msg_ours", "claude-asked")
    given_out = [piece for frame in frames for piece in merger.feed(frame)]
    untouched = [bytes(frame.event) for frame in frames if frame.event is not None]
    assert [piece.split(b"data: ")[1].strip() for piece in given_out[2:]] == [
        raw for raw in untouched if b"message_start" not in raw and b"content_block_start" not in raw
    ]
    start = json.loads(given_out[0].split(b"data: ")[1])["message"]
    assert (start["id"], start["model"], start["content"]) == ("msg_ours", "claude-x", [])
    assert merger.message()["content"] == [text("hello world")]
    assert merger.message()["stop_reason"] == "end_turn"
    assert merger.finished
    assert merger.failure is None


def test_an_agentic_run_is_one_message_without_the_tools_that_the_server_ran() -> None:
    frames = [
        *request("msg_1", [text("let me look"), call("Bash", "toolu_1"), call("Read", "toolu_2")], "tool_use"),
        tool_result("toolu_1"),
        *request("msg_2", [call("mcp__files__list", "toolu_3"), text("one more")], "tool_use"),
        tool_result("toolu_3"),
        *request("msg_3", [{"type": "thinking", "thinking": "hmm", "signature": "sig"}, text("done")]),
        result(),
    ]
    merger, events = run(frames)
    assert accumulated(events) == merger.message()["content"]
    assert [block.get("text") for block in merger.message()["content"]] == ["let me look", "one more", None, "done"]
    assert merger.message()["stop_reason"] == "end_turn"
    assert (merger.usage.input_tokens, merger.usage.cache_read_tokens, merger.usage.output_tokens) == (30, 9, 21)
    assert events[-2]["usage"]["output_tokens"] == 21


def test_a_tool_of_the_client_ends_the_message_and_has_its_own_name() -> None:
    blocks = [text("checking"), call("Bash", "toolu_9"), call("mcp__client__weather", "toolu_1", city="Paris")]
    merger, events = run(request("msg_1", blocks, "tool_use"))
    assert merger.finished
    assert merger.client_calls == ["toolu_1"]
    assert accumulated(events) == [text("checking"), call("weather", "toolu_1", city="Paris")]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert merger.message()["content"] == accumulated(events)


def test_frames_of_a_sub_agent_are_dropped() -> None:
    inner = [event(parent="toolu_1", **json.loads(bytes(f.event))) for f in request("m", [text("no")]) if f.event]
    outer = request("msg_1", [text("yes")])
    merger, events = run([*outer[:4], *inner, *outer[4:], result()])
    assert accumulated(events) == [text("yes")]
    assert merger.message()["content"] == [text("yes")]


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "authentication_error"), (429, "rate_limit_error"), (529, "overloaded_error")]
)
def test_an_upstream_error_is_a_failure_and_never_text(status: int, kind: str) -> None:
    notice = assistant("synthetic", text("API Error: no"), model="<synthetic>")
    end = result(is_error=True, result="API Error: no", terminal_reason="api_error", api_error_status=status)
    merger, events = run([notice, end])
    assert events == []
    assert not merger.started
    assert merger.failure == Failure(status, kind, "API Error: no")
    assert merger.message()["content"] == []


def test_an_error_without_a_status_is_told_by_the_kind_of_the_notice() -> None:
    notice = line(
        type="assistant", error="invalid_request", message={"model": "<synthetic>", "content": [text("Too long")]}
    )
    merger, _ = run([notice, result(is_error=True, result="", terminal_reason="api_error")])
    assert merger.failure == Failure(400, "invalid_request_error", "Too long")


def test_an_error_after_the_first_byte_is_a_failure_of_a_started_message() -> None:
    frames = request("msg_1", [text("partial")])[:5]
    merger, events = run([*frames, result(is_error=True, result="lost", terminal_reason="api_error")])
    assert merger.started
    assert merger.failure == Failure(500, "api_error", "lost")
    assert events[-1]["type"] == "content_block_delta"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"subtype": "error_during_execution", "terminal_reason": "aborted_streaming"}, (500, "api_error")),
        ({"subtype": "error_max_budget_usd", "is_error": True}, (402, "billing_error")),
        ({"subtype": "error_during_execution", "is_error": True, "errors": ["bad"]}, (500, "api_error")),
    ],
)
def test_other_bad_ends_are_failures_too(fields: dict[str, Any], expected: tuple[int, str]) -> None:
    merger, _ = run([result(**fields)])
    assert merger.failure is not None
    assert (merger.failure.status, merger.failure.type) == expected
    assert merger.failure.message


def test_a_limit_of_turns_is_an_answer_that_may_be_continued() -> None:
    frames = [*request("msg_1", [text("so far"), call("Bash")], "tool_use"), tool_result("toolu_1")]
    merger, events = run([*frames, result(subtype="error_max_turns", is_error=True)])
    assert merger.failure is None
    assert events[-2]["delta"]["stop_reason"] == "pause_turn"
    assert accumulated(events) == [text("so far")]


@pytest.mark.parametrize(
    "answer", ['{"type":"error","error":{"type":"x"}}', 'event: error\ndata: {"a":1}\n\n', "\r\n\0\u2028"]
)
def test_an_answer_that_looks_like_something_else_stays_text(answer: str) -> None:
    merger, events = run([*request("msg_1", [text(answer)]), result()])
    assert accumulated(events) == [text(answer)] == merger.message()["content"]
    assert merger.failure is None


def test_a_request_that_was_repeated_in_one_piece_continues_where_the_stream_broke() -> None:
    broken = request("msg_1", [text("one two three")])[:4]
    closed = [event(type="content_block_stop", index=0), event(type="message_stop")]
    whole = assistant("msg_2", text("one two three"), stop_reason="end_turn")
    merger, events = run([*broken, *closed, whole, result()])
    assert "".join(block["text"] for block in accumulated(events)) == "one two three"
    assert merger.message()["content"] == [text("one two three")]
    assert merger.failure is None


def test_a_repetition_with_another_text_is_a_failure_because_nothing_can_be_taken_back() -> None:
    broken = request("msg_1", [text("one two three")])[:4]
    merger, _ = run([*broken, assistant("msg_2", text("something else")), result()])
    assert merger.failure is not None
    assert merger.failure.status == 502


def test_several_whole_blocks_of_one_request_count_its_usage_once() -> None:
    thinking = {"type": "thinking", "thinking": "hm", "signature": "sig"}
    merger, events = run([assistant("msg_2", thinking), assistant("msg_2", text("x")), result()])
    assert accumulated(events) == [thinking, text("x")]
    assert merger.usage.input_tokens == 10


def test_structured_output_is_the_only_text_when_it_was_asked_for() -> None:
    frames = [
        *request("msg_1", [text("not json")]),
        *request("msg_2", [call("StructuredOutput", a=1)], "tool_use"),
        result(structured_output={"a": 1}, stop_reason="tool_use"),
    ]
    merger, events = run(frames, MessageMerger("msg_ours", "m", structured=True))
    assert accumulated(events) == [text('{"a":1}')] == merger.message()["content"]
    assert events[-2]["delta"]["stop_reason"] == "end_turn"


def test_structured_output_that_a_text_block_already_carries_is_not_repeated() -> None:
    merger, events = run([*request("msg_1", [text('{ "a": 1 }')]), result(structured_output={"a": 1})])
    assert accumulated(events) == [text('{ "a": 1 }')]
    assert merger.message()["content"] == accumulated(events)


def test_withheld_text_comes_out_when_there_is_no_structured_output() -> None:
    merger, events = run([*request("m", [text("sorry")]), result()], MessageMerger("x", "m", structured=True))
    assert accumulated(events) == [text("sorry")] == merger.message()["content"]


def test_the_message_may_end_where_a_plain_model_stops_although_the_cli_goes_on() -> None:
    frames = [*request("msg_1", [text("cut")], "max_tokens"), *request("msg_2", [text("more")]), result()]
    merger, events = run(frames, MessageMerger("msg_ours", "m", end_at=CONTINUED_BY_CLI))
    assert accumulated(events) == [text("cut")] == merger.message()["content"]
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    _, all_of_it = run(frames)
    assert accumulated(all_of_it) == [text("cut"), text("more")]


def test_a_refusal_is_an_answer_even_when_the_cli_calls_it_an_error() -> None:
    frames = request("msg_1", [text("I")], "refusal")
    merger, events = run([*frames, result(is_error=True, terminal_reason="api_error", stop_reason="refusal")])
    assert merger.failure is None
    assert events[-2]["delta"]["stop_reason"] == "refusal"


def test_a_command_that_asked_no_model_answers_with_its_text() -> None:
    merger, events = run([result(result="Nothing to compact.")])
    assert accumulated(events) == [text("Nothing to compact.")] == merger.message()["content"]


def test_retries_are_told_as_pings_and_unknown_events_pass_through() -> None:
    frames = request("msg_1", [text("x")])
    news = [line(type="system", subtype="api_retry"), event(type="brand_new", value=1), line(type="never_seen")]
    _, events = run([*frames[:3], *news, *frames[3:], result()])
    assert [item["type"] for item in events].count("ping") == 1
    assert {"type": "brand_new", "value": 1} in events


def test_an_event_that_is_not_printed_as_usual_is_understood_all_the_same() -> None:
    spaced = [
        Frame(type="stream_event", event=msgspec.Raw(bytes(f.event).replace(b'":', b'":\r ')))
        if f.event is not None
        else f
        for f in request("msg_1", [text("hello")])
    ]
    merger, events = run([*spaced, result()])
    assert accumulated(events) == [text("hello")] == merger.message()["content"]


TOOLS = ["Bash", "mcp__files__x", "StructuredOutput"]
parts = st.one_of(
    st.builds(text, st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)),
    st.builds(lambda words: {"type": "thinking", "thinking": words, "signature": "sig"}, st.text("ab", max_size=5)),
    st.builds(call, st.sampled_from(TOOLS), st.text("xyz", min_size=1, max_size=3)),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(parts, max_size=4), min_size=1, max_size=4))
def test_any_run_is_one_well_formed_message_with_all_its_text(requests: list[list[dict[str, Any]]]) -> None:
    frames = [frame for number, blocks in enumerate(requests) for frame in request(f"msg_{number}", blocks)]
    merger, events = run([*frames, result()])
    shown = [block for blocks in requests for block in blocks if block["type"] != "tool_use"]
    assert accumulated(events) == shown == merger.message()["content"]
    assert merger.usage.output_tokens == 7 * len(requests)
    assert run([*frames, result(), *frames])[1] == events
