"""Stream-json: one line from the Claude CLI to a frame, and our lines to it.

A `Frame` knows only what the server routes by. Everything else stays in `raw`, the line as it was printed, so that
types and fields that this version has never seen pass through unchanged; `event` is the untouched slice of the line
that holds the Messages stream event. Decoding costs one to two microseconds, because msgspec skips what it does not
name.

The process is untrusted: a frame may lie, but it cannot crash the server or make it recurse.
"""

from __future__ import annotations

from typing import Any

import msgspec

from claude_wrapper.errors import AgentProtocolError, InvalidRequest

MAX_DEPTH = 128
"""Levels of nesting. Frames of the CLI have about ten; tool inputs written by a model stay far below this."""

MAX_MARKS = 2 * 2**20
"""Quotes and brackets of one line, inside strings or not. A line of 16 MiB of program text has about half of that."""
MAX_BRACKETS = 2**18
"""Brackets of one line outside strings. Frames have hundreds; looking at more would hold up every other tenant."""

_NOT_MARKS = bytes(set(range(256)) - set(b'"[]{}'))
_SQUARE = bytes.maketrans(b"{}", b"[]")


class MalformedFrame(AgentProtocolError):
    """The Claude process wrote a line that is not a frame."""


class Frame(msgspec.Struct, kw_only=True, gc=False):
    """One line that the CLI printed. Treat as immutable."""

    type: str
    subtype: str | None = None
    session_id: str | None = None
    uuid: str | None = None
    parent_tool_use_id: str | None = None
    """Set on frames of a sub-agent: the tool call that started it."""
    event: msgspec.Raw | None = None
    """The Messages stream event of a `stream_event`, byte for byte."""
    raw: bytes = b""
    """The whole line, without its newline."""

    def json(self) -> dict[str, Any]:
        """The whole frame, decoded anew at each call. Raises MalformedFrame."""
        try:
            decoded: dict[str, Any] = _ANY.decode(self.raw)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise MalformedFrame(f"the Claude process wrote a frame that cannot be decoded: {error}") from None
        return decoded


class _Printed(Frame, kw_only=True, gc=False):
    """A frame as it is read. msgspec refuses an object where `Raw | None` is asked for, and reading every event a second
    time, leniently, costs five times as much."""

    event: msgspec.Raw = None  # type: ignore[assignment]


class _Lenient(msgspec.Struct):
    """The named fields with whatever values they have."""

    type: Any = None
    subtype: Any = None
    session_id: Any = None
    uuid: Any = None
    parent_tool_use_id: Any = None
    event: msgspec.Raw = None  # type: ignore[assignment]


_FRAME = msgspec.json.Decoder(_Printed)
_LENIENT = msgspec.json.Decoder(_Lenient)
_ANY = msgspec.json.Decoder(dict[str, Any])
_ENCODER = msgspec.json.Encoder()


def decode_frame(line: bytes) -> Frame:
    """The frame that this line holds.

    Raises MalformedFrame when the line is not JSON, not an object, has no `type`, or nests deeper than `MAX_DEPTH`.
    A known field with a value of an unexpected kind counts as absent: a later CLI may change it.
    """
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH and _too_deep(line):
        raise MalformedFrame(
            f"the Claude process wrote a frame that nests deeper than {MAX_DEPTH} levels, or has too many brackets"
        )
    frame: Frame
    try:
        frame = _FRAME.decode(line)
    except msgspec.ValidationError:
        frame = _decode_leniently(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedFrame(f"the Claude process wrote a line that is not JSON: {error}") from None
    frame.raw = line
    if frame.event is not None and bytes(frame.event) == b"null":
        frame.event = None
    return frame


def _decode_leniently(line: bytes) -> Frame:
    try:
        found = _LENIENT.decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedFrame(f"the Claude process wrote a line that is not an object: {error}") from None
    if not isinstance(found.type, str):
        raise MalformedFrame("the Claude process wrote a frame without a type")
    return Frame(
        type=found.type,
        subtype=_text(found.subtype),
        session_id=_text(found.session_id),
        uuid=_text(found.uuid),
        parent_tool_use_id=_text(found.parent_tool_use_id),
        event=found.event,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _too_deep(line: bytes) -> bool:
    """Whether brackets outside strings nest deeper than the bound: peel off the innermost pairs, one level a round.

    Every step is one pass in C and the input of the rounds is bounded: the process chooses the line, and while it is
    looked at nobody else is served (16 MiB take 0.1 to 0.35 s; unbounded they took 4.4 s).
    """
    marks = line.replace(rb"\\", b"").replace(rb"\"", b"").translate(_SQUARE, _NOT_MARKS)
    if len(marks) > MAX_MARKS:
        return True
    left = b"".join(marks.split(b'"')[::2])  # what stands between strings
    if len(left) > MAX_BRACKETS:
        return True
    for _ in range(MAX_DEPTH):
        peeled = left.replace(b"[]", b"")
        if len(peeled) == len(left):
            return False  # empty; or unbalanced and so not JSON, which the decoder says better
        left = peeled
    return bool(left)


# Lines to the CLI ----------------------------------------------------------------------------------------------------


def user_line(
    content: str | list[Any],
    *,
    uuid: str | None = None,
    should_query: bool = True,
    as_written: bool = True,
) -> bytes:
    """A user message.

    `uuid` comes back in the frames of the turn that answers it. `should_query=False` appends to the conversation
    without asking the model (the line gets a `result` with zero turns of its own).
    `as_written` sets the CLI's documented `client_composed` mark: a text that begins with `/` is then a text and not a
    command, `@path` is not replaced by a file, and no reminders are attached. Without it the line is what a person
    types at the CLI's prompt.
    """
    line: dict[str, Any] = {
        "type": "user",
        "message": {"role": "user", "content": content},
        "parent_tool_use_id": None,
        "session_id": "",
    }
    if uuid is not None:
        line["uuid"] = uuid
    if not should_query:
        line["shouldQuery"] = False
    if as_written:
        line["client_composed"] = True
    return encode_line(line)


def assistant_line(content: str | list[Any], *, model: str, message_id: str | None = None) -> bytes:
    """An assistant message of the past, to be appended to the conversation."""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    message: dict[str, Any] = {
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": blocks,
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }
    if message_id is not None:
        message["id"] = message_id
    return encode_line({"type": "assistant", "message": message, "parent_tool_use_id": None, "session_id": ""})


def control_request_line(request_id: str, request: dict[str, Any]) -> bytes:
    """A control request of ours; `request` has its `subtype`."""
    return encode_line({"type": "control_request", "request_id": request_id, "request": request})


def control_success_line(request_id: str, response: dict[str, Any]) -> bytes:
    """Our answer to a control request of the CLI."""
    body = {"subtype": "success", "request_id": request_id, "response": response}
    return encode_line({"type": "control_response", "response": body})


def control_error_line(request_id: str, message: str) -> bytes:
    """Our refusal of a control request of the CLI."""
    body = {"subtype": "error", "request_id": request_id, "error": message}
    return encode_line({"type": "control_response", "response": body})


def encode_line(value: dict[str, Any]) -> bytes:
    """One line of NDJSON, newline included.

    Raises InvalidRequest when the value has no JSON form: text with a lone surrogate, or nesting without end.
    """
    try:
        return _ENCODER.encode(value) + b"\n"
    except (UnicodeEncodeError, TypeError, RecursionError, ValueError) as error:
        raise InvalidRequest(f"this cannot be written as JSON: {error}", field="content") from None
