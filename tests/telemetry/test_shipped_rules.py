"""The dashboard and the alert rules use only series and label values that exist, and show numbers for a real scrape."""

from __future__ import annotations

import re

import pytest

from claude_wrapper.telemetry.metrics import Metrics
from telemetry_expressions import BY_PROMETHEUS, dashboard, expressions, rules, series_of


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_every_series_exists_and_every_label_value_can_occur(where: str, expression: str) -> None:
    declared = {name: one for one in Metrics().declarations for name in one.series()}
    outside_braces = re.sub(r"\"[^\"]*\"", lambda quoted: quoted[0].replace("}", ""), expression)
    selectors = series_of(outside_braces)
    assert selectors, where
    for name, braces in selectors:
        if name in BY_PROMETHEUS:
            continue
        assert name in declared, f"{where}: no metric {name}"
        labels = {**declared[name].labels, "job": (), "instance": ()}
        for label, operator, wanted in re.findall(r"(\w+)\s*(=~|!~|!=|=)\s*\"([^\"]*)\"", braces):
            assert label in labels, f"{where}: {name} has no label {label}"
            if label in ("job", "instance"):
                continue
            values = wanted.split("|") if "~" in operator else [wanted]
            known = labels[label]
            assert all(any(re.fullmatch(one, value) for value in known) for one in values), f"{where}: {wanted}"


def test_every_grouping_label_belongs_to_the_series_it_groups() -> None:
    declared = {name: one for one in Metrics().declarations for name in one.series()}
    for where, expression in expressions():
        grouped = re.findall(r"by \(([^)]*)\)\s*\((?:[a-z_]+\()*([a-z_]+)[{\[]", expression)
        for labels, name in grouped:
            known = {*declared[name].labels, "le", "instance", "job"}
            assert set(re.split(r",\s*", labels)) <= known, where


def test_the_alerts_that_an_operator_needs_are_there() -> None:
    names = {rule["alert"] for rule in rules()}
    assert {
        "PoolNearItsBound", "RequestsSlow", "BreakerOpen", "BudgetNearCap", "SnapshotsFail", "LeakSuspected",
    } <= names  # fmt: skip
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in rules())


def test_every_panel_has_data_in_a_scrape_of_a_server_that_worked() -> None:
    metrics = Metrics(models=["claude-a"], routes=["/v1/messages"])
    metrics.request_seconds.observe(1, route="/v1/messages")
    metrics.requests.inc(route="/v1/messages", status="200", dialect="anthropic")
    scraped = metrics.render()[0].decode()
    samples = {line.split("{")[0].split(" ")[0] for line in scraped.splitlines() if not line.startswith("#")}
    for where, expression in expressions():
        for name, _ in series_of(expression):
            assert name in samples | BY_PROMETHEUS | {"health_check"}, f"{where}: {name} has no sample"


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
