"""What telemetry costs on a warm turn: the server's CPU and the turn's time, with everything on and everything off.

`python -m bench.telemetry [--pairs N] [--json]`. One server on the real CLI, one unnamed conversation at a time, its client and the
upstream in processes of their own, so that the CPU that is read is the server's alone. Turns alternate between the two in
pairs (on-off, off-on, …), so that what else the machine does, and the growing history, weigh on both alike; each pair is
one difference. "Off" takes out every watch, counter, span and log line; the server is the same.

A turn is over when its answer, its ledger row and its process's release are done: nothing of one bleeds into the next.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from bench.processes import PATH
from claude_wrapper.api.middleware import RequestContext
from claude_wrapper.app import Server
from claude_wrapper.broker.calls import Observer
from claude_wrapper.cli.serve import serve
from claude_wrapper.config import Settings
from claude_wrapper.sessions.watch import Watch
from claude_wrapper.wire.sse import SSEDecoder

KEY = "sk-cw-bench-only-key"
TURNS = 24
"""Pairs of turns in one conversation; then a new one, so that the history stays short."""
_SETTLE_SECONDS = 0.005
_ROOT = Path(__file__).parents[1]


class _Silent:
    """A watch of requests that does nothing."""

    def request(self, seen: Any, headers: Any) -> _Silent:
        del seen, headers
        return self

    def ended(self, seen: Any) -> None:
        pass

    def routes(self, templates: Any) -> None:
        pass


@dataclass(frozen=True)
class Cost:
    """One turn. Seconds."""

    cpu: float
    wall: float


# The client, in a process of its own -----------------------------------------------------------------------------------


async def client(url: str) -> None:
    """For each line on standard input one turn (`new`: of a new conversation); its seconds go to standard output."""
    history: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(url, headers={"x-api-key": KEY}) as http:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            if line.strip() == "new":
                history = []
            question = {"role": "user", "content": f"[[tokens 50]] number {len(history)}"}
            body = {"model": "claude-sonnet-5-5", "max_tokens": 256, "stream": True, "messages": [*history, question]}
            began = time.perf_counter()
            async with http.post("/v1/messages", json=body) as response:
                answer = await response.read()
            seconds = time.perf_counter() - began
            if b"message_stop" not in answer:
                raise SystemExit(answer.decode())
            said = [json.loads(event.data) for event in SSEDecoder().feed(answer)]
            text = "".join(one["delta"]["text"] for one in said if one["type"] == "content_block_delta")
            history += [question, {"role": "assistant", "content": text}]
            sys.stdout.write(f"{seconds} {response.headers['cw-process']}\n")
            sys.stdout.flush()


# The server, here ------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _child(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *arguments, stdin=pipe, stdout=pipe, env={"PATH": PATH, "PYTHONPATH": str(_ROOT)}
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def measure(pairs: int, directory: Path) -> list[tuple[Cost, Cost]]:
    """(on, off) of each pair."""
    async with _child("claude_wrapper.testing.upstream") as upstream:
        url = (await upstream.stdout.readline()).decode().split()[-1]  # type: ignore[union-attr]
        settings = Settings(
            data_dir=directory / "data",
            port=0,
            admin_key=KEY,
            upstream_url=url,
            anthropic_api_key="sk-ant-scripted",
            log_format="json",
            spares=0,
            agent_spares=0,
            max_turns=10_000,
        )
        stop = asyncio.Event()
        started: asyncio.Future[tuple[str, Server]] = asyncio.get_running_loop().create_future()
        serving = asyncio.ensure_future(
            serve(settings, announce=lambda url, server: started.set_result((url, server)), stop=stop)
        )
        url, server = await started
        async with _child("bench.telemetry", "--client", url) as asking:
            found = await _pairs(pairs, asking, server)
        stop.set()
        await serving
    return found


async def _pairs(pairs: int, asking: asyncio.subprocess.Process, server: Server) -> list[tuple[Cost, Cost]]:
    switch = _switch(server)

    async def turn(*, on: bool, new: bool = False) -> Cost:
        switch(on)
        cpu = time.process_time()
        asking.stdin.write(b"new\n" if new else b"turn\n")  # type: ignore[union-attr]
        said = (await asking.stdout.readline()).split()  # type: ignore[union-attr]
        while server.requests.count or server.telemetry.metrics.turns_in_flight.child({})._value.get() > 0:
            await asyncio.sleep(_SETTLE_SECONDS)
        await asyncio.sleep(_SETTLE_SECONDS * 4)
        if not new and said[1] != b"warm":
            raise SystemExit(f"a turn was {said[1].decode()}, not warm")
        return Cost(time.process_time() - cpu, float(said[0]))

    found: list[tuple[Cost, Cost]] = []
    for number in range(pairs):
        if number % TURNS == 0:
            await turn(on=True, new=True)
            for _ in range(3):
                await turn(on=True)
        order = (True, False) if number % 2 else (False, True)
        costs = {on: await turn(on=on) for on in order}
        found.append((costs[True], costs[False]))
        if number % 25 == 24:
            sys.__stderr__.write(f"telemetry: {number + 1} of {pairs} pairs\n")  # type: ignore[union-attr]
    return found


def _switch(server: Server) -> Callable[[bool], None]:
    """Turns everything on or off, between turns."""
    middleware, means, rooms = _middleware(server), server.broker._means, server.conversations._rooms
    ways = {
        True: (middleware.watch, means.observer, means.gate, means.sink, rooms.watch, "info"),
        False: (_Silent(), Observer(), means.gate._gate, means.sink._ledger, Watch(), "error"),  # type: ignore[attr-defined]
    }

    def switch(on: bool) -> None:
        watch, observer, gate, sink, turns, level = ways[on]
        middleware.watch = watch  # type: ignore[assignment]
        for name, value in (("observer", observer), ("gate", gate), ("sink", sink)):
            object.__setattr__(means, name, value)
        object.__setattr__(rooms, "watch", turns)
        server.telemetry.logs.set_level(level)  # type: ignore[arg-type]

    return switch


def _middleware(server: Server) -> RequestContext:
    layer: Any = (
        server.app.build_middleware_stack() if server.app.middleware_stack is None else server.app.middleware_stack
    )
    server.app.middleware_stack = layer  # the framework makes it at the first request
    while not isinstance(layer, RequestContext):
        layer = layer.app
    return layer


# The result ------------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], *, rounds: int = 2_000, seed: int = 1) -> tuple[float, float, float]:
    """(the middle half's mean, and the 95 % interval of it by resampling). The mean of the middle half: garbage
    collection and other processes make outliers in both directions, which a plain mean would follow."""
    rng = random.Random(seed)

    def middle(some: Sequence[float]) -> float:
        ordered = sorted(some)
        quarter = len(ordered) // 4
        return statistics.fmean(ordered[quarter : len(ordered) - quarter])

    means = sorted(middle(rng.choices(values, k=len(values))) for _ in range(rounds))
    return middle(values), means[int(rounds * 0.025)], means[int(rounds * 0.975)]


def figures(found: Sequence[tuple[Cost, Cost]]) -> dict[str, Any]:
    """Medians without telemetry, and what it adds (mean of the middle half of the differences, with its interval)."""
    cpu, wall = (statistics.median(getattr(off, name) for _, off in found) for name in ("cpu", "wall"))
    more_cpu = interval([on.cpu - off.cpu for on, off in found])
    more_wall = interval([on.wall - off.wall for on, off in found])

    def percent(value: float, whole: float) -> float:
        return round(100 * value / whole, 2)

    return {
        "pairs": len(found),
        "cpu_ms": round(cpu * 1e3, 2),
        "turn_ms": round(wall * 1e3, 2),
        "added_cpu_us": round(more_cpu[0] * 1e6),
        "added_cpu_percent": percent(more_cpu[0], cpu),
        "added_cpu_interval_percent": [percent(one, cpu) for one in more_cpu[1:]],
        "added_cpu_percent_of_time": percent(more_cpu[0], wall),
        "added_time_us": round(more_wall[0] * 1e6),
        "added_time_percent": percent(more_wall[0], wall),
        "added_time_interval_percent": [percent(one, wall) for one in more_wall[1:]],
    }


def told(said: dict[str, Any]) -> str:
    """The figures as text."""
    (cpu_low, cpu_high), (low, high) = said["added_cpu_interval_percent"], said["added_time_interval_percent"]
    return (
        f"{said['pairs']} pairs of warm turns; without telemetry the server takes {said['cpu_ms']} ms of CPU and a turn "
        f"{said['turn_ms']} ms (medians). With it (mean of the middle half of the differences, 95 % interval):\n"
        f"CPU: {said['added_cpu_us']:+} us = {said['added_cpu_percent']:+} % [{cpu_low:+}, {cpu_high:+}] of the server's CPU, "
        f"{said['added_cpu_percent_of_time']:+} % of the turn's time\n"
        f"time: {said['added_time_us']:+} us = {said['added_time_percent']:+} % [{low:+}, {high:+}] of the turn's time\n"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.telemetry", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--client", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        asyncio.run(client(options.client))
        return
    with tempfile.TemporaryDirectory(prefix="cw-bench-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        with contextlib.redirect_stderr(io.StringIO()):  # the log lines are made, and go nowhere
            found = asyncio.run(measure(options.pairs, directory))
    said = figures(found)
    sys.stdout.write(json.dumps(said) + "\n" if options.json else told(said))


if __name__ == "__main__":
    main()
