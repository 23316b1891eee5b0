"""What telemetry costs on a warm turn: the server's own CPU and the turn's time, with everything on and everything off.

`python -m bench.telemetry`. One process, one conversation, turns in blocks that alternate between the two, so that what
else the machine does weighs on both. "Off" takes the watches out; the server is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from claude_wrapper.api.middleware import RequestContext
from claude_wrapper.app import Server
from claude_wrapper.app.telemetry import Telemetry
from claude_wrapper.broker.calls import Observer
from claude_wrapper.cli.serve import serve
from claude_wrapper.config import Settings
from claude_wrapper.sessions.watch import Watch
from claude_wrapper.testing.upstream import ScriptedUpstream

KEY = "sk-cw-bench-only-key"
BLOCKS, TURNS = 12, 25


class _Silent:
    """A watch of requests that does nothing."""

    def request(self, seen: Any, headers: Any) -> _Silent:
        del seen, headers
        return self

    def ended(self, seen: Any) -> None:
        pass

    def routes(self, templates: Any) -> None:
        pass


async def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="cw-bench-") as name, contextlib.redirect_stderr(io.StringIO()):
        directory = Path(name)
        directory.chmod(0o711)
        async with ScriptedUpstream() as upstream:
            settings = Settings(
                data_dir=directory / "data",
                port=0,
                admin_key=KEY,
                upstream_url=upstream.url,
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
            async with aiohttp.ClientSession(url, headers={"x-api-key": KEY}) as http:
                figures = await _measure(http, server)
            stop.set()
            await serving
    _show(figures)


async def _measure(http: aiohttp.ClientSession, server: Server) -> dict[str, list[tuple[float, float]]]:
    telemetry: Telemetry = server.telemetry
    history: list[dict[str, Any]] = []
    for _ in range(10):
        await _turn(http, history)
    middleware = _middleware(server)
    on = (middleware.watch, server.broker._means.observer, server.conversations._rooms.watch)
    figures: dict[str, list[tuple[float, float]]] = {"on": [], "off": []}
    for block in range(BLOCKS * 2):
        name = ("on", "off")[block % 2]
        watch, observer, turns = on if name == "on" else (_Silent(), Observer(), Watch())
        middleware.watch = watch
        object.__setattr__(server.broker._means, "observer", observer)
        object.__setattr__(server.conversations._rooms, "watch", turns)
        telemetry.logs.set_level("info" if name == "on" else "error")
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(TURNS):
            await _turn(http, history)
        figures[name].append(((time.perf_counter() - wall) / TURNS, (time.process_time() - cpu) / TURNS))
    return figures


def _middleware(server: Server) -> RequestContext:
    layer: Any = server.app.middleware_stack
    while not isinstance(layer, RequestContext):
        layer = layer.app
    return layer


async def _turn(http: aiohttp.ClientSession, history: list[dict[str, Any]]) -> None:
    body = {"model": "claude-sonnet-5-5", "max_tokens": 64, "session_id": "bench", "stream": True}
    body["messages"] = [*history, {"role": "user", "content": "[[tokens 50]]"}]
    async with http.post("/v1/messages", json=body) as response:
        answer = await response.read()
        if b"message_stop" not in answer:
            raise SystemExit(answer.decode())


def _show(figures: dict[str, list[tuple[float, float]]]) -> None:
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in figures.items()
    }
    for name, (wall, cpu) in medians.items():
        sys.stdout.write(
            f"telemetry {name:3}  turn {wall * 1e3:7.2f} ms   CPU of server and client {cpu * 1e3:6.2f} ms\n"
        )
    wall = medians["on"][0] / medians["off"][0] - 1
    more = (medians["on"][1] - medians["off"][1]) * 1e6
    share = (medians["on"][1] - medians["off"][1]) / medians["off"][0]
    sys.stdout.write(f"difference: turn {wall:+.2%}, CPU {more:+.0f} us a turn = {share:.2%} of a turn's time\n")


if __name__ == "__main__":
    asyncio.run(main())
