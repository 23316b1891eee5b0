"""`claude-wrapper demo`: a real server, real HTTP, the real CLI; one conversation, then a new one, then the figures.

With `ANTHROPIC_API_KEY` the real API answers. Without it, the scripted upstream of `claude_wrapper.testing` does, and
the output says so. The exit code is 0 only if everything that is shown worked.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich.console import Console
from rich.table import Table

from claude_wrapper import config
from claude_wrapper.app import Server
from claude_wrapper.cli.serve import serve
from claude_wrapper.config import Settings
from claude_wrapper.wire.sse import SSEDecoder

_KEY = "sk-cw-demo-only-key"
_START_SECONDS = 60
_ANSWER_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered request and what was measured of it, in milliseconds."""

    question: str
    text: str
    session: str
    process: str
    pid: str
    first_ms: float
    total_ms: float


def run(environ: Mapping[str, str], *, keep: bool) -> int:
    """Run the demonstration; returns the exit code."""
    directory = Path(tempfile.mkdtemp(prefix="claude-wrapper-demo-"))
    directory.chmod(0o711)  # a process with an own uid must be able to pass through
    try:
        return asyncio.run(_demonstrate(environ, directory))
    finally:
        if keep:
            Console().print(f"The data directory is kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


async def _demonstrate(environ: Mapping[str, str], directory: Path) -> int:
    console = Console()
    async with contextlib.AsyncExitStack() as stack:
        settings = await _settings(environ, directory, console, stack)
        stop = asyncio.Event()
        url: asyncio.Future[tuple[str, Server]] = asyncio.get_running_loop().create_future()
        serving = asyncio.ensure_future(
            serve(settings, announce=lambda where, server: url.set_result((where, server)), stop=stop)
        )
        try:
            await asyncio.wait(
                [serving, asyncio.ensure_future(_settled(url))],
                return_when=asyncio.FIRST_COMPLETED,
                timeout=_START_SECONDS,
            )
            if not url.done():
                console.print("[red]the server did not start[/red]")
                await serving
                return 1
            where, server = url.result()
            console.print(
                f"Server: {where}   sandbox: {server.sandbox_level}   security level: {server.security_level}\n"
            )
            async with aiohttp.ClientSession(where, headers={"authorization": f"Bearer {_KEY}"}) as http:
                return await _converse(http, console, scripted=not environ.get("ANTHROPIC_API_KEY"))
        finally:
            stop.set()
            with contextlib.suppress(asyncio.CancelledError):
                await serving


async def _settled(future: asyncio.Future[Any]) -> None:
    await asyncio.wait({future})


async def _settings(
    environ: Mapping[str, str], directory: Path, console: Console, stack: contextlib.AsyncExitStack
) -> Settings:
    overrides: dict[str, Any] = {
        "data_dir": directory / "data",
        "host": "127.0.0.1",
        "port": 0,
        "admin_key": _KEY,
        "log_level": "error",
        "drain_seconds": 5.0,
    }
    key = environ.get("ANTHROPIC_API_KEY")
    if key:
        console.print("Upstream: the real Anthropic API (ANTHROPIC_API_KEY is set)")
    else:
        from claude_wrapper.testing.upstream import ScriptedUpstream

        upstream = await stack.enter_async_context(ScriptedUpstream())
        console.print(
            "Upstream: the [bold]scripted upstream[/bold] that ships with the tests (no ANTHROPIC_API_KEY is set)"
        )
        overrides |= {"upstream_url": upstream.url, "anthropic_api_key": "sk-ant-scripted"}
    return config.load(environ, **overrides)


async def _converse(http: aiohttp.ClientSession, console: Console, *, scripted: bool) -> int:
    with console.status("Warming up spare processes"):
        await _spares_ready(http)
    first_question, second_question = "Hello! Who are you, in one sentence?", "And what did I ask you before?"
    if scripted:
        second_question += " [[recall]]"  # the scripted upstream then says what it was really sent
    history: list[dict[str, str]] = []
    answers: list[Answer] = []
    for question in (first_question, second_question):
        answer = await _ask(http, history, question, console)
        answers.append(answer)
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]
    with console.status("Waiting for the next spare"):
        await _spares_ready(http)
    answers.append(await _ask(http, [], "A new conversation: say hello.", console))
    async with http.get("/v1/pool/stats") as response:
        stats = await response.json()
    _tables(answers, stats, console)
    return _verdict(answers, console)


async def _spares_ready(http: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(_START_SECONDS):
        while True:
            async with http.get("/v1/pool/stats") as response:
                stats = await response.json()
            if stats["spares"].get("chat"):
                return
            await asyncio.sleep(0.05)


async def _ask(http: aiohttp.ClientSession, history: list[dict[str, str]], question: str, console: Console) -> Answer:
    console.print("[bold cyan]you[/bold cyan]     ", end="")
    console.print(question, markup=False, highlight=False)
    console.print("[bold green]claude[/bold green]  ", end="")
    body = {
        "model": "claude-sonnet-5-5",
        "max_tokens": 1024,
        "stream": True,
        "messages": [*history, {"role": "user", "content": question}],
    }
    began = time.perf_counter()
    first: float | None = None
    parts: list[str] = []
    async with asyncio.timeout(_ANSWER_SECONDS), http.post("/v1/messages", json=body) as response:
        if response.status != 200:
            raise SystemExit(f"\nthe server answered {response.status}: {await response.text()}")
        async for text in _texts(response):
            first = first or time.perf_counter()
            parts.append(text)
            console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
        headers = response.headers
    ended = time.perf_counter()
    console.print("\n")
    return Answer(
        question=question,
        text="".join(parts),
        session=headers["cw-session-id"],
        process=headers["cw-process"],
        pid=headers["cw-process-pid"],
        first_ms=((first or ended) - began) * 1000,
        total_ms=(ended - began) * 1000,
    )


async def _texts(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    decoder = SSEDecoder()
    async for chunk in response.content.iter_any():
        for event in decoder.feed(chunk):
            if event.event == "content_block_delta":
                delta = msgspec.json.decode(event.data)["delta"]
                if delta["type"] == "text_delta":
                    yield delta["text"]
            elif event.event == "error":
                raise SystemExit(f"\nthe stream ended with an error: {event.data.decode()}")


def _tables(answers: list[Answer], stats: dict[str, Any], console: Console) -> None:
    table = Table(title="What was measured", title_justify="left")
    for column, justify in (
        ("request", "left"), ("process", "left"), ("pid", "right"), ("first token", "right"), ("whole answer", "right"),
    ):  # fmt: skip
        table.add_column(column, justify="right" if justify == "right" else "left")
    for name, answer in zip(("first turn", "second turn", "new conversation"), answers, strict=True):
        table.add_row(name, answer.process, answer.pid, f"{answer.first_ms:.0f} ms", f"{answer.total_ms:.0f} ms")
    console.print(table)
    pool = Table(title="Pool", title_justify="left", show_header=False)
    for name in ("pool_size", "spares", "claims", "waiting"):
        pool.add_row(name, str(stats[name]))
    console.print(pool)


def _verdict(answers: list[Answer], console: Console) -> int:
    first, second, fresh = answers
    checks = {
        "every question was answered": all(answer.text for answer in answers),
        "the first turn ran on a warm spare": first.process == "spare",
        "the second turn ran on the same process": second.process == "warm" and second.pid == first.pid,
        "the new conversation ran on another warm spare": fresh.process == "spare" and fresh.pid != first.pid,
        "the new conversation is another one": fresh.session != first.session == second.session,
    }
    for check, held in checks.items():
        console.print(f"[green]✓[/green] {check}" if held else f"[red]✗ {check}[/red]")
    return 0 if all(checks.values()) else 1
