"""Answers that are made here and paid by nobody: to a priming turn, and a message that was given before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from claude_wrapper.wire import sse

WORD = "ok"


def stream(model: str, message_id: str) -> bytes:
    """A complete Messages stream of one word."""
    message = _message(model, message_id) | {"content": [], "stop_reason": None}
    events: list[dict[str, object]] = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": WORD}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 1},
        },
        {"type": "message_stop"},
    ]
    return b"".join(map(_event, events))


def message(model: str, message_id: str) -> bytes:
    """The same answer, not streamed."""
    return msgspec.json.encode(_message(model, message_id))


def replay(model: str, message_id: str, content: Sequence[Mapping[str, Any]]) -> bytes:
    """A complete Messages stream that says these content blocks again and ends with stop reason `tool_use`."""
    usage = {"input_tokens": 0, "output_tokens": 0}
    message = _message(model, message_id) | {"content": [], "stop_reason": None, "usage": usage}
    events: list[dict[str, object]] = [{"type": "message_start", "message": message}]
    for index, block in enumerate(content):
        empty, deltas = _in_pieces(block)
        events.append({"type": "content_block_start", "index": index, "content_block": empty})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    stop = {"stop_reason": "tool_use", "stop_sequence": None}
    events += [{"type": "message_delta", "delta": stop, "usage": usage}, {"type": "message_stop"}]
    return b"".join(map(_event, events))


def _in_pieces(block: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """A block as its stream begins, and the deltas that complete it."""
    match block.get("type"):
        case "text":
            return {**block, "text": ""}, [{"type": "text_delta", "text": block.get("text", "")}]
        case "thinking":
            thinking = {"type": "thinking_delta", "thinking": block.get("thinking", "")}
            signature = {"type": "signature_delta", "signature": block.get("signature", "")}
            return {**block, "thinking": "", "signature": ""}, [thinking, signature]
        case "tool_use" | "server_tool_use":
            whole = msgspec.json.encode(block.get("input", {})).decode()
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": whole}]
        case _:
            return block, []


def token_count() -> bytes:
    """The answer to a token count while priming."""
    return msgspec.json.encode({"input_tokens": 1})


def _message(model: str, message_id: str) -> dict[str, object]:
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": WORD}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }


def _event(event: dict[str, object]) -> bytes:
    return sse.encode(str(event["type"]), msgspec.json.encode(event))
