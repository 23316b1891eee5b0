"""One turn of the CLI to one Anthropic Message: SSE events as they come, and the whole message at the end.

A turn may hold several model requests (tool use, hooks, a repeated request). The caller sees one message: one
`message_start`, content blocks numbered 0, 1, 2 … over all of them, one `message_delta` with the summed usage, one
`message_stop` (wire-api 3.3). The bytes of a content delta are forwarded untouched unless its index changes.

* Tools that the server runs are never shown as `tool_use`: an SDK's tool runner would run them again. A tool of the
  API client (`mcp__client__NAME`, the bridge) is shown under its own name, and ends the message with stop reason
  `tool_use` while the CLI waits for the result.
* Frames of sub-agents are dropped.
* An error is `failure`, never text. The caller decides between an HTTP status and an `error` event by `started`.
* The message's content is taken from the `assistant` frames, one per finished block, so that a caller who does not
  stream pays for no delta. A stream that broke off and was repeated by the CLI in one piece continues where it
  stopped if the new text begins with what was shown; otherwise the caller must be told: that is a failure too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from claude_wrapper.wire import sse
from claude_wrapper.wire.errorbody import STATUS_OF_TYPE, type_of_status
from claude_wrapper.wire.usage import Usage

CLIENT_PREFIX = "mcp__client__"
SYNTHETIC_MODEL = "<synthetic>"
"""The model of `assistant` frames that the CLI made up itself: error notices."""

CONTINUED_BY_CLI = frozenset({"max_tokens", "refusal", "model_context_window_exceeded"})
"""Stop reasons after which the CLI asks the model to go on by itself (seen with 2.1.327 for the first two), where a
plain model would stop: pass them as `end_at` for callers who expect a plain model."""


class FrameLike(Protocol):
    """What the merger reads of a `streamjson.Frame`."""

    @property
    def type(self) -> str: ...

    @property
    def subtype(self) -> str | None: ...

    @property
    def event(self) -> msgspec.Raw | None: ...

    @property
    def parent_tool_use_id(self) -> str | None: ...

    def json(self) -> dict[str, Any]:
        """The whole frame, decoded."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no (complete) answer: an HTTP status, the API's error type and a message for the caller."""

    status: int
    type: str
    message: str


class MessageMerger:
    """Feed the frames of one turn in order; take bytes from `feed`, and the rest from the attributes."""

    def __init__(
        self,
        message_id: str,
        model: str,
        *,
        strip_mcp_prefix: str = CLIENT_PREFIX,
        visible_tools: Collection[str] = frozenset(),
        structured: bool = False,
        end_at: Collection[str] = frozenset(),
    ) -> None:
        """`model` is shown until upstream names its own.

        `visible_tools`: names that are shown as `tool_use` as they are. `structured`: the caller asked for a JSON
        schema and the CLI asks the model for it through a tool: text beside it is withheld, the JSON is the answer.
        `end_at`: stop reasons at which the message ends although the CLI goes on; `finished` is then true before the
        `result` frame, and the turn is to be interrupted.
        """
        self.message_id = message_id
        self.model = model
        self.started = False
        """Whether any byte was given out."""
        self.finished = False
        """Whether the message is complete or has failed. Later frames give nothing."""
        self.failure: Failure | None = None
        self.stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self.client_calls: list[str] = []
        """Ids of the tool calls that wait for the API client."""
        self._prefix = strip_mcp_prefix
        self._visible = frozenset(visible_tools)
        self._structured = structured
        self._end_at = frozenset(end_at)
        self._usage = Usage()  # of the finished model requests
        self._request = Usage()  # of the one that runs
        self._requests = 0
        self._streamed: set[str] = set()  # message ids that came as a stream
        self._index: dict[int, int | None] = {}  # block of the running request -> block of the message; None: hidden
        self._next = 0
        self._held: bytes | None = None  # the last message_delta, untouched, while it may be the final one
        self._content: list[dict[str, Any]] = []
        self._withheld: list[dict[str, Any]] = []
        self._shown_text: list[bytes] = []  # text deltas of the running request, in case it is repeated
        self._whole_id: Any = None  # of the message that comes in whole blocks
        self._owed = ""  # text that was shown of a request that broke off
        self._notice: dict[str, Any] | None = None  # the last synthetic assistant frame

    @property
    def usage(self) -> Usage:
        """Sum over the model requests so far, as the process tells it (the ledger trusts only the broker)."""
        return self._usage + self._request

    def message(self) -> dict[str, Any]:
        """The whole message, as a non-streaming answer."""
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": list(self._content),
            **self.stop,
            "usage": self.usage.to_wire(),
        }

    def feed(self, frame: FrameLike) -> list[bytes]:
        """The SSE frames that this frame of the CLI gives rise to, often one, often none."""
        if self.finished or frame.parent_tool_use_id is not None:
            return []
        match frame.type:
            case "stream_event":
                return [] if frame.event is None else self._event(bytes(frame.event))
            case "assistant":
                return self._assistant(frame.json())
            case "result":
                return self._result(frame.json())
            case "system" if self.started and frame.subtype == "api_retry":
                return [sse.PING]
            case _:
                return []

    # Stream events ---------------------------------------------------------------------------------------------------

    def _event(self, raw: bytes) -> list[bytes]:
        if raw.startswith(_DELTA) and b"\r" not in raw:
            out = self._renumbered(b"event: content_block_delta\ndata: ", raw, len(_DELTA))
            if out and b"text_delta" in raw[: len(_DELTA) + 40]:
                self._shown_text.append(raw)
            return out
        if raw.startswith(_STOP) and b"\r" not in raw:
            return self._renumbered(b"event: content_block_stop\ndata: ", raw, len(_STOP))
        event = _object(raw)
        match event.get("type"):
            case "message_start":
                return self._message_start(_mapping(event.get("message")))
            case "content_block_start":
                return self._block_start(event)
            case "message_delta":
                return self._message_delta(event, raw)
            case "message_stop" | "error" | None:
                return []
            case "content_block_delta" | "content_block_stop" as kind:
                mapped = self._index.get(_int(event.get("index")))
                return [] if mapped is None else [_frame(kind, {**event, "index": mapped})]
            case "ping":
                return [sse.PING] if self.started else []
            case other:  # newer than this version: the API promises that clients ignore what they do not know
                return [_frame(str(other), event)] if self.started else []

    def _renumbered(self, head: bytes, raw: bytes, at: int) -> list[bytes]:
        """Forward a block event under its index in the message."""
        end = at
        while raw[end : end + 1].isdigit():
            end += 1
        given = raw[at:end]
        mapped = self._index.get(int(given)) if given else None
        if mapped is None:
            return []
        number = b"%d" % mapped
        if given == number:
            return [b"%b%b\n\n" % (head, raw)]
        return [b"%b%b%b%b\n\n" % (head, raw[:at], number, raw[end:])]

    def _message_start(self, message: Mapping[str, Any]) -> list[bytes]:
        self._close_request()
        self._requests += 1
        self._request = Usage.from_wire(message.get("usage"))
        if isinstance(identifier := message.get("id"), str):
            self._streamed.add(identifier)
        return self._start(message)

    def _start(self, message: Mapping[str, Any]) -> list[bytes]:
        if self.started:
            return []
        self.started = True
        if isinstance(model := message.get("model"), str) and model != SYNTHETIC_MODEL:
            self.model = model
        first = dict(message) or {"usage": Usage().to_wire()}
        first |= {"id": self.message_id, "type": "message", "role": "assistant", "model": self.model, "content": []}
        first |= {"stop_reason": None, "stop_sequence": None}
        return [_frame("message_start", {"type": "message_start", "message": first})]

    def _block_start(self, event: dict[str, Any]) -> list[bytes]:
        given = _int(event.get("index"))
        block = self._shown(_mapping(event.get("content_block")))
        if block is None:
            self._index[given] = None
            return []
        self._index[given] = index = self._take_index()
        return [_frame("content_block_start", {**event, "index": index, "content_block": block})]

    def _take_index(self) -> int:
        self._next += 1
        return self._next - 1

    def _message_delta(self, event: dict[str, Any], raw: bytes) -> list[bytes]:
        self._request = self._request.updated(_mapping(event.get("usage")))
        delta = _mapping(event.get("delta"))
        self.stop = {"stop_reason": None, "stop_sequence": None, **delta}
        self._held = None if b"\r" in raw else raw
        self._shown_text.clear()
        if self.client_calls:
            return self._end()
        return self._end() if self.stop["stop_reason"] in self._end_at else []

    def _close_request(self) -> None:
        """The next model request begins: what was shown of an unfinished one is owed by its repetition."""
        self._usage, self._request = self._usage + self._request, Usage()
        self._index.clear()
        self._held = None
        self._shown_text.clear()

    # Whole blocks ----------------------------------------------------------------------------------------------------

    def _assistant(self, frame: dict[str, Any]) -> list[bytes]:
        message = _mapping(frame.get("message"))
        if message.get("model") == SYNTHETIC_MODEL or frame.get("is_api_error_message"):
            self._notice = frame
            return []
        blocks = [block for block in message.get("content") or () if isinstance(block, dict)]
        if message.get("id") in self._streamed:
            for block in blocks:
                self._keep(block)
            return []
        return self._whole(message, blocks)

    def _whole(self, message: Mapping[str, Any], blocks: list[dict[str, Any]]) -> list[bytes]:
        """Blocks that were not streamed: the CLI repeated a request without streaming, one frame per block."""
        if message.get("id") != self._whole_id:
            if self.client_calls:  # the caller may already run a call of the request that broke off
                return self._fail(Failure(502, "api_error", _REPEATED))
            self._owed += "".join(_object(raw).get("delta", {}).get("text", "") for raw in self._shown_text)
            self._close_request()
            self._whole_id = message.get("id")
            self._requests += 1
        self._request = Usage.from_wire(_mapping(message.get("usage")))
        out = self._start({**message, "content": [], "usage": message.get("usage") or {}})
        for block in blocks:
            kept = self._keep(block)
            if kept is None:
                continue
            if self._owed and kept.get("type") == "text":
                text = str(kept.get("text", ""))
                if not text.startswith(self._owed):
                    return self._fail(Failure(502, "api_error", _REPEATED))
                kept, self._owed = {**kept, "text": text[len(self._owed) :]}, ""
            out += _block_frames(self._take_index(), kept)
        if message.get("stop_reason") is not None:
            self.stop = {"stop_reason": message["stop_reason"], "stop_sequence": message.get("stop_sequence")}
        return out

    def _shown(self, block: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The block as the caller sees it; None: not at all."""
        kind = block.get("type")
        if kind == "text":
            return None if self._structured else block
        if kind != "tool_use":
            return block
        name = str(block.get("name", ""))
        if self._prefix and name.startswith(self._prefix):
            identifier = str(block.get("id"))
            if identifier not in self.client_calls:
                self.client_calls.append(identifier)
            return {**block, "name": name.removeprefix(self._prefix)}
        return block if name in self._visible else None

    def _keep(self, block: dict[str, Any]) -> dict[str, Any] | None:
        shown = self._shown(block)
        if shown is None:
            if block.get("type") == "text":
                self._withheld.append(block)
            return None
        kept = dict(shown)
        self._content.append(kept)
        return kept

    # The end -----------------------------------------------------------------------------------------------------------

    def _result(self, result: dict[str, Any]) -> list[bytes]:
        failure = _failure(result, self._notice)
        if failure is not None and self.stop["stop_reason"] == "refusal":
            return self._end()  # the CLI calls a refusal an error; to the API's clients it is an answer
        if failure is not None:
            return self._fail(failure)
        out = self._start({})
        for block in self._late_blocks(result):
            self._content.append(block)
            self._held = None
            out += _block_frames(self._take_index(), block)
        if result.get("subtype") == "error_max_turns":
            self.stop, self._held = {"stop_reason": "pause_turn", "stop_sequence": None}, None
        elif self.stop["stop_reason"] in {None, "tool_use"} and not self._calls_shown():
            self.stop, self._held = {"stop_reason": "end_turn", "stop_sequence": None}, None
        return out + self._end()

    def _calls_shown(self) -> bool:
        return any(block.get("type") == "tool_use" for block in self._content)

    def _late_blocks(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Text that no block carried: structured output, or the answer of a command that asked no model."""
        structured = result.get("structured_output")
        if structured is not None:
            if any(_same_json(block.get("text"), structured) for block in self._content):
                return []
            return [{"type": "text", "text": msgspec.json.encode(structured).decode()}]
        if self._withheld:
            return self._withheld
        text = result.get("result")
        if not self._requests and not self._content and isinstance(text, str) and text:
            return [{"type": "text", "text": text}]
        return []

    def _end(self) -> list[bytes]:
        self.finished = True
        untouched = self._held if self._requests == 1 else None
        if untouched is not None:
            return [b"event: message_delta\ndata: %b\n\n" % untouched, _MESSAGE_STOP]
        end = {"type": "message_delta", "delta": self.stop, "usage": self.usage.to_wire()}
        return [_frame("message_delta", end), _MESSAGE_STOP]

    def _fail(self, failure: Failure) -> list[bytes]:
        self.failure, self.finished = failure, True
        return []


_DELTA = b'{"type":"content_block_delta","index":'
_STOP = b'{"type":"content_block_stop","index":'
_MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_REPEATED = "The model's stream broke off and was repeated with another answer. Please send the request again."

_TYPE_OF_NOTICE = {
    "rate_limit": "rate_limit_error",
    "overloaded": "overloaded_error",
    "authentication_failed": "authentication_error",
    "billing_error": "billing_error",
    "invalid_request": "invalid_request_error",
    "server_error": "api_error",
}
"""`assistant.error` of the CLI to the API's error types."""

_TYPE_OF_SUBTYPE = {"error_max_budget_usd": "billing_error"}


def _failure(result: Mapping[str, Any], notice: Mapping[str, Any] | None) -> Failure | None:
    """What a `result` frame says went wrong; None when the turn is good."""
    subtype, reason = str(result.get("subtype")), str(result.get("terminal_reason"))
    if subtype == "error_max_turns":
        return None
    if reason.startswith("aborted"):
        return Failure(500, "api_error", "The turn was interrupted.")
    if not result.get("is_error") and not subtype.startswith("error"):
        return None
    told = notice or {}
    status = result.get("api_error_status") or told.get("api_error_status")
    kind = result.get("api_error_type") or told.get("api_error_type") or _TYPE_OF_NOTICE.get(str(told.get("error")))
    if isinstance(status, int) and 400 <= status <= 599:
        kind = kind if isinstance(kind, str) else type_of_status(status)
    else:
        kind = kind if isinstance(kind, str) else _TYPE_OF_SUBTYPE.get(subtype, "api_error")
        status = STATUS_OF_TYPE.get(kind, 500)
    return Failure(status, kind, _failure_message(result, told, subtype))


def _failure_message(result: Mapping[str, Any], notice: Mapping[str, Any], subtype: str) -> str:
    said = result.get("result")
    if isinstance(said, str) and said:
        return said
    for block in _mapping(notice.get("message")).get("content") or ():
        if isinstance(block, dict) and isinstance(text := block.get("text"), str):
            return text
    errors = result.get("errors")
    if isinstance(errors, list) and errors:
        return "; ".join(str(error) for error in errors)
    return f"The turn ended with {subtype}."


def _block_frames(index: int, block: Mapping[str, Any]) -> list[bytes]:
    """A whole block as start, one delta and stop."""
    started = dict(block)
    deltas: list[dict[str, Any]] = []
    match block.get("type"):
        case "text":
            started["text"] = ""
            deltas.append({"type": "text_delta", "text": block.get("text", "")})
        case "thinking":
            started |= {"thinking": "", "signature": ""}
            deltas.append({"type": "thinking_delta", "thinking": block.get("thinking", "")})
            deltas.append({"type": "signature_delta", "signature": block.get("signature", "")})
        case "tool_use" | "server_tool_use" | "mcp_tool_use":
            started["input"] = {}
            whole = msgspec.json.encode(block.get("input") or {}).decode()
            deltas.append({"type": "input_json_delta", "partial_json": whole})
    return [
        _frame("content_block_start", {"type": "content_block_start", "index": index, "content_block": started}),
        *(
            _frame("content_block_delta", {"type": "content_block_delta", "index": index, "delta": delta})
            for delta in deltas
        ),
        _frame("content_block_stop", {"type": "content_block_stop", "index": index}),
    ]


def _frame(event: str, data: Mapping[str, Any]) -> bytes:
    name = event if event.isprintable() else "unknown"
    return sse.encode(name, msgspec.json.encode(data))


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _int(value: object) -> int:
    return value if isinstance(value, int) else -1


def _same_json(text: object, value: object) -> bool:
    if not isinstance(text, str):
        return False
    try:
        return bool(msgspec.json.decode(text) == value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
