"""The result of a soak as JSON and as one HTML page with plots in it (SVG, no scripts)."""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from claude_wrapper.testing.soak.run import Finished

_WIDTH: Final = 820
_HEIGHT: Final = 150
_MARGIN: Final = 46
Point = tuple[float, float]


def summary(done: Finished) -> dict[str, Any]:
    """The figures."""
    record = done.record
    answered = [one for one in record.outcomes if one.how == "answered"]
    by_process: dict[str, list[float]] = defaultdict(list)
    for one in answered:
        by_process[one.process or "?"].append(one.seconds)
    planned = sum(one.kind not in ("plain", "streamed", "recall", "tools") for one in record.outcomes)
    return {
        "passed": done.passed,
        "seconds": round(done.seconds, 1),
        "seed": done.settings.seed,
        "callers": done.settings.callers,
        "conversations": record.conversations,
        "requests": len(record.outcomes),
        "faults": planned + len(record.faults),
        "faults_by_kind": dict(
            Counter(kind for _, kind in record.faults)
            + Counter(one.kind for one in record.outcomes if one.kind not in ("plain", "streamed", "recall", "tools"))
        ),
        "outcomes": dict(Counter(one.how for one in record.outcomes)),
        "refusals": dict(Counter(f"{one.status} {one.detail}" for one in record.outcomes if one.how == "refused")),
        "seconds_by_process": {
            kind: {"count": len(values), "p50": _percentile(values, 0.5), "p99": _percentile(values, 0.99)}
            for kind, values in sorted(by_process.items())
        },
        "most_resident_mb": round(max((one["resident_bytes"] for one in record.samples), default=0) / 2**20),
        "invariants": [{"name": one.name, "holds": one.holds, "detail": one.detail} for one in done.invariants],
    }


def to_json(done: Finished) -> bytes:
    """For programs."""
    return msgspec.json.format(msgspec.json.encode(summary(done)), indent=1)


def to_html(done: Finished) -> str:
    """For people."""
    figures, record = summary(done), done.record
    began = record.began
    end = max([one["at"] for one in record.samples] + [1.0])
    marks = [at for at, kind in record.faults if kind.endswith("server")]
    latency = [(one.began - began, one.seconds) for one in record.outcomes if one.how == "answered"]
    plots = [
        _plot("Seconds per answered request", latency, end, marks, dots=True),
        _plot("Answers and failures per second (mean of 10 s)", _rate([one.began - began for one in record.outcomes], end), end, marks),
        _plot("Resident memory of the server, MB", [(one["at"], one["resident_bytes"] / 2**20) for one in record.samples], end, marks),
        _plot("Descriptors of the server", [(one["at"], one["descriptors"]) for one in record.samples], end, marks),
        _plot("Processes below the server", [(one["at"], one["processes"]) for one in record.samples], end, marks),
    ]  # fmt: skip
    rows = "".join(
        f"<tr class={'ok' if one.holds else 'bad'}><td>{'✓' if one.holds else '✗'}</td><td>{html.escape(one.name)}</td>"
        f"<td>{html.escape(one.detail)}</td></tr>"
        for one in done.invariants
    )
    facts = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in figures.items()
        if name != "invariants"
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Soak</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:54rem;margin:2rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse;width:100%}}td{{border-top:1px solid #ddd;padding:.25rem .5rem;vertical-align:top}}
.bad{{background:#fdd}}svg{{width:100%;height:auto}}svg text{{font:11px system-ui;fill:#555}}</style>
<h1>Soak: {"passed" if done.passed else "failed"}</h1><p>Real CLI processes, the scripted upstream, seed {done.settings.seed},
{done.settings.seconds:g} s of load. Grey lines: the server was killed or restarted.</p>
<h2>What must hold</h2><table>{rows}</table><h2>Over time</h2>{"".join(plots)}<h2>Figures</h2><table>{facts}</table></html>
"""


def _rate(moments: Sequence[float], end: float, *, width: float = 10.0) -> list[Point]:
    counts = Counter(int(at // width) for at in moments)
    return [((bucket + 0.5) * width, counts[bucket] / width) for bucket in range(int(end // width))]


def _plot(title: str, points: Sequence[Point], end: float, marks: Sequence[float], *, dots: bool = False) -> str:
    top = max([value for _, value in points] + [1e-9])
    inner = _WIDTH - _MARGIN - 4

    def x(at: float) -> float:
        return _MARGIN + inner * min(1.0, at / end)

    def y(value: float) -> float:
        return 4 + (_HEIGHT - 24) * (1 - value / top)

    lines = "".join(
        f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="4" y2="{_HEIGHT - 20}" stroke="#bbb"/>' for at in marks
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
