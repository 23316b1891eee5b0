"""What the broker costs: added latency per call, added delay and CPU per streamed event. Prints JSON.

    python bench/broker.py [--calls 400] [--streams 32] [--seconds 5] [--rate 50] [--listener own|aiohttp]

Three processes, so that each one's CPU can be told apart: a bare upstream, the broker, and the load (this one). The same
load goes straight to the upstream and through the broker, call by call in turn, so that a busy machine slows both.
`--listener aiohttp` puts `aiohttp.web.Server` in the place of the broker's own listener: the comparison behind
docs/decisions/broker-listener.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

MODEL = "claude-sonnet-5-5"
START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant",'
    b'"model":"claude-sonnet-5-5","content":[],"stop_reason":null,"usage":{"input_tokens":9,"output_tokens":1}}}\n\n'
)
END = (
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
    b'"usage":{"output_tokens":9}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
)
DELTA = (
    'event: content_block_delta\ndata: {{"type":"content_block_delta","index":0,"delta":{{"type":"text_delta",'
    '"text":"@{}@ some words of an answer"}}}}\n\n'
)


def body(size: int = 1000) -> bytes:
    """A request as the chat profile sends it, about `size` bytes."""
    return json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "x" * max(1, size - 250)}],
            "system": [{"type": "text", "text": "You are a Claude agent, built on Anthropic's Claude Agent SDK."}],
            "max_tokens": 128000,
            "stream": True,
        },
        separators=(",", ":"),
    ).encode()


# The upstream -----------------------------------------------------------------------------------------------------------


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """`events=N&gap=MS` in the query: N deltas, MS apart, each stamped with the time of its sending."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
            )
            await reader.readexactly(length)
            query = parse_qs(urlsplit(head.split(b" ", 2)[1].decode()).query)
            events, gap = int(query["events"][0]), float(query["gap"][0]) / 1000
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            writer.write(chunk(START))
            due = time.monotonic()
            for _ in range(events):
                if gap:
                    due += gap
                    await asyncio.sleep(due - time.monotonic())
                writer.write(chunk(DELTA.format(time.monotonic_ns()).encode()))
            writer.write(chunk(END) + b"0\r\n\r\n")


async def run_upstream() -> None:
    server = await asyncio.start_server(upstream, "127.0.0.1", 0)
    say({"port": server.sockets[0].getsockname()[1]})
    await stdin_closed()


# The broker -------------------------------------------------------------------------------------------------------------


async def run_broker(port: int, directory: str, listener: str) -> None:
    from claude_wrapper.broker import (
        Binding,
        Broker,
        BrokerSettings,
        Credential,
        CredentialKind,
        NoGate,
        NoSink,
        TurnContext,
    )
    from claude_wrapper.clock import SystemClock
    from claude_wrapper.ids import RandomIds

    credential = Credential("cred_1", CredentialKind.API_KEY, "sk-real", f"http://127.0.0.1:{port}")
    broker = Broker(
        BrokerSettings(max_calls=1000, max_connections=1000), SystemClock(), RandomIds(), NoGate(), NoSink()
    )
    await broker.start()
    path = Path(directory) / "api.sock"
    if listener == "aiohttp":
        await aiohttp_listener(credential, path)
        token = "none"
    else:
        endpoint = await broker.open("slot_1", path)
        endpoint.bind(Binding("org", None, None, None, "sesn", credential))
        endpoint.begin(TurnContext("turn", MODEL))
        token = endpoint.token
    say({"socket": str(path), "token": token})
    await answer_cpu()
    await broker.close()


async def aiohttp_listener(credential: Any, path: Path) -> None:
    """The least that aiohttp's low-level server needs to do the same streaming (no gate, books, retries, policy)."""
    from aiohttp import web

    from claude_wrapper.broker import inject
    from claude_wrapper.broker.meter import Meter
    from claude_wrapper.broker.upstream import Ask, Upstream

    client = Upstream(10, 300)
    await client.start()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        data = await request.read()
        headers = inject.upstream_headers(list(request.headers.items()), credential)
        answer = await client.ask(Ask("POST", credential.base_url + request.path_qs, headers, data))
        response = web.StreamResponse(status=answer.status)
        response.headers["content-type"] = "text/event-stream"
        await response.prepare(request)
        meter = Meter(streamed=True, max_json_bytes=0)
        while piece := await answer.read():
            await response.write(piece)
            meter.feed(piece)
        await response.write_eof()
        answer.close()
        return response

    runner = web.ServerRunner(web.Server(handle, access_log=None))
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()


async def answer_cpu() -> None:
    """A line in: a line out with this process's CPU seconds; end of input: return."""
    reader = await stdin_reader()
    while await reader.readline():
        usage = resource.getrusage(resource.RUSAGE_SELF)
        say({"cpu": usage.ru_utime + usage.ru_stime, "rss_kb": usage.ru_maxrss})


# The load ---------------------------------------------------------------------------------------------------------------


class Caller:
    """One keep-alive connection that sends a request and reads its answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str) -> None:
        self._reader, self._writer, self._token = reader, writer, token

    async def call(self, events: int, gap: float, data: bytes, delays: list[int] | None = None) -> tuple[float, float]:
        """(seconds to the first byte, seconds to the end); the delay of each event in ns is appended to `delays`."""
        began = time.perf_counter()
        self._writer.write(
            (
                f"POST /v1/messages?events={events}&gap={gap} HTTP/1.1\r\nhost: x\r\nx-api-key: {self._token}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
            ).encode()
            + data
        )
        seen = b""
        first = 0.0
        while not seen.endswith(b"0\r\n\r\n"):
            piece = await self._reader.read(65536)
            now = time.monotonic_ns()
            if not piece:
                raise ConnectionError(f"cut after {seen[-200:]!r}")
            first = first or time.perf_counter() - began
            if delays is not None:
                for stamp in piece.split(b"@")[1::2]:
                    if stamp.isdigit():
                        delays.append(now - int(stamp))
            seen = (seen + piece)[-400:] if delays is not None else seen + piece
        if b" 200 " not in seen and delays is None:
            raise ConnectionError(seen[:400].decode())
        return first, time.perf_counter() - began

    def close(self) -> None:
        self._writer.close()


async def load(arguments: argparse.Namespace, port: int, broker: dict[str, Any], ask_cpu: Any) -> dict[str, Any]:
    async def direct() -> Caller:
        return Caller(*await asyncio.open_connection("127.0.0.1", port), "none")

    async def through() -> Caller:
        return Caller(*await asyncio.open_unix_connection(broker["socket"]), broker["token"])

    result: dict[str, Any] = {}
    one, other = await direct(), await through()
    for name, size in (("small", 1_000), ("large", 200_000)):
        data = body(size)
        for caller in (one, other):
            for _ in range(30):
                await caller.call(5, 0, data)
        samples: dict[str, list[tuple[float, float]]] = {"direct": [], "broker": []}
        for _ in range(arguments.calls):
            samples["direct"].append(await one.call(5, 0, data))
            samples["broker"].append(await other.call(5, 0, data))
        result[f"call_{name}_{len(data)}_bytes"] = compare(
            {side: [whole * 1000 for _, whole in values] for side, values in samples.items()}
        )
    one.close()
    other.close()

    events = int(arguments.seconds * arguments.rate)
    stream: dict[str, list[float]] = {}
    for side, connect in (("direct", direct), ("broker", through)):
        callers = [await connect() for _ in range(arguments.streams)]
        delays: list[int] = []
        before = await ask_cpu()
        await asyncio.gather(*(caller.call(events, 1000 / arguments.rate, body(), delays) for caller in callers))
        after = await ask_cpu()
        stream[side] = [delay / 1e6 for delay in delays]
        if side == "broker":
            result["cpu_us_per_event"] = round((after["cpu"] - before["cpu"]) * 1e6 / len(delays), 2)
            result["broker_rss_mb"] = after["rss_kb"] // 1024
        for caller in callers:
            caller.close()
    result["event_delay"] = compare(stream)
    result["events_per_second"] = arguments.streams * arguments.rate

    callers = [await through() for _ in range(8)]
    before, began = await ask_cpu(), time.perf_counter()
    await asyncio.gather(*(repeat(caller, arguments.calls // 4) for caller in callers))
    calls, seconds = 8 * (arguments.calls // 4), time.perf_counter() - began
    result["cpu_us_per_call"] = round(((await ask_cpu())["cpu"] - before["cpu"]) * 1e6 / calls, 1)
    result["calls_per_second_8_parallel"] = round(calls / seconds)
    for caller in callers:
        caller.close()
    return result


async def repeat(caller: Caller, times: int) -> None:
    for _ in range(times):
        await caller.call(5, 0, body())


def compare(samples: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds: quantiles of both sides, and what the broker adds."""
    out: dict[str, float] = {}
    for side, values in samples.items():
        cuts = statistics.quantiles(values, n=100)
        out |= {f"{side}_p50_ms": round(cuts[49], 3), f"{side}_p99_ms": round(cuts[98], 3)}
    for quantile in ("p50", "p99"):
        out[f"added_{quantile}_ms"] = round(out[f"broker_{quantile}_ms"] - out[f"direct_{quantile}_ms"], 3)
    return out


# Processes --------------------------------------------------------------------------------------------------------------


def say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def stdin_reader() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def stdin_closed() -> None:
    await (await stdin_reader()).read()


@contextlib.asynccontextmanager
async def role(*arguments: str) -> Any:
    """This script as another process: (what it said first, a function that asks for its CPU seconds)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    async def ask() -> dict[str, Any]:
        stdin.write(b"\n")
        return dict(json.loads(await stdout.readline()))

    try:
        async with asyncio.timeout(20):
            said = json.loads(await stdout.readline())
        yield said, ask
    finally:
        stdin.close()
        try:
            async with asyncio.timeout(5):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        async with role("--role", "upstream") as (up, _):
            port = str(up["port"])
            async with role(
                "--role", "broker", "--port", port, "--dir", directory, "--listener", arguments.listener
            ) as (
                broker,
                ask_cpu,
            ):
                result = await load(arguments, up["port"], broker, ask_cpu)
    return {"listener": arguments.listener, "cpus": os.cpu_count(), "load_average": os.getloadavg()[0], **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=["load", "upstream", "broker"], default="load", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--dir", default="", help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=int, default=400, help="calls per side for the latency")
    parser.add_argument("--streams", type=int, default=32, help="streams at once for the cost of an event")
    parser.add_argument("--seconds", type=float, default=5, help="length of these streams")
    parser.add_argument("--rate", type=int, default=50, help="events a second per stream")
    parser.add_argument("--listener", choices=["own", "aiohttp"], default="own")
    arguments = parser.parse_args()
    if arguments.role == "upstream":
        asyncio.run(run_upstream())
    elif arguments.role == "broker":
        asyncio.run(run_broker(arguments.port, arguments.dir, arguments.listener))
    else:
        say(asyncio.run(measure(arguments)))


if __name__ == "__main__":
    main()
