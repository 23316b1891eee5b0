"""Server-sent events: frames out, events in, no I/O.

The format is the WHATWG one (https://html.spec.whatwg.org/multipage/server-sent-events.html) with two narrowings that
the Anthropic and OpenAI clients share: data is one line of JSON, and a frame without data is not an event.
"""

from __future__ import annotations

from dataclasses import dataclass

from claude_wrapper.errors import InvalidRequest, WrapperError

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
"""Keep-alive for Anthropic clients; their parser drops it."""

MAX_EVENT_BYTES = 32 * 2**20
"""An event holds at most one content block, and a request body is at most 32 MB upstream."""


class EventStreamError(WrapperError):
    """The event stream cannot be read."""

    code = "upstream_error"


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event: `event` is the name (None: not given), `data` the joined data lines, `id` the id line of this event."""

    event: str | None
    data: bytes
    id: str | None = None


def encode(event: str | None, data: bytes, *, id: str | None = None) -> bytes:  # noqa: A002 (the protocol's own word)
    """One frame. `data` may hold line breaks (they become several data lines); `event` and `id` may not.

    Raises InvalidRequest when `event` or `id` holds a line break or NUL: it would forge a second field.
    """
    parts: list[bytes] = []
    if id is not None:
        parts.append(b"id: " + _single_line("id", id) + b"\n")
    if event is not None:
        parts.append(b"event: " + _single_line("event", event) + b"\n")
    if b"\n" in data or b"\r" in data:
        lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        parts.extend(b"data: " + line + b"\n" for line in lines)
    else:
        parts.append(b"data: " + data + b"\n")
    parts.append(b"\n")
    return b"".join(parts)


def _single_line(field: str, value: str) -> bytes:
    if "\n" in value or "\r" in value or "\0" in value:
        raise InvalidRequest("must not contain a line break or NUL", field=field)
    return value.encode()


class SSEDecoder:
    """Bytes in any chunking to events. LF, CRLF and CR line ends; comments and empty events are dropped."""

    __slots__ = ("_after_cr", "_buffer", "_data", "_event", "_id", "_max", "_scanned", "_size", "_started")

    def __init__(self, max_event: int = MAX_EVENT_BYTES) -> None:
        """`max_event`: most bytes that one event (its unfinished part included) may hold."""
        self._max = max_event
        self._buffer = bytearray()
        self._scanned = 0  # bytes of the buffer known to hold no line end: keeps one long line linear
        self._data: list[bytes] = []
        self._event: str | None = None
        self._id: str | None = None
        self._size = 0
        self._started = False
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """The events that this chunk completes. Raises EventStreamError when an event is larger than the bound."""
        buffer = self._buffer
        buffer += chunk
        if self._after_cr and buffer:  # the LF of a CRLF that was cut in two
            if buffer[0] == 0x0A:
                del buffer[0]
            self._after_cr = False
        events: list[ServerSentEvent] = []
        start = 0
        while True:
            found = _line_end(buffer, max(start, self._scanned))
            if found is None:
                break
            end, following = found
            if following == end + 1 and buffer[end] == 0x0D and following == len(buffer):
                self._after_cr = True  # this CR may be half of a CRLF
            self._line(bytes(buffer[start:end]), events)
            start = self._scanned = following
        del buffer[:start]
        self._scanned = len(buffer)
        if self._size + len(buffer) > self._max:
            raise EventStreamError(f"an event of the stream is larger than {self._max} bytes")
        return events

    def _line(self, line: bytes, events: list[ServerSentEvent]) -> None:
        if not self._started:
            self._started = True
            line = line.removeprefix(b"\xef\xbb\xbf")  # the standard allows one byte order mark
        if not line:
            if self._data:
                events.append(ServerSentEvent(self._event, b"\n".join(self._data), self._id))
            self._data, self._event, self._id, self._size = [], None, None, 0
            return
        self._size += len(line)
        if self._size > self._max:
            raise EventStreamError(f"an event of the stream is larger than {self._max} bytes")
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._event = value.decode("utf-8", "replace")
        elif field == b"id" and b"\0" not in value:
            self._id = value.decode("utf-8", "replace")


def _line_end(buffer: bytearray, start: int) -> tuple[int, int] | None:
    """Where the next line ends and the one after it begins; None when no line end has arrived."""
    lf = buffer.find(b"\n", start)
    cr = buffer.find(b"\r", start, lf if lf >= 0 else len(buffer))
    if cr < 0:
        return None if lf < 0 else (lf, lf + 1)
    return (cr, cr + 2) if lf == cr + 1 else (cr, cr + 1)
