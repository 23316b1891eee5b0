"""The OpenTelemetry adapter of `tracing.Tracer`; needs the extra `otel`, which is imported when a tracer is made.

Traces go to an OTLP collector over HTTP, in batches, from a thread of the SDK. Metrics go there too: see `otelmetrics`.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from typing import Any, Final

from claude_wrapper.errors import ConfigurationError
from claude_wrapper.telemetry.exceptions import summary
from claude_wrapper.telemetry.redact import Redactor
from claude_wrapper.telemetry.traceparent import TraceContext
from claude_wrapper.telemetry.tracing import Attribute, Span

SCOPE: Final = "claude_wrapper"
FLUSH_SECONDS: Final = 5.0


def otel_module(name: str) -> Any:
    """A module of OpenTelemetry. Raises ConfigurationError when the extra is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            "an OTLP endpoint needs OpenTelemetry: install claude-wrapper[otel], or unset CLAUDE_WRAPPER_OTEL_ENDPOINT"
        ) from error


class OTelTracer:
    """Spans that go to an OTLP collector (or to the `exporter` that a test gives)."""

    def __init__(
        self,
        endpoint: str | None,
        *,
        resource: Mapping[str, str],
        sample: float = 1.0,
        redactor: Redactor | None = None,
        exporter: Any = None,
    ) -> None:
        """`endpoint` is the collector's base URL (`http://collector:4318`); `resource` needs `service.name`.

        `sample` is the share of new traces that are kept; a caller's own decision is respected. Raises
        ConfigurationError when OpenTelemetry is not installed.
        """
        self._api = otel_module("opentelemetry.trace")
        sdk = otel_module("opentelemetry.sdk.trace")
        export = otel_module("opentelemetry.sdk.trace.export")
        sampling = otel_module("opentelemetry.sdk.trace.sampling")
        resources = otel_module("opentelemetry.sdk.resources")
        self._redactor = redactor or Redactor()
        self._provider = sdk.TracerProvider(
            resource=resources.Resource.create(dict(resource)),
            sampler=sampling.ParentBasedTraceIdRatio(sample),
            shutdown_on_exit=False,
        )
        if exporter is None:
            otlp = otel_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
            exporter = otlp.OTLPSpanExporter(endpoint=f"{(endpoint or '').rstrip('/')}/v1/traces")
            processor = export.BatchSpanProcessor(exporter)
        else:
            processor = export.SimpleSpanProcessor(exporter)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(SCOPE)
        self._kinds = {
            "internal": self._api.SpanKind.INTERNAL,
            "server": self._api.SpanKind.SERVER,
            "client": self._api.SpanKind.CLIENT,
        }

    def span(
        self,
        name: str,
        *,
        kind: str = "internal",
        parent: TraceContext | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> AbstractContextManager[Span]:
        return self._open(name, kind, parent, attributes or {})

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
        start = int(began.timestamp() * 1e9)
        inner = self._tracer.start_span(
            self._redactor.text(name), context=self._context(parent), kind=self._kinds[kind], start_time=start
        )
        span = _OTelSpan(self._api, inner, self._redactor, "")
        for key, value in (attributes or {}).items():
            span.set(key, value)
        if failed is not None:
            span.fail(failed)
        inner.end(end_time=start + int(seconds * 1e9))

    async def close(self) -> None:
        """Send what is left; gives up after `FLUSH_SECONDS`."""
        await asyncio.to_thread(self._provider.force_flush, int(FLUSH_SECONDS * 1000))
        await asyncio.to_thread(self._provider.shutdown)

    @contextmanager
    def _open(
        self, name: str, kind: str, parent: TraceContext | None, attributes: Mapping[str, Attribute]
    ) -> Iterator[Span]:
        with self._tracer.start_as_current_span(
            self._redactor.text(name),
            context=self._context(parent),
            kind=self._kinds[kind],
            record_exception=False,  # an exception's message may quote content
            set_status_on_exception=False,
        ) as inner:
            span = _OTelSpan(self._api, inner, self._redactor, parent.state if parent else "")
            for key, value in attributes.items():
                span.set(key, value)
            try:
                yield span
            except BaseException as error:
                span.fail(getattr(error, "code", None) or type(error).__name__)
                span.event("exception", frames=tuple(summary(error)["frames"][-5:]))
                raise

    def _context(self, parent: TraceContext | None) -> Any:
        if parent is None:
            return None
        remote = self._api.SpanContext(
            int(parent.trace_id, 16),
            int(parent.span_id, 16),
            is_remote=True,
            trace_flags=self._api.TraceFlags(int(parent.sampled)),
            trace_state=self._api.TraceState.from_header([parent.state]) if parent.state else None,
        )
        return self._api.set_span_in_context(self._api.NonRecordingSpan(remote))


class _OTelSpan:
    __slots__ = ("_api", "_redactor", "_span", "_state")

    def __init__(self, api: Any, span: Any, redactor: Redactor, state: str) -> None:
        self._api = api
        self._span = span
        self._redactor = redactor
        self._state = state

    @property
    def context(self) -> TraceContext | None:
        own = self._span.get_span_context()
        if not own.is_valid:
            return None
        return TraceContext(f"{own.trace_id:032x}", f"{own.span_id:016x}", bool(own.trace_flags.sampled), self._state)

    def set(self, name: str, value: Attribute) -> None:
        self._span.set_attribute(name, self._safe(name, value))

    def event(self, name: str, **attributes: Attribute) -> None:
        self._span.add_event(name, {key: self._safe(key, value) for key, value in attributes.items()})

    def fail(self, kind: str) -> None:
        self._span.set_attribute("error.type", self._redactor.text(kind))
        self._span.set_status(self._api.Status(self._api.StatusCode.ERROR))

    def _safe(self, name: str, value: Attribute) -> Any:
        if isinstance(value, tuple):
            return [self._redactor.text(one) for one in value]
        # The conventions' own names for counts (`gen_ai.usage.input_tokens`) are numbers and pass.
        return (
            self._redactor.text(value)
            if isinstance(value, str) and name.startswith("gen_ai.")
            else self._redactor.named(name, value)
        )
