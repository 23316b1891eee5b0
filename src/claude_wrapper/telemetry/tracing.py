"""Traces: a narrow port with a free no-op and an adapter for OpenTelemetry (extra `otel`).

Spans carry identifiers, models, counts and outcomes; never content. Whoever opens a span passes its parent's context
explicitly or inherits the one that is open in this task.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from types import TracebackType
from typing import Final, Protocol

from claude_wrapper.telemetry.traceparent import TraceContext

Attribute = str | int | float | bool | tuple[str, ...]


class Span(Protocol):
    """Something that takes time."""

    @property
    def context(self) -> TraceContext | None:
        """What to hand on in `traceparent`; None when nothing is traced and nobody gave a context."""
        ...

    def set(self, name: str, value: Attribute) -> None:
        """Set an attribute; see `telemetry.genai` for names."""
        ...

    def event(self, name: str, **attributes: Attribute) -> None:
        """Something happened at a moment of the span."""
        ...

    def fail(self, kind: str) -> None:
        """The span ended in an error of this kind: a stable code or a class name."""
        ...


class Tracer(Protocol):
    """Opens spans."""

    def span(
        self,
        name: str,
        *,
        kind: str = "internal",
        parent: TraceContext | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> AbstractContextManager[Span]:
        """Open a span for the body; `kind` is internal, server or client. An exception marks it as failed and passes."""
        ...

    def past(
        self,
        name: str,
        *,
        began: datetime,
        seconds: float,
        kind: str = "internal",
        parent: TraceContext | None = None,
        attributes: Mapping[str, Attribute] | None = None,
        failed: str | None = None,
    ) -> None:
        """Write down something that is over. `failed` is the kind of its error."""
        ...

    async def close(self) -> None:
        """Send what is left, bounded in time."""
        ...


class _NoSpan:
    """Costs nothing and hands the caller's context through, so that a trace survives a server that does not trace."""

    __slots__ = ("context",)

    def __init__(self, context: TraceContext | None) -> None:
        self.context = context

    def set(self, name: str, value: Attribute) -> None:
        pass

    def event(self, name: str, **attributes: Attribute) -> None:
        pass

    def fail(self, kind: str) -> None:
        pass

    def __enter__(self) -> Span:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


_NOTHING: Final = _NoSpan(None)


class NoTracer:
    """The default."""

    def span(
        self,
        name: str,
        *,
        kind: str = "internal",
        parent: TraceContext | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> AbstractContextManager[Span]:
        return _NoSpan(parent) if parent else _NOTHING

    def past(
        self,
        name: str,
        *,
        began: datetime,
        seconds: float,
        kind: str = "internal",
        parent: TraceContext | None = None,
        attributes: Mapping[str, Attribute] | None = None,
        failed: str | None = None,
    ) -> None:
        pass

    async def close(self) -> None:
        pass
