"""What the shared cache saves on a stated mix: hit rate, tokens, money, and how long callers wait.

`python bench/cache.py [--requests N]` prints one JSON object. The mix, of one organisation that set `cache_answers` to
`deterministic`:

* 50 %: questions at temperature 0 without tools (classification, extraction, frequent questions), 60 different ones,
  popular as in a Zipf distribution with exponent 1.1;
* 25 %: chat at temperature 1, each different: never from the cache;
* 20 %: token counts of 40 different texts, equally distributed;
* 5 %: the model list.

The scripted upstream thinks for 300 ms before an answer and 100 ms before a count. The same requests in the same order
are asked twice, on a server each: with `cw-cache: bypass`, and with the cache. Real CLI, real HTTP, four callers at once.
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
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from claude_wrapper.cli.serve import serve
from claude_wrapper.config import Settings
from claude_wrapper.testing.upstream import ScriptedUpstream

KEY = "sk-cw-bench-only-key"
MODEL = "claude-sonnet-5-5"
QUESTIONS, TEXTS, CALLERS = 60, 40, 4
THINKS, COUNTS = 0.3, 0.1


@dataclass(frozen=True)
class Request:
    """One request of the mix."""

    kind: str
    path: str
    body: dict[str, Any] | None


def mix(count: int, seed: int = 1) -> list[Request]:
    """The requests, in order."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) ** 1.1 for rank in range(QUESTIONS)]
    return [_request(rng, weights, number) for number in range(count)]


def _request(rng: random.Random, weights: Sequence[float], number: int) -> Request:
    draw = rng.random()
    if draw < 0.50:
        question = rng.choices(range(QUESTIONS), weights)[0]
        text = f"[[first {THINKS * 1000:.0f}]] [[say label {question}]] " + f"ticket {question}: " + "it broke. " * 40
        return Request("deterministic", "/v1/messages", _body(text, temperature=0))
    if draw < 0.75:
        text = f"[[first {THINKS * 1000:.0f}]] [[say reply {number}]] " + f"message {number}: " + "tell me more. " * 30
        return Request("chat", "/v1/messages", _body(text, temperature=1))
    if draw < 0.95:
        return Request("count", "/v1/messages/count_tokens", _body(f"text {rng.randrange(TEXTS)} " + "word " * 200))
    return Request("models", "/v1/models", None)


def _body(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 512, "messages": [{"role": "user", "content": text}], **fields}


@contextlib.asynccontextmanager
async def _served(directory: Path) -> AsyncIterator[tuple[aiohttp.ClientSession, ScriptedUpstream]]:
    async with ScriptedUpstream() as upstream:
        upstream.slow_reads = COUNTS
        settings = Settings(
            data_dir=directory / "data",
            port=0,
            admin_key=KEY,
            upstream_url=upstream.url,
            anthropic_api_key="sk-ant-scripted",
            log_level="error",
            spares=CALLERS,
            agent_spares=0,
            max_processes=16,
        )
        stop = asyncio.Event()
        started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = asyncio.ensure_future(
            serve(settings, announce=lambda url, server: started.set_result(url), stop=stop)
        )
        try:
            async with aiohttp.ClientSession(await started, headers={"x-api-key": KEY}) as http:
                yield http, upstream
        finally:
            stop.set()
            await serving


async def _run(http: aiohttp.ClientSession, requests: Sequence[Request], headers: dict[str, str]) -> list[Any]:
    """(request, what the cache said, seconds) in the order of the answers."""
    waiting, done = list(reversed(requests)), []

    async def caller() -> None:
        while waiting:
            request = waiting.pop()
            began = time.perf_counter()
            method = "GET" if request.body is None else "POST"
            async with http.request(method, request.path, json=request.body, headers=headers) as response:
                await response.read()
                if response.status != 200:
                    raise RuntimeError(f"{request.path} was answered {response.status}")
                done.append((request, response.headers.get("cw-cache"), time.perf_counter() - began))

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return done


async def _on_a_server(requests: Sequence[Request], headers: dict[str, str]) -> tuple[list[Any], int, str]:
    """The answers, the calls upstream and the metrics, on a server of its own: its pool is as empty for everybody."""
    with tempfile.TemporaryDirectory(prefix="cw-bench-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        async with _served(directory) as (http, upstream):
            async with http.post("/v1/organizations/policies", json={"cache_answers": "deterministic"}) as response:
                assert response.status == 200
            await _run(http, requests[:CALLERS], {"cw-cache": "bypass"})  # the first turns of processes are slower
            before = len(upstream.requests)
            done = await _run(http, requests, headers)
            async with http.get("/metrics") as response:
                return done, len(upstream.requests) - before, await response.text()


async def measure(count: int) -> dict[str, Any]:
    """The figures, as one JSON object."""
    requests = mix(count)
    without, calls_without, _ = await _on_a_server(requests, {"cw-cache": "bypass"})
    cached, calls_with, metrics = await _on_a_server(requests, {})
    hits = [seconds for _, said, seconds in cached if said == "hit"]
    may = [said for request, said, _ in cached if request.kind != "chat"]
    return {
        "requests": count,
        "mix": {
            kind: sum(one.kind == kind for one in requests) for kind in ("deterministic", "chat", "count", "models")
        },
        "hit_rate": len(hits) / count,
        "hit_rate_of_what_may_hit": may.count("hit") / len(may),
        "upstream_calls_without": calls_without,
        "upstream_calls_with": calls_with,
        "saved_tokens": _metric(metrics, "cache_saved_tokens_total"),
        "saved_dollars": _metric(metrics, "cache_saved_dollars_total"),
        "without_ms": [1000 * seconds for _, _, seconds in without],
        "with_ms": [1000 * seconds for _, _, seconds in cached],
        "answer_hit_ms": [1000 * s for one, said, s in cached if said == "hit" and one.kind == "deterministic"],
        "answer_miss_ms": [1000 * s for one, said, s in cached if said == "miss" and one.kind == "deterministic"],
        "mean_without_ms": 1000 * statistics.fmean(seconds for _, _, seconds in without),
        "mean_with_ms": 1000 * statistics.fmean(seconds for _, _, seconds in cached),
    }


def _metric(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=400)
    options = parser.parse_args()
    with contextlib.redirect_stderr(io.StringIO()):
        found = asyncio.run(measure(options.requests))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
