"""The W3C Trace Context header (https://www.w3.org/TR/trace-context/): pure parsing and formatting."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

HEADER: Final = "traceparent"
STATE_HEADER: Final = "tracestate"
MAX_STATE: Final = 512
"""Characters of `tracestate` that are passed on, as the standard asks for at least."""

_SHAPE: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_SAMPLED: Final = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where in which trace something happens."""

    trace_id: str
    """32 hexadecimal digits, not all zero."""
    span_id: str
    """16 hexadecimal digits, not all zero."""
    sampled: bool = True
    state: str = ""
    """The vendors' own `tracestate`, unchanged."""

    def header(self) -> str:
        """The value of `traceparent`."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"

    def headers(self) -> dict[str, str]:
        """Both headers, as they are sent on."""
        return {HEADER: self.header(), **({STATE_HEADER: self.state} if self.state else {})}


def parse(header: str | None, state: str | None = None) -> TraceContext | None:
    """The context that the headers name; None when there is none or it is not valid, as the standard asks for.

    A version above 00 may have further parts, which are ignored; version ff is not valid.
    """
    found = _SHAPE.fullmatch(header.strip()) if header and len(header) <= 512 else None
    if found is None:
        return None
    version, trace, span, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest) or not trace.strip("0") or not span.strip("0"):
        return None
    kept = state if state and len(state) <= MAX_STATE and state.isprintable() else ""
    return TraceContext(trace, span, bool(int(flags, 16) & _SAMPLED), kept)
