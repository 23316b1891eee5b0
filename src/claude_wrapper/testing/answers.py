"""What the scripted upstream answers: from a request body to blocks, usage, and prebuilt SSE frames. No I/O."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from claude_wrapper.testing import script
from claude_wrapper.testing.script import Part, Step
from claude_wrapper.wire import sse
from claude_wrapper.wire.history import HistoryHash
from claude_wrapper.wire.usage import Usage

_WORDS = re.compile(r"\S+\s*|\s+")
_MOST_DELTAS = 400  # of a text that was not asked for as `tokens`: a long echo gets longer deltas, not more
STRUCTURED_OUTPUT_TOOL = "StructuredOutput"  # the tool through which the CLI asks a model for its JSON schema


@dataclass(frozen=True, slots=True)
class Block:
    """One content block: `kind` is text, thinking or tool_use; `chunks` are the texts of its deltas."""

    kind: str
    chunks: tuple[str, ...]
    tool: str = ""
    tool_id: str = ""

    def to_wire(self) -> dict[str, Any]:
        """The finished block, as in a non-streaming answer."""
        whole = "".join(self.chunks)
        if self.kind == "tool_use":
            return {"type": "tool_use", "id": self.tool_id, "name": self.tool, "input": msgspec.json.decode(whole)}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": whole, "signature": _signature(whole)}
        return {"type": "text", "text": whole}


@dataclass(frozen=True, slots=True)
class Answer:
    """One complete answer of the model, and the step that says how it is sent."""

    blocks: tuple[Block, ...]
    stop_reason: str
    stop_sequence: str | None
    usage: Usage
    step: Step

    def stop(self) -> dict[str, Any]:
        """The fields that say why the model stopped."""
        stop: dict[str, Any] = {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}
        if self.stop_reason == "refusal":
            stop["stop_details"] = {"type": "refusal", "category": None, "explanation": "Scripted refusal."}
        return stop


def due_step(
    body: Mapping[str, Any],
    failed_before: Callable[[str], bool],
    arrivals: Callable[[str, bool], int] = lambda _text, _first_step: 1,
) -> tuple[Step, script.Received]:
    """The step that this request asks for. `failed_before(key)` says whether a once-only fault was already dealt out,
    `arrivals(text, first step)` how often a text with several answers has arrived, this time included."""
    heard = script.received(body["messages"])
    answers = script.answers_in(heard.text)
    at = arrivals(heard.text, heard.round == 0) - 1 if len(answers) > 1 else 0
    steps = script.parse(answers[min(at, len(answers) - 1)])
    if heard.round >= len(steps):
        return Step(), heard
    step = steps[heard.round]
    if step.once and failed_before(f"{heard.round} {heard.text}"):
        step = script.without_faults(step)
    return step, heard


def answer(
    body: Mapping[str, Any], raw: bytes, step: Step, heard: script.Received, new_tool_id: Callable[[], str]
) -> Answer:
    """The answer to a valid request whose step is due. `raw` is the body as it arrived."""
    parts = list(step.parts)
    if all(part.kind == "think" for part in parts):
        parts.append(_unasked(body, step, heard))
    made = _cut_to_limits(_merged_text(_block(part, body, new_tool_id) for part in parts), body)
    blocks, stop_reason, stop_sequence = made
    if step.stop_reason is not None:
        stop_reason = step.stop_reason
        given = body.get("stop_sequences") or [None]
        stop_sequence = given[0] if stop_reason == "stop_sequence" else None
    deltas = sum(len(block.chunks) for block in blocks)
    thinking = sum(len(block.chunks) for block in blocks if block.kind == "thinking")
    usage = replace(prompt_usage(body, raw), output_tokens=deltas, thinking_tokens=thinking)
    return Answer(tuple(blocks), stop_reason, stop_sequence, usage, step)


def _unasked(body: Mapping[str, Any], step: Step, heard: script.Received) -> Part:
    """What is answered when the step has no content directive."""
    if heard.round and not step.text:
        return Part("say", f"Tool said: {heard.results}")
    if _schema(body) is not None or _structured_tool(body) is not None:
        return Part("structured")
    return Part("say", f"You said: {step.text}")


def _block(part: Part, body: Mapping[str, Any], new_tool_id: Callable[[], str]) -> Block:
    if part.kind == "tool":
        return _tool_call(part.tool, part.argument, new_tool_id)
    if part.kind == "structured" and (schema := _structured_tool(body)) is not None:
        return _tool_call(STRUCTURED_OUTPUT_TOOL, script.minimal_value(schema), new_tool_id)
    if part.kind == "tokens":
        return Block("text", _numbers(part.argument))
    text = _text(part, body)
    return Block("thinking" if part.kind == "think" else "text", chunks(text))


def _text(part: Part, body: Mapping[str, Any]) -> str:
    messages = body["messages"]
    match part.kind:
        case "structured":
            return _json(script.minimal_value(_schema(body)))
        case "history":
            return _json(_history(messages))
        case "recall":
            return _json(script.all_texts(messages, "user")[:-1])
        case "system":
            return "\n\n".join(script.texts_of(body.get("system")))
        case "field":
            return _json(body.get(part.argument))
        case _:
            return part.argument if isinstance(part.argument, str) else _json(part.argument)


def _history(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    spoken = [message for message in messages if message.get("role") in {"user", "assistant"}]
    digest = HistoryHash()
    texts: list[str] = []
    for message in spoken:
        kept = [
            block
            for block in script.blocks(message.get("content"))
            if block.get("type") != "text" or script.user_texts({"content": [block]})
        ]
        digest.add(str(message["role"]), kept)
        texts.append(" ".join(script.texts_of(kept)))
    return {
        "messages": len(spoken),
        "roles": [message["role"] for message in spoken],
        "texts": texts,
        "digest": digest.key(),
    }


def _schema(body: Mapping[str, Any]) -> Any:
    config = body.get("output_config")
    wanted = config.get("format") if isinstance(config, Mapping) else None
    return wanted.get("schema") if isinstance(wanted, Mapping) and wanted.get("type") == "json_schema" else None


def _structured_tool(body: Mapping[str, Any]) -> Any:
    for tool in body.get("tools") or ():
        if isinstance(tool, Mapping) and tool.get("name") == STRUCTURED_OUTPUT_TOOL:
            return tool.get("input_schema")
    return None


def _tool_call(name: str, tool_input: Any, new_tool_id: Callable[[], str]) -> Block:
    whole = _json(tool_input)
    half = len(whole) // 2
    return Block("tool_use", (whole[:half], whole[half:]), name, new_tool_id())


def _merged_text(blocks: Iterable[Block]) -> list[Block]:
    """Neighbouring texts become one block, as a model writes them."""
    merged: list[Block] = []
    for block in blocks:
        if merged and block.kind == merged[-1].kind == "text":
            merged[-1] = replace(block, chunks=merged[-1].chunks + block.chunks)
        else:
            merged.append(block)
    return merged


def _cut_to_limits(blocks: list[Block], body: Mapping[str, Any]) -> tuple[list[Block], str, str | None]:
    """Honour `stop_sequences` and `max_tokens` (a delta is a token), as the API does."""
    sequences = body.get("stop_sequences") or ()
    left = body["max_tokens"]
    kept: list[Block] = []
    for block in blocks:
        if block.kind == "text" and sequences:
            whole = "".join(block.chunks)
            hits = [(at, sequence) for sequence in sequences if (at := whole.find(sequence)) >= 0]
            if hits:
                at, sequence = min(hits)
                return [*kept, Block("text", chunks(whole[:at]))], "stop_sequence", sequence
        if len(block.chunks) > left:
            if block.kind != "tool_use":
                kept.append(replace(block, chunks=block.chunks[:left]))
            return kept, "max_tokens", None
        left -= len(block.chunks)
        kept.append(block)
    return kept, "tool_use" if any(block.kind == "tool_use" for block in kept) else "end_turn", None


def chunks(text: str) -> tuple[str, ...]:
    """The text in the pieces in which it is streamed."""
    words: list[str] = _WORDS.findall(text)
    if len(words) <= _MOST_DELTAS:
        return tuple(words)
    size = math.ceil(len(words) / _MOST_DELTAS)
    return tuple("".join(words[start : start + size]) for start in range(0, len(words), size))


@functools.lru_cache(maxsize=32)
def _numbers(count: int) -> tuple[str, ...]:
    return tuple(f"{number} " for number in range(1, count + 1))


# Usage ---------------------------------------------------------------------------------------------------------------


def prompt_usage(body: Mapping[str, Any], raw: bytes) -> Usage:
    """Deterministic numbers from the text: a token is 4 characters.

    When something is marked with `cache_control`, everything up to the last assistant message counts as read from the
    cache and the rest as written to it, except the last user message.
    """
    sizes = [_size(message.get("content")) for message in body["messages"]]
    fixed = _size(body.get("system")) + _size(body.get("tools"))
    if b'"cache_control"' not in raw:
        return Usage(input_tokens=_tokens(fixed + sum(sizes)))
    roles = [message.get("role") for message in body["messages"]]
    last = len(roles) - 1 - roles[::-1].index("user") if "user" in roles else len(roles)
    seen = max((index for index, role in enumerate(roles) if role == "assistant"), default=0)
    read = _tokens(fixed + sum(sizes[:seen])) if seen else 0
    written = _tokens(sum(sizes) + fixed - sum(sizes[last:])) - read
    rest = _tokens(sum(sizes[last:]))
    if b'"ttl":"1h"' in raw:
        return Usage(input_tokens=rest, cache_read_tokens=read, cache_write_1h_tokens=max(0, written))
    return Usage(input_tokens=rest, cache_read_tokens=read, cache_write_5m_tokens=max(0, written))


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(_size(item) for item in value)
    if isinstance(value, Mapping):
        return sum(_size(item) for key, item in value.items() if key not in {"cache_control", "type"})
    return 0 if value is None else 1


def _tokens(characters: int) -> int:
    return max(1, math.ceil(characters / 4))


# On the wire ---------------------------------------------------------------------------------------------------------


def message(made: Answer, message_id: str, model: str) -> dict[str, Any]:
    """The body of a non-streaming answer."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [block.to_wire() for block in made.blocks],
        **made.stop(),
        "usage": made.usage.to_wire(),
    }


def frames(made: Answer, message_id: str, model: str) -> list[bytes]:
    """The stream in pieces: each ends with a delta (and holds what goes before it), the last one holds the end.

    So `frames(…)[:n]` is a stream with n deltas, and a delay goes between two pieces.
    """
    start_usage = replace(made.usage, output_tokens=1 if made.blocks else 0, thinking_tokens=0).to_wire()
    head: dict[str, Any] = {"id": message_id, "type": "message", "role": "assistant", "model": model, "content": []}
    head |= {"stop_reason": None, "stop_sequence": None, "usage": start_usage}
    before = _frame({"type": "message_start", "message": head})
    pieces: list[bytes] = []
    for index, block in enumerate(made.blocks):
        before += _block_start(index, block)
        if index == 0:
            before += sse.PING
        deltas = _deltas(index, block.kind, block.chunks)
        if deltas:
            pieces.append(before + deltas[0])
            pieces.extend(deltas[1:])
            before = b""
        if block.kind == "thinking":
            delta = {"type": "signature_delta", "signature": _signature("".join(block.chunks))}
            before += _frame({"type": "content_block_delta", "index": index, "delta": delta})
        before += _frame({"type": "content_block_stop", "index": index})
    end = {"type": "message_delta", "delta": made.stop(), "usage": made.usage.to_wire()}
    pieces.append(before + _frame(end) + _frame({"type": "message_stop"}))
    return pieces


def _block_start(index: int, block: Block) -> bytes:
    empty: dict[str, Any]
    if block.kind == "tool_use":
        empty = {"type": "tool_use", "id": block.tool_id, "name": block.tool, "input": {}}
    elif block.kind == "thinking":
        empty = {"type": "thinking", "thinking": "", "signature": ""}
    else:
        empty = {"type": "text", "text": ""}
    return _frame({"type": "content_block_start", "index": index, "content_block": empty})


_DELTA_OF = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


@functools.lru_cache(maxsize=64)
def _deltas(index: int, kind: str, texts: tuple[str, ...]) -> tuple[bytes, ...]:
    delta, name = _DELTA_OF[kind]
    before = (
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":'
        % (index, delta.encode(), name.encode())
    )
    encode = msgspec.json.encode
    return tuple(before + encode(text) + b"}}\n\n" for text in texts)


def _frame(data: dict[str, Any]) -> bytes:
    return sse.encode(data["type"], msgspec.json.encode(data))


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _signature(text: str) -> str:
    return f"scripted-signature-{len(text)}"
