"""Frames as CLI 2.1.327 prints them for a model request; the shapes were copied from real runs."""

from __future__ import annotations

import json
from typing import Any

from claude_wrapper.wire.streamjson import Frame, decode_frame

START_USAGE = {"input_tokens": 10, "cache_read_input_tokens": 3, "output_tokens": 1}


def line(**fields: Any) -> Frame:
    """One frame, printed as `JSON.stringify` does."""
    base = {"session_id": "s", "uuid": "u", "parent_tool_use_id": None}
    return decode_frame(json.dumps({**base, **fields}, separators=(",", ":"), ensure_ascii=False).encode())


def event(parent: str | None = None, **data: Any) -> Frame:
    return line(type="stream_event", event=data, parent_tool_use_id=parent)


def assistant(message_id: str, block: dict[str, Any], **fields: Any) -> Frame:
    message = {"id": message_id, "model": "claude-x", "role": "assistant", "content": [block], "usage": START_USAGE}
    return line(type="assistant", message={**message, "stop_reason": None, **fields})


def deltas_of(block: dict[str, Any], size: int = 3) -> list[dict[str, Any]]:
    """The block in pieces, as upstream streams it."""
    kind = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}.get(block["type"])
    delta, name = kind or ("input_json_delta", "partial_json")
    whole = block.get(name) if kind else json.dumps(block["input"])
    assert isinstance(whole, str)
    pieces = [{"type": delta, name: whole[at : at + size]} for at in range(0, len(whole), size)]
    return [*pieces, {"type": "signature_delta", "signature": "sig"}] if block["type"] == "thinking" else pieces


def empty(block: dict[str, Any]) -> dict[str, Any]:
    cleared = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}, "tool_use": {"input": {}}}
    return {**block, **cleared[block["type"]]}


def request(
    message_id: str, blocks: list[dict[str, Any]], stop: str = "end_turn", output_tokens: int = 7
) -> list[Frame]:
    """All frames of one streamed model request."""
    message = {"id": message_id, "type": "message", "role": "assistant", "model": "claude-x", "content": []}
    message |= {"stop_reason": None, "stop_sequence": None, "usage": START_USAGE}
    frames = [line(type="system", subtype="status", status="requesting"), event(type="message_start", message=message)]
    for index, block in enumerate(blocks):
        frames.append(event(type="content_block_start", index=index, content_block=empty(block)))
        frames += [event(type="content_block_delta", index=index, delta=delta) for delta in deltas_of(block)]
        frames.append(assistant(message_id, block))
        frames.append(event(type="content_block_stop", index=index))
    delta = {"stop_reason": stop, "stop_sequence": None}
    frames.append(event(type="message_delta", delta=delta, usage={"output_tokens": output_tokens, "new_field": 1}))
    frames.append(event(type="message_stop"))
    return frames


def tool_result(tool_use_id: str) -> Frame:
    content = [{"type": "tool_result", "tool_use_id": tool_use_id, "content": "done"}]
    return line(type="user", message={"role": "user", "content": content})


def result(**fields: Any) -> Frame:
    base = {"subtype": "success", "is_error": False, "result": "", "terminal_reason": "completed"}
    return line(type="result", **{**base, "stop_reason": "end_turn", "api_error_status": None, **fields})
