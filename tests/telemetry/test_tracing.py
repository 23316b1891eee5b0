"""Trace context survives the way through the server, with and without OpenTelemetry."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import ConfigurationError, RateLimited
from claude_wrapper.telemetry import genai, traceparent
from claude_wrapper.telemetry.otel import OTelTracer
from claude_wrapper.telemetry.traceparent import TraceContext
from claude_wrapper.telemetry.tracing import NoTracer, Tracer

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_a_context_survives_being_written_and_read(trace: int, span: int, sampled: bool) -> None:
    context = TraceContext(f"{trace:032x}", f"{span:016x}", sampled)
    assert traceparent.parse(context.header()) == context


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "nonsense",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01" + "x" * 1000,
    ],
)
def test_a_header_that_is_not_valid_is_no_context(header: str | None) -> None:
    assert traceparent.parse(header) is None


@given(st.text(max_size=100))
def test_no_header_makes_the_parser_fail(header: str) -> None:
    traceparent.parse(header, header)


def test_a_later_version_may_have_further_parts() -> None:
    assert traceparent.parse(f"01-{TRACE}-{SPAN}-03-extra") == TraceContext(TRACE, SPAN, True)


def test_vendor_state_is_passed_on_when_it_is_printable_and_short() -> None:
    header = f"00-{TRACE}-{SPAN}-00"
    kept = traceparent.parse(header, "vendor=1")
    assert kept is not None
    assert kept.headers() == {"traceparent": header, "tracestate": "vendor=1"}
    for bad in ("a\nb", "x" * 513):
        parsed = traceparent.parse(header, bad)
        assert parsed is not None
        assert parsed.state == ""


def test_without_tracing_the_callers_context_is_handed_through() -> None:
    parent = TraceContext(TRACE, SPAN)
    with NoTracer().span("chat x", parent=parent) as span:
        span.set(genai.OPERATION, genai.CHAT)
        span.event("a")
        span.fail("b")
        assert span.context == parent
    with NoTracer().span("chat x") as span:
        assert span.context is None


def test_span_names_follow_the_convention() -> None:
    assert genai.span_name(genai.CHAT, "claude-a") == "chat claude-a"
    assert genai.span_name(genai.INVOKE_AGENT, None) == "invoke_agent"


def test_a_tracer_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # as if it were not installed
    with pytest.raises(ConfigurationError, match=r"claude-wrapper\[otel\]"):
        OTelTracer("http://127.0.0.1:4318", resource={"service.name": "x"})


def fail_inside(tracer: Tracer) -> None:
    with tracer.span("chat claude-a", kind="client") as inner:
        inner.set(genai.INPUT_TOKENS, 12)
        inner.set("authorization", "x")
        inner.set("note", "Bearer PLANTEDPLANTED")
        assert inner.context is not None
        assert inner.context.trace_id == TRACE
        raise RateLimited("PLANTED by the caller")


@pytest.mark.anyio
async def test_opentelemetry_gets_the_spans_with_their_parents_and_without_secrets() -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    tracer: Tracer = OTelTracer(None, resource={"service.name": "x"}, exporter=kept)
    parent = TraceContext(TRACE, SPAN, state="vendor=1")
    attributes = {genai.CONVERSATION: "sesn_1"}
    with (
        tracer.span("invoke_agent", kind="server", parent=parent, attributes=attributes) as outer,
        pytest.raises(RateLimited),
    ):
        fail_inside(tracer)
    await tracer.close()
    chat, agent = kept.get_finished_spans()
    assert agent.parent is not None
    assert f"{agent.parent.span_id:016x}" == SPAN
    assert chat.parent is not None
    assert outer.context is not None
    assert f"{chat.parent.span_id:016x}" == outer.context.span_id
    assert chat.attributes is not None
    assert chat.attributes["error.type"] == "rate_limited"
    assert chat.attributes[genai.INPUT_TOKENS] == 12
    assert "PLANTED" not in chat.to_json()
