"""`python -m bench [--quick] [suite …]`: measure, print tables, write `bench/results/<suite>.json`.

Suites: engine, alone, idle, tools, broker, sandbox, limits, sessions, mcp, cache, telemetry, replicas, durability; all of
them when none is named (with `--quick` the first five). `--write-docs` writes `docs/benchmarks.md` and its picture from the
results that are there (after the run, if suites are named).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from rich.console import Console

from bench import alone, clienttools, durability, engine, idle, report, sandbox, scripts
from bench.figures import Findings
from bench.machine import machine, moment
from bench.progress import Progress


async def _with_scene(
    measure: Callable[[engine.Scene], Awaitable[Findings]], options: argparse.Namespace, progress: Progress
) -> Findings:
    async with engine.scene(quick=options.quick, progress=progress, source=options.source) as at:
        return await measure(at)


_SLOW = frozenset({"cache", "durability", "limits", "mcp", "replicas", "sandbox", "sessions", "telemetry"})
"""Not part of a quick run unless they are named."""

Suite = Callable[[argparse.Namespace, Progress], Awaitable[Findings]]

SUITES: Mapping[str, Suite] = {
    "engine": lambda options, progress: _with_scene(engine.measure, options, progress),
    "alone": lambda options, progress: _with_scene(alone.measure, options, progress),
    "idle": lambda options, progress: _with_scene(idle.measure, options, progress),
    "tools": lambda options, progress: _with_scene(clienttools.measure, options, progress),
    "broker": lambda options, _: scripts.broker(quick=options.quick),
    "sandbox": lambda options, progress: sandbox.measure(quick=options.quick, progress=progress),
    "limits": lambda options, _: scripts.limits(quick=options.quick),
    "sessions": lambda options, _: scripts.sessions(quick=options.quick),
    "mcp": lambda options, _: scripts.mcp(quick=options.quick),
    "cache": lambda options, _: scripts.cache(quick=options.quick),
    "telemetry": lambda options, _: scripts.telemetry(quick=options.quick),
    "replicas": lambda options, _: scripts.replicas(quick=options.quick),
    "durability": lambda options, progress: _with_scene(durability.measure, options, progress),
}


async def _run(options: argparse.Namespace, console: Console) -> int:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)  # ends what was started, as Ctrl-C does
    facts = machine()
    console.print(
        f"[bold]{facts['cores']} × {facts['cpu']}[/], {facts['memory_gb']} GB, Python {facts['python']}, "
        f"CLI {facts['cli']}, load {os.getloadavg()[0]:.1f}",
        highlight=False,
    )
    failed = 0
    for name in options.suites:
        now, began = moment(), time.perf_counter()
        with Progress(console) as progress:
            progress.say(name)
            try:
                found = await SUITES[name](options, progress)
            except Exception as error:  # one suite that cannot run does not take the others with it
                console.print_exception(max_frames=4) if options.debug else None
                console.print(f"[red]{name} failed:[/] {type(error).__name__}: {error}", highlight=False, markup=True)
                failed += 1
                continue
        result = {
            "suite": name,
            **now,
            "seconds": round(time.perf_counter() - began, 1),
            "load_after": round(os.getloadavg()[0], 2),
            "quick": options.quick,
            "other_source": options.source is not None,
            "machine": facts,
            "figures": [figure.to_json() for figure in found.figures],
            "raw": found.raw,
        }
        path = report.save(result)
        report.table(console, result)
        console.print(f"[dim]{result['seconds']} s, written to {path}[/]\n", highlight=False)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    names = list(SUITES)
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"of: {', '.join(names)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under 90 seconds, rougher numbers")
    parser.add_argument("--write-docs", action="store_true", help="write docs/benchmarks.md; without suites: only that")
    parser.add_argument("--source", type=Path, help="measure the server of another checkout's src directory")
    parser.add_argument("--debug", action="store_true", help="tracebacks of suites that fail")
    options = parser.parse_args()
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"there is no suite {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    only_docs = options.write_docs and not options.suites
    quick_names = [name for name in names if name not in _SLOW]
    options.suites = options.suites or (quick_names if options.quick else names)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    code = 0
    if not only_docs:
        with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
            code = asyncio.run(_run(options, console))
            if options.write_docs:
                report.write_docs()
            return code
        console.print("stopped; everything that was started has ended")
        return 130
    report.write_docs()
    console.print(f"written: {report.PAGE}, {report.PICTURE}")
    return code


if __name__ == "__main__":
    sys.exit(main())
