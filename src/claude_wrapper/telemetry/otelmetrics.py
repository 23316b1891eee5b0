"""The metrics by OTLP too; needs the extra `otel`.

A bridge, not a second set of instruments: what the families hold is read out of their registry every so often, as a
scrape would, and sent. What happens on a turn costs nothing more. Names are those of `/metrics` without `_total`, which a
collector that speaks to Prometheus appends again; sums are cumulative since the server's start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Final

import structlog
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from claude_wrapper.clock import Clock
from claude_wrapper.telemetry.metrics import Metrics
from claude_wrapper.telemetry.otel import FLUSH_SECONDS, SCOPE, otel_module

_log = structlog.get_logger("claude_wrapper.telemetry")
_NANO: Final = 10**9


class MetricsExport:
    """Sends all metrics every `seconds` to an OTLP collector (or to the `exporter` that a test gives)."""

    def __init__(
        self,
        metrics: Metrics,
        endpoint: str,
        clock: Clock,
        *,
        resource: Mapping[str, str],
        seconds: float,
        exporter: Any = None,
    ) -> None:
        """`endpoint` is the collector's base URL. Raises ConfigurationError when OpenTelemetry is not installed."""
        self._metrics = metrics
        self._clock = clock
        self._seconds = seconds
        self._points = otel_module("opentelemetry.sdk.metrics.export")
        self._resource = otel_module("opentelemetry.sdk.resources").Resource.create(dict(resource))
        self._scope = otel_module("opentelemetry.sdk.util.instrumentation").InstrumentationScope(SCOPE)
        self._began = round(clock.now().timestamp() * _NANO)
        if exporter is None:
            otlp = otel_module("opentelemetry.exporter.otlp.proto.http.metric_exporter")
            exporter = otlp.OTLPMetricExporter(endpoint=f"{endpoint.rstrip('/')}/v1/metrics")
        self._exporter = exporter

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._clock.sleep(self._seconds)
            await self.send()

    async def send(self) -> None:
        """Once. A collector that is away costs these figures; the next ones, which are sums, hold what they told."""
        self._metrics.refresh()
        try:
            # Reading the registry takes milliseconds and sending seconds: not on the event loop.
            result = await asyncio.to_thread(self._send)
        except Exception:  # noqa: BLE001 - whatever an exporter raises must not end the sending
            _log.warning("metrics.not_exported", exc_info=True)
            return
        if result is not self._points.MetricExportResult.SUCCESS:
            _log.warning("metrics.not_exported", result=str(getattr(result, "name", result)))

    def _send(self) -> Any:
        return self._exporter.export(self.collect(), timeout_millis=FLUSH_SECONDS * 1000)

    async def close(self) -> None:
        """Send the last figures; gives up after `FLUSH_SECONDS`."""
        await self.send()
        await asyncio.to_thread(self._exporter.shutdown, FLUSH_SECONDS * 1000)

    def collect(self) -> Any:
        """Everything that the families hold now, as the SDK's `MetricsData`."""
        make, now = self._points, round(self._clock.now().timestamp() * _NANO)
        metrics = [self._metric(one, now) for one in self._metrics.registry.collect()]
        scope = make.ScopeMetrics(self._scope, [one for one in metrics if one is not None], "")
        return make.MetricsData([make.ResourceMetrics(self._resource, [scope], "")])

    def _metric(self, family: Metric, now: int) -> Any:
        make = self._points
        total = make.AggregationTemporality.CUMULATIVE
        match family.type:
            case "counter":
                samples = [one for one in family.samples if one.name.endswith("_total")]
                data = make.Sum([self._number(one, now) for one in samples], total, is_monotonic=True)
            case "gauge":
                data = make.Gauge([self._number(one, now) for one in family.samples])
            case "histogram":
                data = make.Histogram([self._histogram(*one, now) for one in _grouped(family.samples)], total)
            case _:
                return None
        return make.Metric(family.name, family.documentation, "", data) if data.data_points else None

    def _number(self, sample: Sample, now: int) -> Any:
        return self._points.NumberDataPoint(dict(sample.labels), self._began, now, sample.value)

    def _histogram(self, labels: Mapping[str, str], samples: Mapping[str, float], now: int) -> Any:
        bounds = sorted(float(name) for name in samples if name not in ("_sum", "_count"))
        below = [samples[_bound(bound)] for bound in bounds]
        counts = [int(upper - lower) for lower, upper in zip([0.0, *below], below, strict=False)]
        return self._points.HistogramDataPoint(
            attributes=dict(labels),
            start_time_unix_nano=self._began,
            time_unix_nano=now,
            count=int(samples["_count"]),
            sum=samples["_sum"],
            bucket_counts=counts,
            explicit_bounds=bounds[:-1],  # the last bucket has no bound
            min=None,
            max=None,
        )


def _bound(bound: float) -> str:
    return "+Inf" if bound == float("inf") else str(bound)


def _grouped(samples: Iterable[Sample]) -> Iterable[tuple[dict[str, str], dict[str, float]]]:
    """(labels, samples by bound or by `_sum` and `_count`) of each histogram of a family."""
    groups: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for sample in samples:
        labels = {name: value for name, value in sample.labels.items() if name != "le"}
        if sample.name.endswith("_bucket"):
            name = _bound(float(sample.labels["le"]))
        elif sample.name.endswith(("_sum", "_count")):
            name = sample.name[sample.name.rindex("_") :]
        else:
            continue
        groups.setdefault(tuple(sorted(labels.items())), {})[name] = sample.value
    return ((dict(labels), found) for labels, found in groups.items())
