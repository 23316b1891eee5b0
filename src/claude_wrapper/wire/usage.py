"""What a model call used, read from the bytes of its response as they pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from claude_wrapper.wire.sse import MAX_EVENT_BYTES, EventStreamError, SSEDecoder


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and server-run tool calls of one model call, or the sum of several.

    `input_tokens` are the uncached ones: the whole prompt is input + cache_read + cache_write_5m + cache_write_1h.
    `thinking_tokens` are part of `output_tokens`, not in addition to them.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    thinking_tokens: int = 0
    web_search_requests: int = 0
    web_fetch_requests: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Field by field."""
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cache_read_tokens + other.cache_read_tokens,
            self.cache_write_5m_tokens + other.cache_write_5m_tokens,
            self.cache_write_1h_tokens + other.cache_write_1h_tokens,
            self.thinking_tokens + other.thinking_tokens,
            self.web_search_requests + other.web_search_requests,
            self.web_fetch_requests + other.web_fetch_requests,
        )

    @property
    def prompt_tokens(self) -> int:
        """All tokens of the prompt, cached or not."""
        return self.input_tokens + self.cache_read_tokens + self.cache_write_5m_tokens + self.cache_write_1h_tokens

    def to_wire(self) -> dict[str, Any]:
        """The `usage` object of a Messages response (wire-api 1.1.3)."""
        wire: dict[str, Any] = {
            "input_tokens": self.input_tokens,
            "cache_creation_input_tokens": self.cache_write_5m_tokens + self.cache_write_1h_tokens,
            "cache_read_input_tokens": self.cache_read_tokens,
            "cache_creation": {
                "ephemeral_5m_input_tokens": self.cache_write_5m_tokens,
                "ephemeral_1h_input_tokens": self.cache_write_1h_tokens,
            },
            "output_tokens": self.output_tokens,
        }
        if self.thinking_tokens:
            wire["output_tokens_details"] = {"thinking_tokens": self.thinking_tokens}
        if self.web_search_requests or self.web_fetch_requests:
            wire["server_tool_use"] = {
                "web_search_requests": self.web_search_requests,
                "web_fetch_requests": self.web_fetch_requests,
            }
        wire["service_tier"] = "standard"
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any] | None) -> Usage:
        """From a `usage` object. Absent, null or nonsensical fields count as 0."""
        return Usage().updated(wire)

    def updated(self, wire: Mapping[str, Any] | None) -> Usage:
        """With the fields that this `usage` object gives; the others stay.

        Totals in `message_delta` are cumulative and overwrite those of `message_start` (wire-api 1.1.4).
        """
        if not isinstance(wire, Mapping) or not wire:
            return self
        write_5m, write_1h = self.cache_write_5m_tokens, self.cache_write_1h_tokens
        split = wire.get("cache_creation")
        total = _count(wire.get("cache_creation_input_tokens"))
        if isinstance(split, Mapping):
            write_5m = _count(split.get("ephemeral_5m_input_tokens"), write_5m)
            write_1h = _count(split.get("ephemeral_1h_input_tokens"), write_1h)
        if total is not None and total != write_5m + write_1h:
            # Only the sum is known to be current: what is not marked as 1 h is billed as the 5 min default.
            write_1h = min(write_1h, total)
            write_5m = total - write_1h
        details = _mapping(wire.get("output_tokens_details"))
        server = _mapping(wire.get("server_tool_use"))
        return Usage(
            _count(wire.get("input_tokens"), self.input_tokens),
            _count(wire.get("output_tokens"), self.output_tokens),
            _count(wire.get("cache_read_input_tokens"), self.cache_read_tokens),
            write_5m,
            write_1h,
            _count(details.get("thinking_tokens"), self.thinking_tokens),
            _count(server.get("web_search_requests"), self.web_search_requests),
            _count(server.get("web_fetch_requests"), self.web_fetch_requests),
        )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(value: object, default: Any = None) -> Any:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default


class UsageReader:
    """Reads one upstream response as its bytes pass: `feed` for a stream, `feed_json` for a whole JSON body.

    Only the few events that carry totals are decoded; a content delta costs a look at its first bytes. Bytes that are not an
    event stream leave everything at its default: a meter must never break the stream that it watches. A stream whose
    event exceeds the size bound sets `broken` and is no longer read.
    """

    __slots__ = (
        "_buffer", "_decoder", "_max", "_plain", "_scanned",
        "broken", "complete", "error", "message_id", "model", "stop_reason", "usage",
    )  # fmt: skip

    def __init__(self, max_event: int = MAX_EVENT_BYTES) -> None:
        """`max_event`: most bytes that one event may hold."""
        self._max = max_event
        self._decoder = SSEDecoder(max_event)
        self._buffer = bytearray()
        self._scanned = 0  # bytes of the buffer known to hold no end of an event
        self._plain = True  # no CR was seen: events end with two LF, as Anthropic sends them
        self.usage = Usage()
        self.model: str | None = None
        self.message_id: str | None = None
        self.stop_reason: str | None = None
        self.error: dict[str, Any] | None = None
        """The `error` object ({type, message}) of an error body or error event."""
        self.complete = False
        """Whether `message_stop` or a whole body arrived."""
        self.broken = False

    def feed(self, chunk: bytes) -> None:
        """The next bytes of a streamed response, in any chunking."""
        if self.broken:
            return
        self._buffer += chunk
        if self._plain and b"\r" in chunk:
            self._plain = False
        try:
            if self._plain:
                self._skim()
            else:
                whole, self._buffer = bytes(self._buffer), bytearray()
                self._read(whole)
        except EventStreamError:  # the caller's bytes go on; only the metering stops
            self.broken = True
            self._buffer.clear()

    def _skim(self) -> None:
        """Read the complete events of the buffer, content deltas left out."""
        buffer, start = self._buffer, 0
        while (end := buffer.find(b"\n\n", max(start, self._scanned))) >= 0:
            if not buffer.startswith(_DELTA, start):
                self._read(bytes(buffer[start : end + 2]))
            start = self._scanned = end + 2
        del buffer[:start]
        if len(buffer) > self._max:
            raise EventStreamError(f"an event of the stream is larger than {self._max} bytes")
        self._scanned = max(0, len(buffer) - 1)  # the last byte may be the first of the two

    def _read(self, data: bytes) -> None:
        for event in self._decoder.feed(data):
            if event.event in _WITH_TOTALS or event.event is None:
                self._event(event.data)

    def feed_json(self, body: bytes) -> None:
        """A whole non-streamed response body: a Message, or an error object."""
        value = _decode(body)
        if value.get("type") == "error":
            self.error = _error(value)
            return
        if "usage" not in value:
            return
        self._message(value)
        self.complete = True

    def _event(self, data: bytes) -> None:
        value = _decode(data)
        match value.get("type"):
            case "message_start":
                self._message(_mapping(value.get("message")))
            case "message_delta":
                delta = _mapping(value.get("delta"))
                self.stop_reason = _text(delta.get("stop_reason")) or self.stop_reason
                self.usage = self.usage.updated(value.get("usage"))
            case "message_stop":
                self.complete = True
            case "error":
                self.error = _error(value)

    def _message(self, message: Mapping[str, Any]) -> None:
        self.model = _text(message.get("model")) or self.model
        self.message_id = _text(message.get("id")) or self.message_id
        self.stop_reason = _text(message.get("stop_reason")) or self.stop_reason
        self.usage = self.usage.updated(message.get("usage"))


_DELTA = b"event: content_block_delta\n"
_WITH_TOTALS = frozenset({"message_start", "message_delta", "message_stop", "error"})


def _decode(data: bytes) -> Mapping[str, Any]:
    try:
        return _mapping(msgspec.json.decode(data))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _error(value: Mapping[str, Any]) -> dict[str, Any]:
    error = value.get("error")
    return dict(error) if isinstance(error, Mapping) else {"type": "api_error", "message": str(error)}
