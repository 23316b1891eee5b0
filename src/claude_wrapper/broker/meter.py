"""Reading usage from an answer while it passes."""

from __future__ import annotations

from claude_wrapper.wire.usage import Usage, UsageReader

_DELTA = b"event: content_block_delta\n"
_TOTALS = (b"event: message_", b"event: error")


class Meter:
    """One answer's usage. `feed` each piece as it passes, then `end`."""

    def __init__(self, *, streamed: bool, max_json_bytes: int) -> None:
        self._reader = UsageReader()
        self._streamed = streamed
        self._between_events = True
        self._pieces: list[bytes] = []
        self._size = 0
        self._max = max_json_bytes

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the answer."""
        if not self._streamed:
            self._collect(chunk)
            return
        whole = chunk.endswith(b"\n\n")
        # Nearly every piece is one or more whole content deltas, which hold no totals: a look at the edges is enough.
        if (
            self._between_events
            and whole
            and chunk.startswith(_DELTA)
            and _TOTALS[0] not in chunk
            and _TOTALS[1] not in chunk
        ):
            return
        self._between_events = whole
        self._reader.feed(chunk)

    def end(self) -> None:
        """The answer arrived whole."""
        if self._streamed or self._size > self._max:
            return
        self._reader.feed_json(b"".join(self._pieces))
        self._pieces.clear()

    @property
    def usage(self) -> Usage:
        return self._reader.usage

    @property
    def complete(self) -> bool:
        """Whether a stream reached `message_stop`."""
        return self._reader.complete

    @property
    def stop_reason(self) -> str | None:
        return self._reader.stop_reason

    @property
    def error(self) -> tuple[str, str] | None:
        """(type, message) of an error event or error body."""
        error = self._reader.error
        return None if error is None else (str(error.get("type", "api_error")), str(error.get("message", "")))

    def _collect(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size <= self._max:
            self._pieces.append(chunk)
        else:
            self._pieces.clear()
