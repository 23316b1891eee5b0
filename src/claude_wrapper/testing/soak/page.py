"""The result of a soak as one HTML page with plots in it (SVG, no scripts)."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from claude_wrapper.testing.soak import plan, report
from claude_wrapper.testing.soak.outcomes import Down, Invariant
from claude_wrapper.testing.soak.plots import Axis, Lane, Point, Series, Span, lanes, plot
from claude_wrapper.testing.soak.run import Finished

_BUCKET_SECONDS: Final = 5.0
_CLASSES: Final = {
    "kill server": "killed",
    "kill all servers": "killed",
    "end server": "ended",
    "pause server": "paused",
    "restart database": "database",
    "restart redis": "redis",
    "blob store away": "blobs",
    "disk full": "disk",
}
_CANARY: Final = {"running": "tried", "rolled_back": "back", "promoted": "up"}
_MANY_REPLICAS: Final = 4
"""Colours for their lines."""
_STYLE: Final = """
:root{--ink:#1f2430;--soft:#667085;--line:#e4e7ec;--card:#fff;--page:#f6f7f9;--good:#12805c;--bad:#c0362c;--a:#2563c9;--b:#d9730d;--c:#7a4fc4;--d:#12805c}
@media(prefers-color-scheme:dark){:root{--ink:#e7e9ee;--soft:#9aa3b2;--line:#303642;--card:#1b1f27;--page:#12151b;--good:#3fbf8f;--bad:#ff7a6e;--a:#6fa5ff;--b:#f2a65a;--c:#b79bf2;--d:#3fbf8f}}
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:0 auto;padding:2rem 1.2rem 4rem;color:var(--ink);background:var(--page)}
h1{font-size:1.6rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .7rem}p{color:var(--soft);margin:.3rem 0}
.verdict{display:inline-block;padding:.1rem .7rem;border-radius:1rem;color:#fff;font-size:1rem;vertical-align:middle;margin-left:.5rem}
.verdict.good{background:var(--good)}.verdict.bad{background:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(12rem,1fr));gap:.6rem;margin-top:1.2rem}
.tile,figure,.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem}
.tile{padding:.5rem .8rem}.tile b{display:block;font-size:1.35rem;line-height:1.3;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:.8rem}
table{border-collapse:collapse;width:100%}td{border-top:1px solid var(--line);padding:.35rem .7rem;vertical-align:top;overflow-wrap:anywhere;font-size:.87rem}
tr:first-child td{border-top:0}td:first-child{white-space:nowrap}td.mark{width:1rem;font-weight:700;color:var(--good)}tr.bad td.mark{color:var(--bad)}
tr.bad{background:color-mix(in srgb,var(--bad) 12%,transparent)}.detail{color:var(--soft)}td.name{white-space:normal;width:19rem}
figure{margin:.6rem 0;padding:.6rem .8rem .2rem}figcaption{font-size:.87rem;font-weight:600}
svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}.grid{stroke:var(--line);stroke-width:1}
.key{font-weight:400;color:var(--soft);margin-left:.8rem}.key:before{content:"";display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.3rem;background:var(--at)}
polyline{fill:none;stroke:var(--at);stroke-width:1.6;stroke-linejoin:round}circle{fill:var(--at);fill-opacity:.55}.moment{fill:var(--a)}.brought{fill:var(--b)}
.s0{--at:var(--a)}.s1{--at:var(--b)}.s2{--at:var(--c)}.s3{--at:var(--d)}.good{--at:var(--good)}.failed{--at:var(--bad)}
.shade{fill-opacity:.13}.killed{fill:#d92d20}.ended{fill:#f79009}.paused{fill:#7a5af8}.database{fill:#2e90fa}.redis{fill:#ee46bc}.blobs{fill:#12b76a}.disk{fill:#8c6d46}
.up{fill:var(--good);fill-opacity:.55}.tried{fill:var(--a);fill-opacity:.55}.back{fill:var(--bad);fill-opacity:.6}.broken{fill:#f79009}
"""


def to_html(done: Finished, logs: Sequence[str] = ()) -> str:
    """For people. `logs`: files beside the page that hold what the servers wrote."""
    figures = report.summary(done, logs)
    kept = "".join(f' <a href="{html.escape(name)}">{html.escape(name)}</a>' for name in logs)
    where = f"<p>What the servers wrote:{kept}</p>" if kept else ""
    verdict = '<span class="verdict good">passed</span>' if done.passed else '<span class="verdict bad">failed</span>'
    facts = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{_shown(value)}</td></tr>"
        for name, value in figures.items()
        if name != "invariants" and value not in ([], {})
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Soak: {"passed" if done.passed else "failed"}</title><style>{_STYLE}</style>
<h1>Soak {verdict}</h1><p>Real CLI processes and the scripted upstream; {html.escape(done.surroundings)}; seed {done.settings.seed},
{done.settings.seconds:g} s of load.</p>{where}<div class="tiles">{_tiles(done, figures)}</div>
<h2>What must hold</h2><div class="card"><table>{_invariants(done.invariants)}</table></div>
<h2>Over time</h2><p>Shaded in every plot: when a store or a replica was away; the lanes say which.</p>{_plots(done)}
<h2>Figures</h2><div class="card"><table>{facts}</table></div></html>
"""


def _tiles(done: Finished, figures: dict[str, Any]) -> str:
    held = sum(one.holds for one in done.invariants)
    shown = (
        (f"{held} of {len(done.invariants)}", "invariants hold"),
        (f"{figures['requests']:,}", "requests"),
        (f"{figures['answers_per_second']:g}", "answers a second"),
        (f"{figures['faults']:,}", "faults"),
        (str(figures["server_starts"]), f"starts of {figures['replicas']} replica(s)"),
        (f"{figures['untouched_tenant_seconds']['p50']:.2f} s", "median, untouched tenant"),
        (f"{figures['untouched_tenant_seconds']['p99']:.1f} s", "99th percentile, the same"),
        (f"{figures['most_resident_mb']} MB", "most memory of a replica"),
    )
    return "".join(f'<div class="tile"><b>{html.escape(value)}</b><span>{name}</span></div>' for value, name in shown)


def _invariants(invariants: Iterable[Invariant]) -> str:
    return "".join(
        f'<tr class="{"ok" if one.holds else "bad"}"><td class="mark">{"✓" if one.holds else "✗"}</td>'
        f'<td class="name">{html.escape(one.name)}</td><td class="detail">{html.escape(one.detail.rstrip("; "))}</td></tr>'
        for one in sorted(invariants, key=lambda one: one.holds)
    )


def _plots(done: Finished) -> str:
    record = done.record
    began = record.began
    end = max([one["at"] for one in record.samples] + [1.0])
    axis = Axis(end, [(since, until, _CLASSES.get(kind, "disk")) for since, until, kind in record.outages])
    answered = [one for one in record.outcomes if one.how == "answered"]
    failed = [one for one in record.outcomes if one.how in ("refused", "broken", "lost", "unclear")]

    def waits(*, calm: bool) -> list[Point]:
        return [(one.began - began, one.seconds) for one in answered if one.calm is calm]

    def sampled(name: str, unit: float = 1.0) -> list[Series]:
        replicas = sorted({int(one["replica"]) for one in record.samples})
        return [
            Series(
                f"replica {number}",
                f"s{number % _MANY_REPLICAS}",
                [(one["at"], one[name] / unit) for one in record.samples if one["replica"] == number],
            )
            for number in replicas
        ]

    callers = [(one["at"], one["callers"]) for one in record.samples]
    return "".join(
        (
            lanes("Replicas, and the new version of the CLI", [*_replicas(done, end), *_canary(done, end)], axis),
            lanes("What was broken", _faults(done), axis),
            plot("Load: callers that hold a conversation", [Series("callers", "s0", callers)], axis),
            plot(
                f"Requests a second (mean of {_BUCKET_SECONDS:g} s)",
                [
                    Series("answered", "good", _rate([one.began - began + one.seconds for one in answered], end)),
                    Series("failed", "failed", _rate([one.began - began + one.seconds for one in failed], end)),
                ],
                axis,
            ),
            plot(
                "Seconds until the whole answer (logarithmic)",
                [
                    Series("tenant with faults", "s0", waits(calm=False), dots=True),
                    Series("untouched tenant", "s1", waits(calm=True), dots=True),
                ],
                axis,
                logarithmic=True,
            ),
            plot("Resident memory of each replica, MB", sampled("resident_bytes", 2**20), axis),
            plot("Processes below each replica", sampled("processes"), axis),
            plot("Open descriptors of each replica", sampled("descriptors"), axis),
        )
    )


def _replicas(done: Finished, end: float) -> list[Lane]:
    """When each was up, and why not."""
    record = done.record
    away = sorted([*record.downs, *record.pauses], key=lambda one: one.since)
    return [
        Lane(f"replica {number}", spans=_up([one for one in away if one.replica == number], record.began, end))
        for number in range(len(done.log_files))
    ]


def _up(away: Sequence[Down], began: float, end: float) -> list[Span]:
    spans, since = list[Span](), 0.0
    for one in away:
        spans.append((since, one.since - began, "up"))
        spans.append((one.since - began, one.until - began, _CLASSES.get(one.kind, "killed")))
        since = one.until - began
    return [*spans, (since, end, "up")]


def _canary(done: Finished, end: float) -> list[Lane]:
    """What each replica said of the new version."""
    found = []
    for number in sorted({one.replica for one in done.record.canary}):
        spans = list[Span]()
        mine = [one for one in done.record.canary if one.replica == number]
        for one, after in zip(mine, [*mine[1:], None], strict=True):
            until = after.at - done.record.began if after is not None else end
            kind = _CANARY.get(one.state, "back")
            if spans and spans[-1][2] == kind:
                spans[-1] = (spans[-1][0], until, kind)
            else:
                spans.append((one.at - done.record.began, until, kind))
        found.append(Lane(f"canary on {number}", spans=spans))
    return found


def _faults(done: Finished) -> list[Lane]:
    """A lane for each kind: what was away for a while, what was struck, and what requests brought along."""
    record = done.record
    spans: dict[str, list[Span]] = {}
    for since, until, kind in record.outages:
        spans.setdefault(kind, []).append((since, until, _CLASSES.get(kind, "disk")))
    struck: dict[str, list[float]] = {}
    for at, kind in record.faults:
        if kind not in _CLASSES:
            struck.setdefault(kind, []).append(at)
    brought: dict[str, list[float]] = {}
    for one in record.outcomes:
        if one.kind in plan.FAULTY:
            brought.setdefault(one.kind, []).append(one.began - record.began)
    return [
        *(Lane(kind, spans=found) for kind, found in sorted(spans.items())),
        *(Lane(kind, moments) for kind, moments in sorted(struck.items())),
        *(Lane(kind, moments, style="brought") for kind, moments in sorted(brought.items())),
    ]


def _rate(moments: Sequence[float], end: float) -> list[Point]:
    counts = Counter(int(at // _BUCKET_SECONDS) for at in moments)
    width = _BUCKET_SECONDS
    return [((bucket + 0.5) * width, counts[bucket] / width) for bucket in range(max(1, int(end // width)))]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "<br>".join(f"{html.escape(str(name))}: {html.escape(str(one))}" for name, one in value.items())
    if isinstance(value, list):
        return "<br>".join(html.escape(str(one)) for one in value)
    return html.escape(str(value))
