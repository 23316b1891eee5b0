"""Results: files, tables on the terminal, and the page that is kept with the project."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import picture

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
PICTURE = PAGE.with_suffix(".svg")

TITLES = {
    "engine": "The engine against the raw CLI",
    "alone": "The server alone, on a stub process",
    "idle": "Idle conversations",
    "tools": "Turns with the caller's own tools",
    "broker": "The broker",
    "sandbox": "The sandbox levels, against none",
    "limits": "Limits, ledger, reports",
    "sessions": "Sessions",
    "mcp": "Calls of MCP tools",
    "cache": "Shared cache",
    "telemetry": "Metrics, logs and spans",
    "replicas": "Several replicas",
    "durability": "Durability",
}


def save(result: dict[str, Any]) -> Path:
    """Write `bench/results/<suite>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{result['suite']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def table(console: Console, result: dict[str, Any]) -> None:
    """One suite. Bars: ours beside the floor's, on one scale per line."""
    rows = result["figures"]
    against = any(row["floor"] for row in rows)
    shown = Table(title=TITLES.get(result["suite"], result["suite"]), title_justify="left", title_style="bold")
    shown.add_column("", min_width=34)
    shown.add_column("ours", justify="right")
    shown.add_column("p95", justify="right", style="dim")
    if against:
        shown.add_column("floor", justify="right")
        shown.add_column("p95", justify="right", style="dim")
        shown.add_column("ours / floor", no_wrap=True)
    shown.add_column("compared", justify="right")
    shown.add_column("target", justify="right")
    for row in rows:
        cells = [row["name"], _median(row, "ours"), _number((row["ours"] or {}).get("p95"), "")]
        if against:
            cells += [_median(row, "floor"), _number((row["floor"] or {}).get("p95"), ""), _bars(row)]
        verdict = {True: "green", False: "red", None: ""}[row["met"]]
        cells += [f"[{verdict}]{_compared(row)}[/]" if verdict else _compared(row), _target(row)]
        shown.add_row(*cells)
    console.print(shown)
    for row in rows:
        if row["note"]:
            console.print(f"  [dim]{row['name']}: {row['note']}[/]", highlight=False)
    console.print()


def write_docs() -> None:
    """`docs/benchmarks.md` and its picture, from the JSON of the last run of every suite. What the page says of suites
    without results here stays, with its date.

    Raises FileNotFoundError when there are no results.
    """
    results = [
        json.loads(path.read_text(encoding="utf-8")) for name in TITLES if (path := RESULTS / f"{name}.json").exists()
    ]
    if not results:
        raise FileNotFoundError(f"there are no results in {RESULTS}; run `make bench` first")
    before = PAGE.read_text(encoding="utf-8").split("\n## ")[1:] if PAGE.exists() else []
    kept = {section.partition("\n")[0]: section for section in before}
    PAGE.write_text(_page(results, kept), encoding="utf-8")
    bars = [_bar(row) for result in results if result["suite"] == "engine" for row in result["figures"] if row["floor"]]
    if bars:
        PICTURE.write_text(picture.ratios(bars, "The engine against the raw CLI (1 = the raw CLI)"), encoding="utf-8")


def _bar(row: dict[str, Any]) -> picture.Bar:
    ours, floor = row["ours"]["median"], row["floor"]["median"]
    told = f"{_number(ours, row['unit'])} against {_number(floor, row['unit'])}"
    return picture.Bar(row["name"], ours / floor, told, more_is_better=row["compare"] == "rate")


def _page(results: Sequence[dict[str, Any]], kept: Mapping[str, str]) -> str:
    """`kept`: sections that the page had, by their titles."""
    machine = results[0]["machine"]
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m bench --write-docs` from the results of `make bench`; do not edit.",
        "",
        (
            f"Machine: {machine['cores']} × {machine['cpu']}, {machine['memory_gb']:.0f} GB, {machine['system']}, "
            f"Linux {machine['kernel']}, Python {machine['python']}, Claude CLI {machine['cli']}."
        ),
        "",
        (
            "The model is a scripted one on the same machine, which answers at once: what is measured is what the product "
            "adds. The *floor* is the same CLI driven over stdin with no server, sandbox or broker, measured in the same run "
            "in turn with ours. On another machine the milliseconds differ and the ratios hardly do."
        ),
        "",
        f"![Ours against the raw CLI]({PICTURE.name})",
    ]
    measured = {result["suite"]: result for result in results}
    for suite, title in TITLES.items():
        if suite in measured:
            lines += ["", *_section(measured[suite])]
        elif title in kept:
            lines += ["", "## " + kept[title].rstrip()]
    return "\n".join(lines) + "\n"


def _section(result: dict[str, Any]) -> list[str]:
    lines = [f"## {TITLES[result['suite']]}", "", _circumstances(result), "", *_rows(result)]
    notes = [f"* {row['name']}: {row['note']}." for row in result["figures"] if row["note"]]
    return [*lines, "", *notes] if notes else lines


def _circumstances(result: dict[str, Any]) -> str:
    sandbox = result["raw"].get("sandbox")
    return (
        f"{result['date']}, {'quick run' if result['quick'] else 'full run'} of {result['seconds']:.0f} s, "
        f"load average {result['load'][0]:g} before and {result.get('load_after', 0):g} after it"
        + (f", sandbox `{sandbox}`" if sandbox else "")
        + (", **not of this checkout: a changed copy was measured**" if result.get("other_source") else "")
        + ". Medians [p95]."
    )


def _rows(result: dict[str, Any]) -> list[str]:
    rows = result["figures"]
    if not any(row["floor"] for row in rows):
        lines = ["| | measured | target | |", "|---|---:|---:|---|"]
        return lines + [f"| {row['name']} | {_cell(row, 'ours')} | {_target(row)} | {_verdict(row)} |" for row in rows]
    lines = ["| | ours | floor | compared | target | |", "|---|---:|---:|---:|---:|---|"]
    return lines + [
        f"| {row['name']} | {_cell(row, 'ours')} | {_cell(row, 'floor')} | {_compared(row)} | {_target(row)} | {_verdict(row)} |"
        for row in rows
    ]


def _verdict(row: dict[str, Any]) -> str:
    return {True: "met", False: "**not met**", None: ""}[row["met"]]


def _cell(row: dict[str, Any], side: str) -> str:
    values = row[side]
    if values is None:
        return ""
    several = len(values["samples"]) > 1
    return _number(values["median"], row["unit"]) + (f" [{_number(values['p95'], '')}]" if several else "")


def _median(row: dict[str, Any], side: str) -> str:
    return _number(row[side]["median"], row["unit"]) if row[side] else ""


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    digits = 0 if abs(value) >= 200 else 1 if abs(value) >= 10 else 2
    text = f"{value:,.{digits}f}"
    return f"{text} {unit}".rstrip()


def _compared(row: dict[str, Any]) -> str:
    value = row["compared"]
    if value is None or row["compare"] == "none":
        return ""
    return f"{value:+.2f} {row['unit']}" if row["compare"] == "added" else f"{value:.2f} ×"


def _target(row: dict[str, Any]) -> str:
    if row["target"] is None:
        return ""
    sign = "≥" if row["compare"] == "rate" else "≤"
    unit = {"added": f" {row['unit']}", "none": f" {row['unit']}"}.get(row["compare"], " ×")
    return f"{sign} {row['target']:g}{unit}".rstrip()


def _bars(row: dict[str, Any]) -> str:
    """Two bars on one scale."""
    if not row["floor"]:
        return ""
    ours, floor = row["ours"]["median"], row["floor"]["median"]
    width = 16 / max(ours, floor, 1e-9)
    return f"[cyan]{'█' * max(1, round(ours * width))}[/]\n[dim]{'█' * max(1, round(floor * width))}[/]"
