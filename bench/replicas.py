"""Two replicas: a forwarded turn against a direct one, and the time until a killed holder's turn goes on elsewhere.

`python -m bench.replicas [--turns N] [--kills N] [--lease SECONDS]`. Servers are processes of their own on one Postgres and
one Redis (from the wheels that the tests use), with the real CLI and the scripted upstream. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from claude_wrapper.storage import Database, migrations
from claude_wrapper.testing.stores import running_postgres, running_redis
from claude_wrapper.testing.upstream import ScriptedUpstream

_KEY = "sk-cw-bench-operator-key"
_MODEL = "claude-sonnet-5-5"
_START_SECONDS = 60.0


@contextlib.asynccontextmanager
async def _replica(directory: Path, **settings: Any) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    directory.mkdir(exist_ok=True)
    directory.chmod(0o711)
    values = {
        "data_dir": directory / "data",
        "port": 0,
        "admin_key": _KEY,
        "anthropic_api_key": "sk-ant-bench",
        "key_pepper": "the same pepper for all replicas",
        "master_key": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
        "log_level": "error",
        "spares": 1,
        "agent_spares": 0,
        "drain_seconds": 1,
        **settings,
    }
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory)}
    environment |= {f"CLAUDE_WRAPPER_{name.upper()}": str(value) for name, value in values.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "claude_wrapper.cli", "serve",
        env=environment, stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_SECONDS):
            while b"listens on" not in (line := await process.stdout.readline()):
                if not line:
                    raise RuntimeError("a replica did not start")
        yield process, line.decode().split()[-1]
    finally:
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(15):
                    await process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _turn(http: aiohttp.ClientSession, url: str, name: str, text: str = "hello") -> tuple[float, bool]:
    """Seconds of one short turn, and whether another replica answered it."""
    body = {"model": _MODEL, "max_tokens": 64, "session_id": name, "messages": [{"role": "user", "content": text}]}
    began = time.perf_counter()
    async with http.post(f"{url}/v1/messages", json=body) as answer:
        await answer.read()
        answer.raise_for_status()
        return time.perf_counter() - began, "cw-forwarded" in answer.headers


async def _forwarded(http: aiohttp.ClientSession, here: str, there: str, turns: int) -> dict[str, list[float]]:
    """Turns of one conversation, in turn through its holder and through the other replica."""
    for url in (here, there):
        await _turn(http, url, "bench")
    found: dict[str, list[float]] = {"direct_ms": [], "forwarded_ms": []}
    for _ in range(turns):
        for url, kind in ((here, "direct_ms"), (there, "forwarded_ms")):
            seconds, was = await _turn(http, url, "bench")
            if was != (kind == "forwarded_ms"):
                raise RuntimeError("a turn went another way than it should")
            found[kind].append(seconds * 1000)
    return found


async def _session(http: aiohttp.ClientSession, url: str) -> str:
    async def made(path: str, body: dict[str, Any]) -> str:
        async with http.post(f"{url}{path}", json=body) as answer:
            answer.raise_for_status()
            return str((await answer.json())["id"])

    agent = await made("/v1/agents", {"name": "bench", "model": _MODEL})
    environment = await made("/v1/environments", {"name": "bench"})
    return await made("/v1/sessions", {"agent": agent, "environment_id": environment})


async def _takeover(
    http: aiohttp.ClientSession, upstream: ScriptedUpstream, old: tuple[asyncio.subprocess.Process, str], new: str
) -> dict[str, float]:
    """Kill the holder in mid-turn; seconds until the session is taken over and until its answer is there."""
    process, url = old
    session = await _session(http, url)
    before = len(upstream.calls)
    text = {"type": "text", "text": "[[hang 1]] [[once]] [[say done]]"}
    events = {"events": [{"type": "user.message", "content": [text]}]}
    async with http.post(f"{url}/v1/sessions/{session}/events", json=events) as answer:
        answer.raise_for_status()
    await upstream.wait_for(before + 1)
    process.send_signal(signal.SIGKILL)
    began = time.perf_counter()
    taken = 0.0
    async with http.get(f"{new}/v1/sessions/{session}/events/stream", headers={"last-event-id": "0"}) as stream:
        async for line in stream.content:
            if line.startswith(b"event: session.status_rescheduled"):
                taken = time.perf_counter() - began
            elif taken and line.startswith(b"event: session.status_idle"):
                return {"taken_seconds": taken, "answered_seconds": time.perf_counter() - began}
    raise RuntimeError("the stream ended before the answer")


async def measure(database_url: str, redis_url: str, *, turns: int, kills: int, lease: float) -> dict[str, Any]:
    """All figures."""
    database = Database(database_url)
    await migrations.migrate(database)
    await database.close()
    headers = {"authorization": f"Bearer {_KEY}", "anthropic-version": "2023-06-01"}
    hop: dict[str, list[float]] = {}
    takeovers: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o711)
        async with (
            ScriptedUpstream() as upstream,
            aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=120)) as http,
        ):
            shared = {
                "database_url": database_url,
                "redis_url": redis_url,
                "upstream_url": upstream.url,
                "lease_seconds": lease,
            }
            async with _replica(Path(scratch) / "stays", **shared) as (_, stays):
                for number in range(kills):
                    async with _replica(Path(scratch) / f"dies{number}", **shared) as dies:
                        hop = hop or await _forwarded(http, dies[1], stays, turns)
                        takeovers.append(await _takeover(http, upstream, dies, stays))
    return {"lease_seconds": lease, **hop, "takeovers": takeovers}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--lease", type=float, default=5.0)
    asked = parser.parse_args()
    with running_postgres() as postgres, running_redis() as redis:
        url = postgres.url(postgres.create())
        found = asyncio.run(measure(url, redis.url, turns=asked.turns, kills=asked.kills, lease=asked.lease))
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
