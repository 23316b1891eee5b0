"""Frames from the CLI and lines to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import AgentProtocolError, InvalidRequest
from claude_wrapper.wire import streamjson
from claude_wrapper.wire.ndjson import LineFramer
from claude_wrapper.wire.streamjson import MAX_DEPTH, MalformedFrame, decode_frame

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@given(st.text(max_size=20), st.dictionaries(st.text(min_size=1, max_size=12), JSON, max_size=5))
def test_unknown_types_and_fields_pass_unchanged(kind: str, fields: dict[str, Any]) -> None:
    whole = {**fields, "type": kind}
    line = json.dumps(whole, ensure_ascii=False).encode()
    frame = decode_frame(line)
    assert frame.type == kind
    assert frame.raw is line
    assert frame.json() == whole


@given(JSON, JSON, JSON)
def test_known_fields_of_an_unexpected_kind_count_as_absent(subtype: Any, uuid: Any, parent: Any) -> None:
    line = json.dumps({"type": "t", "subtype": subtype, "uuid": uuid, "parent_tool_use_id": parent, "raw": 7}).encode()
    frame = decode_frame(line)
    assert frame.subtype == (subtype if isinstance(subtype, str) else None)
    assert frame.uuid == (uuid if isinstance(uuid, str) else None)
    assert frame.parent_tool_use_id == (parent if isinstance(parent, str) else None)
    assert frame.raw == line


def test_the_stream_event_is_handed_on_byte_for_byte() -> None:
    event = b'{ "type":"content_block_delta",  "index":0, "delta":{"text":"\\u00e9\xc3\xa9"}, "new":[1.50] }'
    frame = decode_frame(b'{"type":"stream_event","session_id":"s","event":' + event + b',"later":1}')
    assert frame.event is not None
    assert bytes(frame.event) == event
    assert frame.session_id == "s"


def test_an_ordinary_line_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamjson, "_decode_leniently", None)
    assert decode_frame(b'{"type":"stream_event","event":{"type":"ping"},"parent_tool_use_id":null}').event is not None
    assert decode_frame(b'{"type":"stream_event","event":null}').event is None
    assert decode_frame(b'{"type":"result"}').event is None


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"warning: something",
        b"[]",
        b"3",
        b"null",
        b'"type"',
        b"{}",
        b'{"type":null}',
        b'{"type":1}',
        b'{"type":"a"',
        b'{"type":"a"}{"type":"b"}',
        b"\xff\xfe",
        b'{"type":"\xff"}',
        b'{"type":"a","deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"type":"a","deep":' + b"[" * 100_000,
    ],
)
def test_what_is_not_a_frame_is_named_as_such(line: bytes) -> None:
    with pytest.raises(MalformedFrame) as caught:
        decode_frame(line)
    assert isinstance(caught.value, AgentProtocolError)


def test_the_bound_on_nesting_counts_levels_and_not_brackets() -> None:
    inner = MAX_DEPTH - 1
    decode_frame(b'{"type":"a","x":' + b"[" * inner + b"]" * inner + b"}")
    decode_frame(b'{"type":"a","x":[' + b",".join([b"[{}]"] * 5000) + b"]}")
    decode_frame(json.dumps({"type": "a", "x": "[{" * 5000, "y": '\\"[[' * 400}).encode())
    with pytest.raises(MalformedFrame, match="128 levels"):
        decode_frame(b'{"type":"a","x":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}")


def test_bytes_that_are_not_utf8_inside_a_frame_are_reported_when_it_is_read() -> None:
    frame = decode_frame(b'{"type":"a","x":"\xff"}')
    with pytest.raises(MalformedFrame):
        frame.json()


@given(st.text(max_size=50) | st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), max_size=3))
def test_a_user_line_is_one_line_and_holds_the_content_unchanged(content: Any) -> None:
    line = streamjson.user_line(content, uuid="u-1")
    assert LineFramer().feed(line) == [line[:-1]]
    decoded = json.loads(line)
    assert decoded["message"] == {"role": "user", "content": content}
    assert decoded["uuid"] == "u-1"
    assert decoded["client_composed"] is True
    assert "shouldQuery" not in decoded


def test_a_line_of_the_past_asks_nothing() -> None:
    assert json.loads(streamjson.user_line("q", should_query=False))["shouldQuery"] is False
    typed = json.loads(streamjson.user_line("/clear", as_written=False))
    assert "client_composed" not in typed
    past = json.loads(streamjson.assistant_line("a", model="m"))
    assert past["message"]["content"] == [{"type": "text", "text": "a"}]


def test_text_without_a_json_form_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest) as caught:
        streamjson.user_line("\ud800")
    assert caught.value.field == "content"


def test_control_lines_have_the_shape_that_the_cli_reads() -> None:
    asked = json.loads(streamjson.control_request_line("r1", {"subtype": "interrupt"}))
    assert asked == {"type": "control_request", "request_id": "r1", "request": {"subtype": "interrupt"}}
    done = json.loads(streamjson.control_success_line("r2", {"behavior": "allow"}))
    assert done["response"] == {"subtype": "success", "request_id": "r2", "response": {"behavior": "allow"}}
    refused = json.loads(streamjson.control_error_line("r3", "no"))
    assert refused["response"] == {"subtype": "error", "request_id": "r3", "error": "no"}
