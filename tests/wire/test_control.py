"""Correlation of control calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import AgentProtocolError
from claude_wrapper.wire.control import Calls, parse_ask, parse_cancel, parse_reply
from claude_wrapper.wire.streamjson import MalformedFrame, decode_frame


def test_a_response_names_its_request_and_carries_either_an_answer_or_an_error() -> None:
    good = parse_reply(
        decode_frame(
            b'{"type":"control_response","response":{"subtype":"success","request_id":"1","response":{"a":1},"n":2}}'
        )
    )
    assert (good.request_id, good.response, good.error) == ("1", {"a": 1}, None)
    empty = parse_reply(decode_frame(b'{"type":"control_response","response":{"subtype":"success","request_id":"1"}}'))
    assert empty.response == {}
    bad = parse_reply(
        decode_frame(b'{"type":"control_response","response":{"subtype":"error","request_id":"2","error":"no"}}')
    )
    assert (bad.request_id, bad.error) == ("2", "no")


def test_a_question_of_the_cli_carries_its_subtype() -> None:
    ask = parse_ask(
        decode_frame(b'{"type":"control_request","request_id":"q","request":{"subtype":"can_use_tool","x":1}}')
    )
    assert (ask.request_id, ask.subtype, ask.request["x"]) == ("q", "can_use_tool", 1)
    assert parse_cancel(decode_frame(b'{"type":"control_cancel_request","request_id":"q"}')) == "q"


@pytest.mark.parametrize("parse", [parse_reply, parse_ask, parse_cancel])
@pytest.mark.parametrize("body", [b"", b',"response":3', b',"request":[]', b',"request_id":5', b',"response":{}'])
def test_a_frame_without_the_shape_of_a_call_is_malformed(parse: object, body: bytes) -> None:
    with pytest.raises(MalformedFrame):
        parse(decode_frame(b'{"type":"control"' + body + b"}"))  # type: ignore[operator]


@given(st.lists(st.tuples(st.sampled_from(["open", "settle"]), st.integers(0, 5).map(str)), max_size=40))
def test_each_open_call_is_settled_once_and_no_other(steps: list[tuple[str, str]]) -> None:
    calls, model = Calls(limit=4), {}
    for step, key in steps:
        if step == "settle":
            assert calls.settle(key) == model.pop(key, None)
        elif key in model or len(model) == 4:
            with pytest.raises(AgentProtocolError):
                calls.open(key, "x" + key)
        else:
            calls.open(key, "x" + key)
            model[key] = "x" + key
        assert len(calls) == len(model)
    assert calls.drain() == model
    assert len(calls) == 0
