"""Metrics by OTLP: what a collector receives over HTTP is what a scrape says."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from claude_wrapper.clock import SystemClock
from claude_wrapper.telemetry.metrics import Metrics
from claude_wrapper.telemetry.otelmetrics import MetricsExport
from running_server import Running, running

pytestmark = pytest.mark.anyio


@dataclass
class Collector:
    """An OTLP/HTTP receiver."""

    url: str = ""
    status: int = 200
    received: list[ExportMetricsServiceRequest] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.paths.append(request.path)
        if request.path == "/v1/metrics":
            message = ExportMetricsServiceRequest()
            message.ParseFromString(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
            self.received.append(message)
        return web.Response(status=self.status)

    @property
    def metrics(self) -> dict[str, Any]:
        """Of the last message, by name."""
        (resource,) = self.received[-1].resource_metrics
        return {one.name: one for scope in resource.scope_metrics for one in scope.metrics}


@pytest.fixture
async def collector(anyio_backend: str) -> AsyncIterator[Collector]:
    made = Collector()
    app = web.Application()
    app.router.add_post("/{path:.*}", made.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


def labels(point: Any) -> dict[str, str]:
    return {one.key: one.value.string_value for one in point.attributes}


async def test_every_family_arrives_with_its_kind_its_labels_and_its_values(collector: Collector) -> None:
    metrics = Metrics(models=["claude-a"])
    metrics.tokens.inc(7, model="claude-a", kind="input")
    metrics.pool_size.set(3)
    metrics.claim_seconds.observe(0.003, kind="warm")
    metrics.claim_seconds.observe(0.3, kind="warm")
    metrics.claim_seconds.observe(99.0, kind="warm")
    metrics.pull("late", lambda: metrics.pool_size.set(4))
    export = MetricsExport(metrics, collector.url, SystemClock(), resource={"service.name": "x"}, seconds=60)
    await export.send()
    await export.close()
    (resource,) = collector.received[0].resource_metrics
    assert labels(resource.resource)["service.name"] == "x"
    found = collector.metrics
    with_samples = {one.name for one in metrics.registry.collect() if one.samples}
    assert set(found) == with_samples
    tokens = found[metrics.tokens.declaration.name.removesuffix("_total")].sum
    assert tokens.is_monotonic
    assert tokens.aggregation_temporality == 2, "cumulative"
    assert {labels(one)["kind"]: one.as_double for one in tokens.data_points if one.as_double} == {"input": 7}
    (size,) = found["pool_size"].gauge.data_points
    assert size.as_double == 4, "sources are asked before each export"
    name = metrics.claim_seconds.declaration.name
    (warm,) = [one for one in found[name].histogram.data_points if labels(one) == {"kind": "warm"}]
    assert (warm.count, round(warm.sum, 3)) == (3, 99.303)
    assert list(warm.explicit_bounds) == list(metrics.claim_seconds.declaration.buckets)
    assert len(warm.bucket_counts) == len(warm.explicit_bounds) + 1
    assert sum(warm.bucket_counts) == 3
    assert warm.bucket_counts[-1] == 1
    assert warm.start_time_unix_nano <= warm.time_unix_nano


async def test_a_collector_that_refuses_or_is_away_costs_figures_and_nothing_else(collector: Collector) -> None:
    collector.status = 400
    export = MetricsExport(Metrics(), collector.url, SystemClock(), resource={"service.name": "x"}, seconds=60)
    await export.send()
    collector.status = 200
    await export.send()
    assert len(collector.received) == 2
    await export.close()


@pytest.mark.process
async def test_a_server_sends_what_a_scrape_says_and_the_last_word_at_its_end(
    collector: Collector, reachable_tmp_path: Path
) -> None:
    async with running(reachable_tmp_path, spares=0, otel_endpoint=collector.url, otel_metrics_seconds=0.2) as server:
        assert (await _listed(server)) == 200
        async with asyncio.timeout(20):
            while not collector.received:
                await asyncio.sleep(0.02)
    assert collector.metrics["build_info"].gauge.data_points[0].as_double == 1
    asked = [
        one
        for one in collector.metrics["pooled_requests"].sum.data_points
        if labels(one).get("route") == "/v1/models" and labels(one)["status"] == "200"
    ]
    assert [one.as_double for one in asked] == [1]


async def _listed(server: Running) -> int:
    async with server.http.get("/v1/models") as response:
        return response.status
