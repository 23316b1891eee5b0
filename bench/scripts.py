"""The measurements that are scripts of their own: run as processes, their JSON turned into figures."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.figures import Compare, Figure, Findings
from bench.processes import PATH, end_group, scratch

_ROOT = Path(__file__).parents[1]
_SECONDS = 240.0


async def run(script: str, arguments: Sequence[str], *, seconds: float = _SECONDS) -> dict[str, Any]:
    """The JSON object that `bench.<script>` prints within so many seconds. Its process group is gone at the end."""
    async with scratch() as directory:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"bench.{script}",
            *arguments,
            env={
                "PATH": PATH,
                "PYTHONPATH": str(_ROOT),
                "LANG": "C.UTF-8",
                "HOME": str(directory),
                "TMPDIR": str(directory),
            },
            cwd=directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(seconds):
                out, errors = await process.communicate()
        finally:
            end_group(process.pid, signal.SIGKILL)
            if process.returncode is None:
                await process.wait()
        if process.returncode != 0:
            raise RuntimeError(
                f"bench.{script} failed ({process.returncode}): {errors.decode(errors='replace')[-1500:]}"
            )
        return dict(json.loads(out))


async def broker(*, quick: bool) -> Findings:
    """`bench/broker.py`: added latency per call, CPU per streamed event."""
    arguments = ["--calls", "150", "--seconds", "2"] if quick else ["--calls", "600", "--seconds", "4"]
    raw = await run("broker", arguments)
    calls = [name for name in raw if name.startswith("call_")]
    figures = [
        Figure(
            f"added per call of {name.split('_')[2]} bytes, {point}",
            "ms",
            [raw[name][f"added_{point}_ms"]],
            target=most,
        )
        for name in calls
        for point, most in (("p50", 1.0), ("p99", 3.0))
    ]
    figures += [
        Figure(f"added delay of an event, {point}", "ms", [raw["event_delay"][f"added_{point}_ms"]])
        for point in ("p50", "p99")
    ]
    figures += [
        Figure(
            "CPU per streamed event",
            "µs",
            [raw["cpu_us_per_event"]],
            note=f"{raw['events_per_second']} events a second",
        ),
        Figure("CPU per call", "µs", [raw["cpu_us_per_call"]]),
        Figure("calls a second, 8 at once", "/s", [raw["calls_per_second_8_parallel"]]),
    ]
    return Findings(figures, {"output": raw})


async def limits(*, quick: bool) -> Findings:
    """`bench/limits.py`: admission, reservations, the ledger, reports."""
    return _plain(await run("limits", ["--rows", "50000" if quick else "200000"]))


async def sessions(*, quick: bool) -> Findings:
    """`bench/sessions.py`: whatever it prints."""
    return _plain(await run("sessions", ["--quick"] if quick else []))


async def mcp(*, quick: bool) -> Findings:
    """`bench/mcp.py`: a call of an MCP tool through the broker against a direct one, and one whose result is kept."""
    raw = await run("mcp", ["--calls", "200" if quick else "1000"])
    figures = []
    for name, found in raw.items():
        size = name.split("_")[1]
        for point in ("p50", "p99"):
            ours, floor = [found[f"broker_{point}_ms"]], [found[f"direct_{point}_ms"]]
            target = 1.0 if point == "p50" else None
            figures.append(
                Figure(f"call with {size} bytes, {point}", "ms", ours, floor, Compare.ADDED, target, "floor: direct")
            )
        figures.append(Figure(f"kept result of {size} bytes, p50", "ms", [found["kept_p50_ms"]]))
    return Findings(figures, {"output": raw})


async def cache(*, quick: bool) -> Findings:
    """`bench/cache.py`: what the shared cache saves on a stated mix."""
    raw = await run("cache", ["--requests", "60" if quick else "400"])
    mix = ", ".join(f"{count} {kind}" for kind, count in raw["mix"].items())
    figures = [
        Figure("requests that were answered from the cache", "%", [100 * raw["hit_rate"]], note=mix),
        Figure(
            "of those that may be answered from it at all", "%", [100 * raw["hit_rate_of_what_may_hit"]], note="no chat"
        ),
        Figure(
            "calls upstream, with the cache beside without",
            "",
            [raw["upstream_calls_with"]],
            [raw["upstream_calls_without"]],
        ),
        Figure("tokens saved", "", [raw["saved_tokens"]]),
        Figure("money saved", "$", [raw["saved_dollars"]]),
        Figure(
            "time of a request, with the cache beside without", "ms", raw["with_ms"], raw["without_ms"], Compare.RATIO
        ),
        Figure("time of an answer, hit beside miss", "ms", raw["answer_hit_ms"], raw["answer_miss_ms"], Compare.RATIO),
    ]
    return Findings(figures, {"output": raw})


async def replicas(*, quick: bool) -> Findings:
    """`bench/replicas.py`: a forwarded turn against a direct one, and takeover after SIGKILL of the holder."""
    arguments = ["--turns", "8", "--kills", "1", "--lease", "2"] if quick else []
    raw = await run("replicas", arguments)
    lease = raw["lease_seconds"]
    taken = [one["taken_seconds"] for one in raw["takeovers"]]
    answered = [one["answered_seconds"] for one in raw["takeovers"]]
    figures = [
        Figure("a turn through the other replica", "ms", raw["forwarded_ms"], raw["direct_ms"], Compare.ADDED),
        Figure("holder killed to session taken over", "s", taken, target=1.5 * lease, note=f"lease {lease:g} s"),
        Figure("holder killed to its turn answered", "s", answered, note=f"lease {lease:g} s"),
    ]
    return Findings(figures, {"output": raw})


async def telemetry(*, quick: bool) -> Findings:
    """`bench/telemetry.py`: what metrics, logs and spans add to a warm turn."""
    raw = await run("telemetry", ["--json", "--pairs", "60" if quick else "300"], seconds=600)
    low, high = raw["added_time_interval_percent"]
    figures = [
        Figure(
            "added to a warm turn's time",
            "%",
            [raw["added_time_percent"]],
            target=2.0,
            note=f"of {raw['turn_ms']:.1f} ms, {raw['pairs']} pairs, 95 % interval {low:+.2f} to {high:+.2f} %",
        ),
        Figure("CPU added, of the turn's time", "%", [raw["added_cpu_percent_of_time"]]),
        Figure(
            "CPU added, of the server's CPU", "%", [raw["added_cpu_percent"]], note=f"of {raw['cpu_ms']:.2f} ms a turn"
        ),
    ]
    return Findings(figures, {"output": raw})


def _plain(raw: dict[str, Any]) -> Findings:
    """Every number of nested JSON as a figure; the unit is the end of its name."""
    figures = [Figure(name, unit, [value]) for name, unit, value in _numbers(raw, ())]
    return Findings(figures, {"output": raw})


_COUNTS = {"rows", "hourly_rows", "lines"}
"""What was measured, not how much it took."""
_UNITS = {"us": "µs", "ms": "ms", "s": "s", "mb": "MB", "bytes": "B"}


def _numbers(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str, float]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, (*path, str(name)))
    elif path and path[-1] in _COUNTS:
        return
    elif isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
        *words, last = path[-1].split("_")
        unit = _UNITS.get(last, "")
        leaf = " ".join(words) if unit else path[-1].replace("_", " ")
        yield (
            ": ".join(part for part in (*(one.replace("_", " ") for one in path[:-1]), leaf) if part),
            unit,
            float(value),
        )
