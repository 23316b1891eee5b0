"""Reading and rewriting the body of a Messages request. Pure.

What the CLI sends was looked at on the wire (2.1.327): the system prompt is a list of text blocks - a billing line, a
fixed sentence, then the block that `initialize` gave, which in a primed spare is `SYSTEM_PLACEHOLDER`. Only top-level
fields are ever touched; everything else is carried as the bytes that came.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from claude_wrapper.broker.calls import CredentialKind, TurnContext
from claude_wrapper.broker.refusals import Refused, refuse
from claude_wrapper.wire.usage import Usage

SYSTEM_PLACEHOLDER = "claude-wrapper:system-placeholder"
"""The system prompt of a primed spare; the broker puts the caller's in its place."""

MAX_CACHE_BREAKPOINTS = 4
"""More `cache_control` marks than this are an error of the Messages API."""

_IMAGE_NOTE_BYTES = b"[Image: source: /tmp/claude-"
_IMAGE_NOTE = re.compile(r"\[Image: source: /tmp/claude-[^\]\s]*\]")
_PLACEHOLDER_BYTES = SYSTEM_PLACEHOLDER.encode()
_SUMMARY = "Your task is to create a detailed summary of the conversation so far"
_SUMMARY_BYTES = _SUMMARY.encode()
_SUMMARY_REACH = 32_000
"""The CLI's request for a summary has about 7,000 bytes, at the end: the conversation before it need not be read."""
_DEARER = ("fallbacks", "speed")
_FIELDS: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Tool(msgspec.Struct):
    model: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_TOOLS = msgspec.json.Decoder(list[_Tool] | None)


@dataclass(frozen=True, slots=True)
class Body:
    """A request body that was read once: the fields that decisions need, and the bytes to send."""

    model: str
    stream: bool
    max_tokens: int
    raw: bytes = field(repr=False)
    """What to send when nothing is changed. Never ambiguous: a repeated key is resolved, the last one wins."""
    fields: Mapping[str, msgspec.Raw] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The body that goes upstream, and whether this is the turn's main request."""

    body: bytes = field(repr=False)
    main: bool


def read(body: bytes) -> Body:
    """Read a request body, or raise `Refused` (400)."""
    try:
        fields = _FIELDS.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(f"The request body is not a JSON object: {error}") from None
    # The two lengths differ only if the body has white space, a repeated key or an escaped one. What was checked must
    # be what is sent (an upstream that lets the first of two `model` keys win would be asked for another model).
    again = msgspec.json.encode(fields)
    return Body(
        model=_typed(fields, "model", str, ""),
        stream=_typed(fields, "stream", bool, False),
        max_tokens=_typed(fields, "max_tokens", int, 0),
        raw=body if len(again) == len(body) else again,
        fields=fields,
    )


def beyond(body: Body, model: str) -> str | None:
    """What a process whose turn is for `model` asks for beside it, in words; None: nothing.

    Other models are also named by `fallbacks` and by tools that are models (an advisor), and `speed` has a price of its
    own. The CLI sends none of them (2.1.327): what its callers want of them comes as an override.
    """
    if _plain(body.model) != _plain(model):
        return f"the model {body.model[:100]!r}"
    for name in _DEARER:
        if name in body.fields:
            return f"`{name}`"
    tools = body.fields.get("tools")
    if tools is None:
        return None
    try:
        named = any(tool.model is not msgspec.UNSET for tool in _TOOLS.decode(tools))
    except msgspec.MsgspecError as error:
        raise _invalid(f"tools: {error}") from None
    return "a tool that is a model" if named else None


def refused_overrides(kind: CredentialKind, turn: TurnContext) -> list[str]:
    """Names of the turn's fields that this kind of credential does not allow; empty: all are allowed.

    Requests under an OAuth credential go upstream as the CLI wrote them.
    """
    if kind is CredentialKind.API_KEY:
        return []
    return sorted({*turn.overrides, *(["system"] if turn.system else [])})


def rewrite(body: Body, turn: TurnContext | None, kind: CredentialKind, *, repeats_failed: bool = False) -> Rewritten:
    """The body for the upstream.

    The placeholder is replaced in every request that carries it; the overrides go into the main request only: the
    streaming one (or its non-streaming repetition after it failed: the CLI does that once) for the turn's model, which carries the
    placeholder if the process was primed with it, and does not ask for a summary of the conversation.
    """
    carries = _carries_placeholder(body)
    main = turn is not None and _is_main(body, turn, carries=carries, repeats_failed=repeats_failed)
    if kind is CredentialKind.OAUTH:
        if carries:
            raise _invalid("A primed process cannot be used with an OAuth credential: its system prompt is unset.")
        return Rewritten(body.raw, main)
    changes: dict[str, Any] = {}
    if carries:
        changes["system"] = _system(body, turn.system if turn else None)
        if (messages := _without_image_notes(body.fields.get("messages"))) is not None:
            changes["messages"] = messages
    if main and turn is not None and turn.overrides:
        changes.update(turn.overrides)
        _keep_consistent(body, changes)
    return Rewritten(_merge(body, changes), main)


def estimate(body: Body, most_output: int) -> Usage:
    """What a call may use at most, roughly: a token is 4 bytes of the request."""
    return Usage(input_tokens=len(body.raw) // 4, output_tokens=min(body.max_tokens or most_output, most_output))


def asks_for_summary(messages: Any) -> bool:
    """Whether these messages, decoded, end with the CLI's own request to summarise them: it compacts the conversation.

    Only the last message tells (seen with 2.1.327, on `/compact` and when the CLI does it by itself): model, system
    prompt and tools are the turn's. A caller's text comes as a list of blocks, the CLI's request as plain text.
    """
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, dict) else None
    return isinstance(content, str) and _SUMMARY in content


def with_model(body: bytes, model: str) -> bytes:
    """A body that was read and rewritten before, for another model."""
    return msgspec.json.encode({**_FIELDS.decode(body), "model": model})


def _typed(fields: Mapping[str, msgspec.Raw], name: str, kind: type[Any], default: Any) -> Any:
    raw = fields.get(name)
    if raw is None:
        return default
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.MsgspecError as error:
        raise _invalid(f"{name}: {error}") from None


def _is_main(body: Body, turn: TurnContext, *, carries: bool, repeats_failed: bool) -> bool:
    if _plain(body.model) != _plain(turn.model) or (turn.placeholder and not carries):
        return False
    return (body.stream or repeats_failed) and not _is_summary(body)


def _is_summary(body: Body) -> bool:
    raw = body.fields.get("messages")
    if raw is None or _SUMMARY_BYTES not in memoryview(raw)[-_SUMMARY_REACH:].tobytes():
        return False
    return asks_for_summary(msgspec.json.decode(raw))


def _plain(model: str) -> str:
    """The model without the CLI's own suffix (`[1m]`), which it turns into a beta header."""
    return model.partition("[")[0]


def _carries_placeholder(body: Body) -> bool:
    raw = body.fields.get("system")
    if raw is None or _PLACEHOLDER_BYTES not in bytes(raw):
        return False
    return any(_is_placeholder(block) for block in _blocks(raw))


def _blocks(raw: msgspec.Raw) -> list[Any]:
    system = msgspec.json.decode(raw)
    if isinstance(system, str):
        return [{"type": "text", "text": system}]
    return system if isinstance(system, list) else []


def _is_placeholder(block: Any) -> bool:
    return isinstance(block, dict) and block.get("text") == SYSTEM_PLACEHOLDER


def _system(body: Body, replacement: list[dict[str, Any]] | None) -> list[Any] | None:
    """The system blocks with the placeholder's place taken, within the bound of cache marks; None: no block is left."""
    own = [dict(block) for block in replacement or ()]
    marked = any("cache_control" in block for block in own)
    out: list[Any] = []
    for block in _blocks(body.fields["system"]):
        if _is_placeholder(block):
            if own and not marked and "cache_control" in block:
                own[-1]["cache_control"] = block["cache_control"]  # as the CLI marks a prompt of its own
            out += own
        elif marked and isinstance(block, dict):
            # The caller places the marks: a five-minute mark of the CLI before a one-hour one would be an error.
            out.append({name: value for name, value in block.items() if name != "cache_control"})
        else:
            out.append(block)
    elsewhere = sum(_marks(body.fields.get(name)) for name in ("messages", "tools"))
    return _bounded_marks(out, MAX_CACHE_BREAKPOINTS - elsewhere) or None


def _without_image_notes(raw: msgspec.Raw | None) -> list[Any] | None:
    """The messages without what the CLI adds to a user's images, or None when there is nothing of it.

    For each image it appends a text block with the path of its own copy, and a newline to the text before its own
    (seen with 2.1.327). A chat process stands for a plain model, which is asked what the caller asked.
    """
    if raw is None or _IMAGE_NOTE_BYTES not in bytes(raw):
        return None
    messages = msgspec.json.decode(raw)
    for message in messages:
        content = message.get("content")
        if message.get("role") != "user" or not isinstance(content, list):
            continue
        notes = [block for block in content if _is_image_note(block)]
        if not notes:
            continue
        kept = [block for block in content if not _is_image_note(block)]
        for block, note in pairwise(content):
            text = block.get("text")
            if _is_image_note(note) and not _is_image_note(block) and isinstance(text, str):
                block["text"] = text.removesuffix("\n")
        if "cache_control" in notes[-1] and kept:
            kept[-1].setdefault("cache_control", notes[-1]["cache_control"])
        message["content"] = kept
    return list(messages)


def _is_image_note(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") == "text" and bool(_IMAGE_NOTE.fullmatch(str(block["text"])))


def _marks(raw: msgspec.Raw | None) -> int:
    """Cache marks in a part of the body. Text cannot imitate one: its quotes are escaped."""
    return 0 if raw is None else bytes(raw).count(b'"cache_control":{')


def _bounded_marks(blocks: list[Any], allowed: int) -> list[Any]:
    """The last marks are kept: what an earlier one caches is a prefix of it."""
    marked = [block for block in blocks if isinstance(block, dict) and "cache_control" in block]
    for block in marked[: max(0, len(marked) - max(0, allowed))]:
        del block["cache_control"]
    return blocks


def _keep_consistent(body: Body, changes: dict[str, Any]) -> None:
    """Without thinking, the CLI's context edit that clears thinking is an error upstream: it goes too."""
    if "thinking" not in changes or "context_management" in changes:
        return
    thinking = changes["thinking"]
    off = thinking is None or (isinstance(thinking, Mapping) and thinking.get("type") == "disabled")
    raw = body.fields.get("context_management")
    if not off or raw is None:
        return
    management = msgspec.json.decode(raw)
    if not isinstance(management, dict) or not isinstance(edits := management.get("edits"), list):
        return
    kept = [
        edit
        for edit in edits
        if not (isinstance(edit, dict) and str(edit.get("type", "")).startswith("clear_thinking"))
    ]
    changes["context_management"] = {**management, "edits": kept} if kept else None


def _merge(body: Body, changes: Mapping[str, Any]) -> bytes:
    if not changes:
        return body.raw
    fields: dict[str, Any] = dict(body.fields)
    for name, value in changes.items():
        if value is None:
            fields.pop(name, None)
        else:
            fields[name] = value
    return msgspec.json.encode(fields)


def _invalid(message: str) -> Refused:
    return refuse(400, "invalid_request_error", message)
