"""Newline-delimited JSON: bytes in any chunking to whole lines, within a size bound.

The framer never looks inside a line; `streamjson.decode_frame` does. A line is what stands before a `\\n`; blank lines
are dropped, because they mean nothing in NDJSON. The producer is untrusted, so a line has a largest size: without one
a process that never prints a newline would fill the server's memory.
"""

from __future__ import annotations

from claude_wrapper.errors import AgentProtocolError

MAX_LINE = 16 * 2**20
"""Bytes. The CLI prints whole file contents in one tool result; 16 MiB is beyond anything it was seen to print."""


class LineTooLong(AgentProtocolError):
    """The Claude process wrote a line that is longer than the limit."""


class LineFramer:
    """Cuts a byte stream into lines. One instance per stream; not usable after it raised."""

    __slots__ = ("_broken", "_max_line", "_parts", "_pending")

    def __init__(self, max_line: int = MAX_LINE) -> None:
        """`max_line` is the largest line in bytes, without its newline."""
        self._max_line = max_line
        self._parts: list[bytes] = []  # pieces of the line that has no newline yet; joined once, so never quadratic
        self._pending = 0
        self._broken = False

    @property
    def pending(self) -> int:
        """Bytes of the line that has not ended yet."""
        return self._pending

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, in order.

        Raises LineTooLong when a line, complete or not, is longer than the limit. There is no way to find the next
        frame's start reliably after that, so every later call raises too.
        """
        if self._broken:
            raise self._too_long()
        lines = data.split(b"\n")
        rest = lines.pop()
        if lines and self._parts:
            self._parts.append(lines[0])
            lines[0] = b"".join(self._parts)
            self._parts.clear()
            self._pending = 0
        if rest:
            self._parts.append(rest)
            self._pending += len(rest)
        limit = self._max_line
        if self._pending > limit or (lines and max(map(len, lines)) > limit):
            self._broken = True
            self._parts.clear()
            raise self._too_long()
        return [line for line in lines if line and not line.isspace()]

    def _too_long(self) -> LineTooLong:
        return LineTooLong(f"the Claude process wrote a line of more than {self._max_line} bytes")
