"""The answer to a priming turn: one word, made here, paid by nobody."""

from __future__ import annotations

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
