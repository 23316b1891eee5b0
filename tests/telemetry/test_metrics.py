"""Metrics: closed labels, series from the start, two text formats, pulled values, and one documented table."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from claude_wrapper.telemetry import collectors, families
from claude_wrapper.telemetry.looplag import LoopLag
from claude_wrapper.telemetry.metrics import Metrics
from claude_wrapper.testing.clock import ManualClock

ROOT = Path(__file__).parents[2]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_the_documentation_is_the_declarations() -> None:
    written = (ROOT / "docs/metrics.md").read_text()
    assert written == Metrics().documentation(), "run `make docs`"


def test_the_names_that_were_asked_for_exist() -> None:
    names = {one.name for one in Metrics().declarations}
    assert {"pooled_requests_total", "pool_size", "process_uptime_seconds", "request_duration_seconds"} <= names


def test_two_sets_of_metrics_live_side_by_side() -> None:
    one, other = Metrics(), Metrics()
    one.pool_size.set(3)
    assert value(other, "pool_size") == 0


def test_counters_of_known_labels_exist_from_the_start_at_zero() -> None:
    metrics = Metrics(routes=["/v1/messages"], models=["claude-a"])
    assert value(metrics, "pooled_requests_total", route="/v1/messages", status="500", dialect="anthropic") == 0
    assert value(metrics, "upstream_calls_total", model="claude-a", status="529") == 0
    assert value(metrics, "pool_evictions_total", reason="memory") == 0
    assert value(metrics, "limits_hit_total", limit="budget", scope="organization") == 0


def test_values_that_are_not_in_the_table_count_as_other_and_make_no_series() -> None:
    metrics = Metrics(routes=["/v1/messages"])
    before = len(metrics.render()[0].splitlines())
    for n in range(500):
        metrics.requests.inc(route=f"/v1/files/{n}", status="200", dialect="anthropic")
    assert value(metrics, "pooled_requests_total", route="other", status="200", dialect="anthropic") == 500
    assert len(metrics.render()[0].splitlines()) == before
    assert len(metrics.requests._children) == 0


def test_the_organisation_is_a_label_only_when_asked_for_and_its_values_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = Metrics()
    plain.turns.inc(outcome="completed", org="org_1")
    assert value(plain, "turns_total", outcome="completed") == 1
    monkeypatch.setattr(families, "MAX_ORGS", 2)
    labelled = Metrics(org_label=True)
    for org in ("org_1", "org_1", "org_2", "org_3", "org_4"):
        labelled.turns.inc(outcome="completed", org=org)
    assert value(labelled, "turns_total", outcome="completed", org="org_1") == 2
    assert value(labelled, "turns_total", outcome="completed", org="other") == 2
    labelled.turns.inc(outcome="completed")
    assert value(labelled, "turns_total", outcome="completed", org="other") == 3


def test_a_label_that_is_missing_or_foreign_is_a_fault() -> None:
    with pytest.raises(ValueError, match="outcome"):
        Metrics().turns.inc()
    with pytest.raises(ValueError, match="user"):
        Metrics().turns.inc(outcome="completed", user="u")


def test_a_family_that_would_make_too_many_series_is_refused() -> None:
    from prometheus_client import CollectorRegistry

    make = families.Declarations(CollectorRegistry(), org_label=False)
    many = [str(n) for n in range(30)]
    with pytest.raises(ValueError, match="900 series"):
        make.counter("a_total", "d", x=many, y=many)


def test_no_family_has_a_label_of_which_nobody_knows_the_values() -> None:
    for one in Metrics().declarations:
        assert all(values for values in one.labels.values()), one.name
        assert not {"user", "session", "request", "key", "path"} & set(one.labels), one.name


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("application/openmetrics-text; version=1.0.0,text/plain;q=0.5", "application/openmetrics-text"),
    ],
)
def test_both_text_formats_parse_and_carry_the_values(accept: str, kind: str) -> None:
    metrics = Metrics()
    metrics.turn_seconds.observe(3.0, outcome="completed", trace_id="a" * 32)
    body, content_type = metrics.render(accept)
    assert content_type.startswith(kind)
    parse = parse_openmetrics if "openmetrics" in kind else parse_text
    found = {sample.name for family in parse(body.decode()) for sample in family.samples}
    assert {"pooled_requests_total", "turn_duration_seconds_bucket", "pool_size"} <= found
    assert not [name for name in found if name.endswith("_created")]


def test_pulled_values_are_read_at_each_scrape_and_a_broken_source_hides_nothing() -> None:
    metrics = Metrics()
    samples = [
        collectors.PoolSample(size=4, capacity=8, waiting=1, by_state={"busy": 3, "spare": 1}, spares={"chat": 1}),
        collectors.PoolSample(size=1, capacity=8, waiting=0, by_state={"idle": 1, "unheard of": 1}),
    ]

    def broken() -> None:
        raise RuntimeError("no")

    metrics.pull("broken", broken)
    metrics.pull("pool", collectors.pool(metrics, lambda: samples.pop(0)))
    metrics.render()
    assert (value(metrics, "pool_size"), value(metrics, "pool_processes", state="busy")) == (4, 3)
    assert value(metrics, "pool_spares", profile="chat") == 1
    metrics.render()
    assert (value(metrics, "pool_size"), value(metrics, "pool_processes", state="busy")) == (1, 0)
    assert value(metrics, "pool_processes", state="other") == 1
    assert value(metrics, "pool_spares", profile="chat") == 0
    assert value(metrics, "metrics_pull_errors_total") == 2


def test_this_process_is_seen_as_the_kernel_sees_it() -> None:
    metrics = Metrics()
    read = collectors.own_process(metrics)
    read()
    before = value(metrics, "process_open_fds"), value(metrics, "process_children")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        read()
        assert value(metrics, "process_open_fds") == (before[0] or 0) + 1
        assert value(metrics, "process_children") == (before[1] or 0) + 1
        child.communicate(b"\n", timeout=20)
    assert (value(metrics, "process_resident_memory_bytes") or 0) > 10 * 2**20
    assert (value(metrics, "process_threads") or 0) >= 1


def test_a_command_name_with_parentheses_does_not_shift_the_fields() -> None:
    stat = "7 (a) b) (c)) S 1 7 7 0 -1 4194560 9 0 0 0 150 50 0 0 20 0 3 0 777 1000 25 " + "0 " * 20
    sample = collectors.parse_stat(stat, ticks=100, page=4096)
    assert (sample.cpu_seconds, sample.threads, sample.start_ticks, sample.resident_bytes) == (2.0, 3, 777, 25 * 4096)


@pytest.mark.anyio
async def test_loop_lag_is_what_a_sleep_took_too_long() -> None:
    class Late(ManualClock):
        def monotonic(self) -> float:
            return super().monotonic() * 1.1  # every second lasts a tenth longer

    clock, seen = Late(), list[float]()
    lag = LoopLag(clock, seen.append, interval=1.0, window=2.0)
    running = asyncio.create_task(lag.run())
    await clock.advance(3.0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert seen == [pytest.approx(0.1)] * 3
    assert lag.worst == lag.last == pytest.approx(0.1)
