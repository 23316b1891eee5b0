"""Who and what the running code works for: bound once, seen by every log line and span below it.

One context variable holds one immutable mapping: a task that is started inside inherits it, and nothing leaks out of
the `with` that bound it.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Final

from claude_wrapper.telemetry.traceparent import TraceContext

FIELDS: Final = frozenset(
    {"request", "org", "workspace", "user", "key", "session", "turn", "job", "slot", "replica", "trace_id", "span_id"}
)
"""What may be bound: identifiers only, never content."""

_EMPTY: Final[Mapping[str, str]] = MappingProxyType({})
_current: Final[contextvars.ContextVar[Mapping[str, str]]] = contextvars.ContextVar("claude_wrapper", default=_EMPTY)


def current() -> Mapping[str, str]:
    """The fields that are bound here."""
    return _current.get()


@contextmanager
def bound(**fields: str | None) -> Iterator[None]:
    """Bind identifiers for the body; None leaves a field as it is. Raises ValueError for a field not in `FIELDS`."""
    if unknown := fields.keys() - FIELDS:
        raise ValueError(f"not a field of the log context: {', '.join(sorted(unknown))}")
    token = _current.set({**_current.get(), **{name: value for name, value in fields.items() if value is not None}})
    try:
        yield
    finally:
        _current.reset(token)


_trace: Final[contextvars.ContextVar[TraceContext | None]] = contextvars.ContextVar(
    "claude_wrapper_trace", default=None
)


def trace() -> TraceContext | None:
    """Where in which trace the running code is; None when nobody traces."""
    return _trace.get()


@contextmanager
def traced(where: TraceContext | None) -> Iterator[None]:
    """The body, and what it starts, happens there."""
    token = _trace.set(where)
    try:
        yield
    finally:
        _trace.reset(token)
