"""The result of a soak as text, as JSON and as one HTML page with plots in it (SVG, no scripts)."""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from claude_wrapper.testing.soak import plan
from claude_wrapper.testing.soak.run import Finished

_WIDTH: Final = 820
_HEIGHT: Final = 150
_MARGIN: Final = 46
_SHADES: Final = {
    "kill server": "#f2b8b5",
    "end server": "#f7dcae",
    "restart database": "#b9d4f5",
    "restart redis": "#d3c5ee",
    "blob store away": "#bfe3cf",
    "disk full": "#ddd6cf",
}
Point = tuple[float, float]


def summary(done: Finished) -> dict[str, Any]:
    """The figures."""
    record = done.record
    answered = [one for one in record.outcomes if one.how == "answered"]
    by_process: dict[str, list[float]] = defaultdict(list)
    for one in answered:
        by_process[one.process or "no process"].append(one.seconds)
    brought = Counter(one.kind for one in record.outcomes if one.kind in plan.FAULTY)
    return {
        "passed": done.passed,
        "seconds": round(done.seconds, 1),
        "load_seconds": done.settings.seconds,
        "seed": done.settings.seed,
        "surroundings": done.surroundings,
        "not_done_here": record.skipped,
        "callers_at_most": done.settings.callers,
        "conversations": record.conversations.total(),
        "conversations_by_door": dict(record.conversations),
        "streams_followed": len(record.followed),
        "requests": len(record.outcomes),
        "faults": record.fault_count,
        "faults_by_kind": dict((Counter(kind for _, kind in record.faults) + brought).most_common()),
        "outcomes": dict(Counter(one.how for one in record.outcomes).most_common()),
        "refusals": dict(
            Counter(f"{one.status} {one.detail}" for one in record.outcomes if one.how == "refused").most_common()
        ),
        "broken": dict(Counter(one.detail for one in record.outcomes if one.how == "broken").most_common()),
        "seconds_by_process": {
            kind: {"count": len(values), "p50": _percentile(values, 0.5), "p99": _percentile(values, 0.99)}
            for kind, values in sorted(by_process.items())
        },
        "most_resident_mb": round(max((one["resident_bytes"] for one in record.samples), default=0) / 2**20),
        "server_starts": len(record.downs) + 1,
        "log": dict(done.log.counts.most_common()),
        "log_errors": done.log.errors,
        "invariants": [{"name": one.name, "holds": one.holds, "detail": one.detail} for one in done.invariants],
    }


def to_json(done: Finished) -> bytes:
    """For programs."""
    return msgspec.json.format(msgspec.json.encode(summary(done)), indent=1)


def to_text(done: Finished) -> str:
    """For a terminal."""
    figures = summary(done)
    lines = [f"{'✓' if one.holds else '✗'} {one.name}: {one.detail}" for one in done.invariants]
    shown = ("conversations", "requests", "faults", "faults_by_kind", "outcomes", "refusals", "server_starts", "log")
    lines += [f"  {name}: {figures[name]}" for name in shown]
    lines.append("passed" if done.passed else "FAILED")
    return "\n".join(lines) + "\n"


def to_html(done: Finished) -> str:
    """For people."""
    figures, record = summary(done), done.record
    began = record.began
    end = max([one["at"] for one in record.samples] + [1.0])
    answered = [one for one in record.outcomes if one.how == "answered"]
    ok = [(one.began - began, one.seconds) for one in answered if not one.calm]
    calm = [(one.began - began, one.seconds) for one in answered if one.calm]
    failed = [one.began - began for one in record.outcomes if one.how in ("refused", "broken", "lost", "unclear")]
    samples = record.samples
    plots = [
        _plot("Seconds per answered request, tenant without faults of its own", calm, end, record.outages, dots=True),
        _plot("Seconds per answered request, tenant with faults", ok, end, record.outages, dots=True),
        _plot("Answers per second (mean of 10 s)", _rate([one.began - began for one in answered], end), end, record.outages),
        _plot("Clear failures per second (mean of 10 s)", _rate(failed, end), end, record.outages),
        _plot("Faults per second (mean of 10 s)", _rate(_fault_moments(done), end), end, record.outages),
        _plot("Callers", [(one["at"], one["callers"]) for one in samples], end, record.outages),
        _plot("Resident memory of the server, MB", [(one["at"], one["resident_bytes"] / 2**20) for one in samples], end, record.outages),
        _plot("Descriptors of the server", [(one["at"], one["descriptors"]) for one in samples], end, record.outages),
        _plot("Processes below the server", [(one["at"], one["processes"]) for one in samples], end, record.outages),
    ]  # fmt: skip
    rows = "".join(
        f"<tr class={'ok' if one.holds else 'bad'}><td>{'✓' if one.holds else '✗'}</td><td>{html.escape(one.name)}</td>"
        f"<td>{html.escape(one.detail)}</td></tr>"
        for one in done.invariants
    )
    facts = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{_shown(value)}</td></tr>"
        for name, value in figures.items()
        if name != "invariants" and value != []
    )
    legend = " ".join(
        f'<span style="background:{colour}">&nbsp;{html.escape(kind)}&nbsp;</span>' for kind, colour in _SHADES.items()
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Soak</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:54rem;margin:2rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse;width:100%}}td{{border-top:1px solid #ddd;padding:.25rem .5rem;vertical-align:top;overflow-wrap:anywhere}}
.bad{{background:#fdd}}svg{{width:100%;height:auto}}svg text{{font:11px system-ui;fill:#555}}</style>
<h1>Soak: {"passed" if done.passed else "failed"}</h1><p>Real CLI processes and the scripted upstream; {html.escape(done.surroundings)};
seed {done.settings.seed}, {done.settings.seconds:g} s of load, {figures["conversations"]} conversations, {figures["requests"]} requests,
{figures["faults"]} faults.</p><h2>What must hold</h2><table>{rows}</table><h2>Over time</h2><p>Shaded: {legend}</p>{"".join(plots)}
<h2>Figures</h2><table>{facts}</table></html>
"""


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "<br>".join(f"{html.escape(str(name))}: {html.escape(str(one))}" for name, one in value.items())
    if isinstance(value, list):
        return "<br>".join(html.escape(str(one)) for one in value)
    return html.escape(str(value))


def _fault_moments(done: Finished) -> list[float]:
    record = done.record
    brought = [one.began - record.began for one in record.outcomes if one.kind in plan.FAULTY]
    return [at for at, _ in record.faults] + brought


def _rate(moments: Sequence[float], end: float, *, width: float = 10.0) -> list[Point]:
    counts = Counter(int(at // width) for at in moments)
    return [((bucket + 0.5) * width, counts[bucket] / width) for bucket in range(int(end // width))]


def _plot(
    title: str, points: Sequence[Point], end: float, outages: Sequence[tuple[float, float, str]], *, dots: bool = False
) -> str:
    top = max([value for _, value in points] + [1e-9])
    inner = _WIDTH - _MARGIN - 4

    def x(at: float) -> float:
        return _MARGIN + inner * min(1.0, at / end)

    def y(value: float) -> float:
        return 4 + (_HEIGHT - 24) * (1 - value / top)

    lines = "".join(
        f'<rect x="{x(since):.1f}" width="{max(1.5, x(until) - x(since)):.1f}" y="4" height="{_HEIGHT - 24}" '
        f'fill="{_SHADES.get(kind, "#eee")}"/>'
        for since, until, kind in outages
    )
    if dots:
        drawn = "".join(f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="1.3" fill="#2a6"/>' for at, value in points)
    else:
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
        drawn = f'<polyline points="{path}" fill="none" stroke="#26a" stroke-width="1.5"/>'
    labels = "".join(
        f'<text x="{_MARGIN - 4}" y="{y(share * top) + 4:.1f}" text-anchor="end">{share * top:.3g}</text>'
        for share in (0, 0.5, 1)
    ) + "".join(
        f'<text x="{x(share * end):.1f}" y="{_HEIGHT - 6}" text-anchor="{"end" if share == 1 else "start"}">{share * end:.0f} s</text>'
        for share in (0, 0.5, 1)
    )
    return f'<h3>{html.escape(title)}</h3><svg viewBox="0 0 {_WIDTH} {_HEIGHT}">{lines}{drawn}{labels}</svg>'


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 3) if ordered else 0.0
