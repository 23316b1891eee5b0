"""A model message that is said again: the stream of its blocks, and when it is given."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_wrapper.broker import canned
from claude_wrapper.wire.sse import SSEDecoder

BLOCKS = [
    {"type": "thinking", "thinking": "hm", "signature": "sig"},
    {"type": "text", "text": "I will look."},
    {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}},
]


def replayed(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content that a client joins from the stream."""
    blocks: list[dict[str, Any]] = []
    partial: dict[int, str] = {}
    for event in SSEDecoder().feed(canned.replay("m", "msg_1", content)):
        data = json.loads(event.data)
        assert data["type"] == event.event
        if data["type"] == "content_block_start":
            blocks.append(dict(data["content_block"]))
        if data["type"] == "content_block_delta":
            delta = data["delta"]
            name = delta["type"].removesuffix("_delta")
            if name == "input_json":
                partial[data["index"]] = delta["partial_json"]
            else:
                blocks[data["index"]][name] += delta[name]
    for index, text in partial.items():
        blocks[index]["input"] = json.loads(text)
    return blocks


def test_the_stream_joins_to_the_same_blocks_and_stops_for_tools() -> None:
    assert replayed(BLOCKS) == BLOCKS
    last = [json.loads(event.data) for event in SSEDecoder().feed(canned.replay("m", "msg_1", BLOCKS))][-2:]
    assert last[0]["delta"]["stop_reason"] == "tool_use"
    assert last[0]["usage"] == {"input_tokens": 0, "output_tokens": 0}
    assert last[1] == {"type": "message_stop"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers(0, 9)), min_size=1, max_size=4))
def test_any_inputs_come_out_as_they_went_in(inputs: list[dict[str, Any]]) -> None:
    blocks = [{"type": "tool_use", "id": f"toolu_{at}", "name": "x", "input": one} for at, one in enumerate(inputs)]
    assert replayed(blocks) == blocks


@pytest.mark.parametrize("kind", ["redacted_thinking", "something_new"])
def test_blocks_without_deltas_are_whole_from_the_start(kind: str) -> None:
    block = {"type": kind, "data": "opaque"}
    assert replayed([block]) == [block]
