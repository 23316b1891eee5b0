"""One trace from the caller through turn and model call; without an endpoint the caller's context still goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from running_server import Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


async def _ask(server: Running, text: str) -> int:
    body = {"model": "claude-sonnet-5-5", "max_tokens": 64, "messages": [{"role": "user", "content": text}]}
    async with server.http.post("/v1/messages", json=body, headers={"traceparent": PARENT}) as response:
        await response.read()
        return response.status


async def test_a_callers_trace_context_reaches_the_model_api(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path) as server:
        assert await _ask(server, "hello") == 200
        assert server.upstream.calls[0].headers["traceparent"] == PARENT


async def test_one_trace_holds_request_turn_and_model_call_and_no_content(
    reachable_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from claude_wrapper.app import telemetry

    exporter = InMemorySpanExporter()

    original = telemetry.OTelTracer
    monkeypatch.setattr(telemetry, "OTelTracer", lambda endpoint, **kw: original(endpoint, exporter=exporter, **kw))
    async with running(reachable_tmp_path, otel_endpoint="http://127.0.0.1:9", otel_metrics_seconds=0) as server:
        assert await _ask(server, "[[say PLANTED]]") == 200
        async with asyncio.timeout(20):
            while not any(span.name.startswith("chat ") for span in exporter.get_finished_spans()):
                await asyncio.sleep(0.02)
            while not any(span.name.startswith("invoke_agent ") for span in exporter.get_finished_spans()):
                await asyncio.sleep(0.02)
        spans = {span.name: span for span in exporter.get_finished_spans()}
        upstream = server.upstream.calls[0].headers["traceparent"]
    request, turn, call = spans["POST"], spans["invoke_agent chat"], spans["chat claude-sonnet-5-5"]
    assert {f"{one.context.trace_id:032x}" for one in (request, turn, call)} == {TRACE}
    assert f"{request.parent.span_id:016x}" == SPAN
    assert turn.parent.span_id == request.context.span_id
    assert call.parent.span_id == turn.context.span_id
    assert upstream == f"00-{TRACE}-{turn.context.span_id:016x}-01"
    assert call.attributes["gen_ai.usage.output_tokens"] > 0
    assert not [span for span in exporter.get_finished_spans() if "PLANTED" in str(dict(span.attributes))]
