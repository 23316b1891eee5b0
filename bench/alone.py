"""The server alone, on a process that costs nothing: requests a second and CPU per streamed event.

Neither a model nor the broker takes part; what is left is HTTP, authentication, the conversation, the pool, the pipe to
the process and the translation of its frames. A named conversation is also written to the durable event log: that is most
of what its requests cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.client import Connection, Conversation
from bench.engine import Scene
from bench.figures import Figure, Findings
from bench.processes import ServerProcess, exact_cpu_seconds

WORD = "word "  # what the stub says per event
_TOGETHER = "stub, client and server on the same cores"
_WRITTEN = "five events each, written to the event log in two or three transactions"
_ORIGINAL_US_PER_EVENT = 1400.0
"""What the system that this one replaces took per streamed event."""


async def measure(at: Scene) -> Findings:
    """One server, sixteen conversations."""
    stub = at.directory / "claude-stub"
    script = Path(__file__).with_name("stub_cli.py")
    stub.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -E -S {shlex.quote(str(script))} "$@"\n')
    stub.chmod(0o755)
    conversations_count = 16
    blocks, seconds = (1, 2.0) if at.quick else (3, 3.0)
    found = Findings()
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            at.server("alone", cli=stub, sandbox="none", spares=0, max_turns=10**9, freeze_seconds=0)
        )
        connections = [await stack.enter_async_context(Connection(running)) for _ in range(conversations_count)]
        rates: list[float] = []
        per_request: list[float] = []
        unnamed_rates: list[float] = []
        per_unnamed: list[float] = []
        bursts: list[float] = []
        paced: list[float] = []
        for block in range(blocks):
            unnamed = [Conversation(connection) for connection in connections]
            # Each with a beginning of its own: conversations are told apart by what was said.
            await asyncio.gather(*(one.ask(f"hello {n}", expect=WORD * 5) for n, one in enumerate(unnamed)))
            rate, cpu = await _requests(unnamed, running, seconds)
            unnamed_rates.append(rate)
            per_unnamed.append(cpu * 1e6)
            conversations = [
                Conversation(connection, session=f"alone-{block}-{number}")
                for number, connection in enumerate(connections)
            ]
            await asyncio.gather(*(one.ask("hello", expect=WORD * 5) for one in conversations))
            rate, cpu = await _requests(conversations, running, seconds)
            rates.append(rate)
            per_request.append(cpu * 1e6)
            bursts.append(await _events(conversations[:4], running, 3000, 0, cpu))
            paced.append(await _events(conversations, running, int(seconds * 50), 20, cpu))
            at.progress.step("the server alone", block + 1, blocks)
    found.figures += [
        Figure("requests a second (five events each)", "/s", unnamed_rates, note=_TOGETHER),
        Figure("CPU of the server per request", "µs", per_unnamed, note="five events each, with a history that grows"),
        Figure("requests a second of named conversations", "/s", rates, note=_TOGETHER),
        Figure("CPU of the server per request of a named conversation", "µs", per_request, note=_WRITTEN),
        Figure("CPU per event, 16 streams of 50 a second", "µs", paced, target=_ORIGINAL_US_PER_EVENT),
        Figure("CPU per event, as fast as it goes", "µs", bursts, target=_ORIGINAL_US_PER_EVENT),
    ]
    return found


async def _requests(
    conversations: Sequence[Conversation], running: ServerProcess, seconds: float
) -> tuple[float, float]:
    """(requests a second, CPU seconds of the server per request)."""
    deadline = time.perf_counter() + seconds
    began, before = time.perf_counter(), exact_cpu_seconds(running.pid)

    async def work(one: Conversation) -> int:
        count = 0
        while time.perf_counter() < deadline:
            await one.ask("hello", expect=WORD * 5)
            count += 1
        return count

    count = sum(await asyncio.gather(*(work(one) for one in conversations)))
    return count / (time.perf_counter() - began), (exact_cpu_seconds(running.pid) - before) / count


async def _events(
    conversations: Sequence[Conversation], running: ServerProcess, events: int, gap: int, request: float
) -> float:
    """Microseconds of the server's CPU per event; what a request costs by itself is taken off."""
    before = exact_cpu_seconds(running.pid)
    await asyncio.gather(*(one.ask(f"events {events} gap {gap}", expect=WORD * events) for one in conversations))
    cpu = exact_cpu_seconds(running.pid) - before - request * len(conversations)
    return cpu * 1e6 / (events * len(conversations))
