"""Each alert fires when it should and not before, as Prometheus itself judges it (`promtool test rules`, virtual time)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from telemetry_expressions import DEPLOY, rules

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed"
)

RULES = DEPLOY / "prometheus/alerts.yml"
WHERE = 'job="claude-wrapper",instance="a"'
HOURS_8 = 480

Series = dict[str, str]
"""Selector to values, one a minute, in promtool's notation (`start+step x times`)."""


def of(name: str, values: str, **labels: str) -> Series:
    more = "".join(f',{label}="{value}"' for label, value in labels.items())
    return {f"{name}{{{WHERE}{more}}}": values}


def buckets(name: str, within: str, all_of_them: str, *, le: str = "5", above: str = "10", **labels: str) -> Series:
    """A histogram: how many were within one bound, and how many there were, all of them within the bound above."""
    return (
        of(f"{name}_bucket", within, le=le, **labels)
        | of(f"{name}_bucket", all_of_them, le=above, **labels)
        | of(f"{name}_bucket", all_of_them, le="+Inf", **labels)
    )


FIRING: dict[str, Series] = {
    "ClaudeWrapperDown": of("up", "1 0x30"),
    "PoolNearItsBound": of("pool_size", "10x30") | of("pool_capacity", "10x30") | of("pool_waiting", "2x30"),
    "ClaimsRefused": of("pool_claim_failures_total", "0+60x30", reason="overloaded"),
    "SpawnsFail": of("process_spawn_failures_total", "0+1x30", profile="chat"),
    "RequestsSlow": buckets("request_duration_seconds", "0+1x30", "0+10x30", route="/v1/messages"),
    "FirstTokensSlow": buckets("turn_first_token_seconds", "0+1x30", "0+10x30", kind="cold"),
    "RequestsFail": of("pooled_requests_total", "0+10x30", status="500")
    | of("pooled_requests_total", "0+10x30", status="200"),
    "ProcessesCrash": of("pool_evictions_total", "0+1x30", reason="crashed"),
    "BreakerOpen": of("upstream_breakers", "1x30", state="open", provider="anthropic"),
    "BudgetNearCap": of("budget_alerts_total", "0x10 1x20", share="0.8"),
    "SnapshotsFail": of("snapshots_total", "0+1x30", step="save", outcome="error"),
    "LedgerBehind": of("ledger_rows_pending", "20000x30"),
    "LeasesLost": of("lease_steps_total", "0+1x30", step="lost"),
    "EventLoopLags": buckets("event_loop_lag_seconds", "0+1x30", "0+10x30", le="0.25", above="0.5"),
    "CanaryTakenBack": of("cli_canary", "1x30", state="rolled_back"),
    "UpstreamRetriesSpent": of("upstream_retries_refused_total", "0+1x30"),
    "DescriptorsNearLimit": of("process_open_fds", "900x30") | of("process_max_fds", "1000x30"),
    "LeakSuspected": of("process_open_fds", f"100+1x{HOURS_8}")
    | of("requests_in_flight", f"0x{HOURS_8}", dialect="anthropic"),
    "MetricsIncomplete": of("log_lines_dropped_total", "0+1x30"),
    "HealthCheckFails": of("health_check", "0x30", check="database"),
}
"""What makes each of them fire within half an hour; a leak within eight."""

CALM: Series = (
    of("up", f"1x{HOURS_8}")
    | of("pool_size", f"4x{HOURS_8}")
    | of("pool_capacity", f"16x{HOURS_8}")
    | of("pool_waiting", f"0x{HOURS_8}")
    | of("pool_claim_failures_total", f"0+60x{HOURS_8}", reason="cancelled")
    | of("process_spawn_failures_total", f"0x{HOURS_8}", profile="chat")
    | buckets("request_duration_seconds", f"0+10x{HOURS_8}", f"0+10x{HOURS_8}", route="/v1/messages")
    | buckets("turn_first_token_seconds", f"0+10x{HOURS_8}", f"0+10x{HOURS_8}", kind="warm")
    | of("pooled_requests_total", f"0+60x{HOURS_8}", status="200")
    | of("pooled_requests_total", f"0+60x{HOURS_8}", status="529")
    | of("pool_evictions_total", f"0+5x{HOURS_8}", reason="idle")
    | of("upstream_breakers", f"0x{HOURS_8}", state="open", provider="anthropic")
    | of("budget_alerts_total", f"0x{HOURS_8}", share="0.8")
    | of("snapshots_total", f"0+9x{HOURS_8}", step="save", outcome="ok")
    | of("ledger_rows_pending", f"3x{HOURS_8}")
    | of("lease_steps_total", f"0+9x{HOURS_8}", step="renewed")
    | buckets("event_loop_lag_seconds", f"0+10x{HOURS_8}", f"0+10x{HOURS_8}", le="0.25", above="0.5")
    | of("cli_canary", f"1x{HOURS_8}", state="promoted")
    | of("upstream_retries_refused_total", f"0x{HOURS_8}")
    | of("process_open_fds", f"100x{HOURS_8}")
    | of("process_max_fds", f"1000x{HOURS_8}")
    | of("process_children", f"4x{HOURS_8}")
    | of("requests_in_flight", f"2x{HOURS_8}", dialect="anthropic")
    | of("process_resident_memory_bytes", f"200000000x{HOURS_8}")
    | of("log_lines_dropped_total", f"0x{HOURS_8}")
    | of("health_check", f"1x{HOURS_8}", check="database")
)
"""A server that works, under load."""


def judge(tmp_path: Path, series: Series, tests: list[dict[str, Any]]) -> None:
    """Let promtool say whether exactly the expected alerts fire. Raises AssertionError with what it got instead."""
    case = {
        "interval": "1m",
        "input_series": [{"series": selector, "values": values} for selector, values in series.items()],
        "alert_rule_test": tests,
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [case]}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def quiet(alert: str, after: str) -> dict[str, Any]:
    """That this alert does not fire then."""
    return {"alertname": alert, "eval_time": after, "exp_alerts": []}


@pytest.mark.parametrize("alert", [rule["alert"] for rule in rules()])
def test_an_alert_fires(tmp_path: Path, alert: str) -> None:
    after = "8h" if alert == "LeakSuspected" else "25m"
    with pytest.raises(AssertionError, match=f"alertname: {alert}"):
        judge(tmp_path, FIRING[alert], [quiet(alert, after)])  # promtool tells of the one that it got instead


def test_none_fires_while_all_is_well(tmp_path: Path) -> None:
    judge(tmp_path, CALM, [quiet(rule["alert"], after) for rule in rules() for after in ("20m", "8h")])


def test_what_lasts_for_a_moment_wakes_nobody(tmp_path: Path) -> None:
    waits = [rule["alert"] for rule in rules() if rule.get("for") not in (None, "1m")]
    for alert in waits:
        judge(tmp_path, FIRING[alert], [quiet(alert, "1m")])


def test_the_rules_are_valid_for_prometheus() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
