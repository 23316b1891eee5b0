"""Attacks on the whole server, which runs as a process of its own: a CLI that was taken over, and a server that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp

from claude_wrapper.agent.launch import locate_cli
from claude_wrapper.sandbox import HostReport, Level, files, processes, reachable_cli
from claude_wrapper.testing.attack.hostile import ATTACKS as FORGERIES
from claude_wrapper.testing.attack.hostile import FORGED_TOKENS, hostile_cli
from claude_wrapper.testing.attack.runner import VICTIM, python_inside
from claude_wrapper.testing.upstream import ScriptedUpstream

KEY = "sk-cw-attack-operator-key"
_READY_SECONDS = 60.0
_GONE_SECONDS = 10.0
_BREAKS = frozenset({"line", "flood", "garbage", "log"})
"""Output that ends the process; the caller gets an error, the next request another process."""


@dataclass(frozen=True, slots=True)
class ServedCheck:
    """One attack and what came of it."""

    name: str
    held: bool
    detail: str


@dataclass(slots=True)
class Served:
    """A server in a process of its own."""

    process: asyncio.subprocess.Process
    url: str
    upstream: ScriptedUpstream
    http: aiohttp.ClientSession
    log: Path

    async def ask(self, text: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        """One request; returns status and body."""
        message = {"role": "user", "content": text}
        body = {"model": "claude-sonnet-5-5", "max_tokens": 512, "messages": [message], **fields}
        async with self.http.post("/v1/messages", json=body) as response:
            return response.status, await response.json()


@contextlib.asynccontextmanager
async def served(directory: Path, settings: Mapping[str, str]) -> AsyncIterator[Served]:
    """Start `claude-wrapper serve`; it is killed at the end."""
    log = directory / "server.log"
    async with ScriptedUpstream() as upstream:
        env = {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "CLAUDE_WRAPPER_DATA_DIR": str(directory / "data"),
            "CLAUDE_WRAPPER_PORT": "0",
            "CLAUDE_WRAPPER_ADMIN_KEY": KEY,
            "CLAUDE_WRAPPER_UPSTREAM_URL": upstream.url,
            "CLAUDE_WRAPPER_ANTHROPIC_API_KEY": "sk-ant-real-attack",
            "CLAUDE_WRAPPER_LOG_FORMAT": "json",
            "PYTHONUNBUFFERED": "1",
            **{f"CLAUDE_WRAPPER_{name.upper()}": value for name, value in settings.items()},
        }
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "claude_wrapper.cli", "serve"),
                env=env,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(_READY_SECONDS):
                url = await _url(process, log)
            headers = {"authorization": f"Bearer {KEY}"}
            limit = aiohttp.ClientTimeout(total=90)
            async with aiohttp.ClientSession(url, headers=headers, timeout=limit) as http:
                yield Served(process, url, upstream, http, log)
        finally:
            if process.returncode is None:
                process.terminate()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(20):
                        await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()


async def _url(process: asyncio.subprocess.Process, log: Path) -> str:
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    async for line in process.stdout:
        _, found, url = line.decode().strip().partition("listens on ")
        if found:
            return url
    raise RuntimeError(f"the server did not start: see {log}")


async def served_checks(report: HostReport, forgeries: tuple[str, ...] = FORGERIES) -> list[ServedCheck]:
    """Every attack on a served instance."""
    found: list[ServedCheck] = []
    base = Path(tempfile.mkdtemp(prefix="claude-wrapper-attack-"))
    try:
        for directory in (base, base / "hostile", base / "killed"):
            _passable(directory)
        found += await _forged(base / "hostile", forgeries)
        level = report.best
        found.append(await _killed(base / "killed", level))
    finally:
        await asyncio.to_thread(files.remove_tree, base)
    return found


def _passable(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    directory.chmod(0o711)  # slots with an own uid pass through


# A CLI that was taken over -------------------------------------------------------------------------------------------


async def _forged(directory: Path, forgeries: tuple[str, ...]) -> list[ServedCheck]:
    shim = hostile_cli(directory, locate_cli(), python_inside())
    settings = {"sandbox": "none", "cli": str(shim), "spares": "0", "security_level": "permissive"}
    async with served(directory, settings) as server:
        found = [await _forge(server, name) for name in forgeries]
        lines = [line for line in server.log.read_text(encoding="utf-8").splitlines() if line.strip()]
    found.append(_honest_log(lines))
    return found


async def _forge(server: Served, name: str) -> ServedCheck:
    """One forgery; afterwards the server must answer the next caller as ever."""
    label = f"forged output: {name}"
    before = server.upstream.usage_totals
    began = monotonic()
    status, body = await server.ask(f"attack:{name} please")
    seconds = monotonic() - began
    after_status, after = await server.ask(f"hello after {name}")
    spent = server.upstream.usage_totals.output_tokens - before.output_tokens
    seen = f"{status} {body.get('error', {}).get('type', 'message')} in {seconds:.1f} s"
    if after_status != 200 or f"hello after {name}" not in json.dumps(after):
        return ServedCheck(label, held=False, detail=f"{seen}; the next caller got {after_status}: {str(after)[:200]}")
    if FORGED_TOKENS in after.get("usage", {}).values():
        return ServedCheck(label, held=False, detail="the next caller's usage holds forged numbers")
    if name in _BREAKS and status != 502:
        return ServedCheck(label, held=False, detail=f"expected 502: {seen} {str(body)[:200]}")
    if name not in _BREAKS and status not in {200, 502}:
        return ServedCheck(label, held=False, detail=f"{seen} {str(body)[:200]}")
    return ServedCheck(label, held=True, detail=f"{seen}; the upstream counted {spent} tokens")


def _honest_log(lines: list[str]) -> ServedCheck:
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            return ServedCheck("forged output: log lines", held=False, detail=f"not one of ours: {line[:150]}")
        if event.get("event") == "forged.event" or "\x1b" in line:
            return ServedCheck("forged output: log lines", held=False, detail=line[:150])
    return ServedCheck("forged output: log lines", held=True, detail=f"{len(lines)} lines, all the server's own")


# A server that is killed ---------------------------------------------------------------------------------------------


async def _killed(directory: Path, level: Level) -> ServedCheck:
    """SIGKILL under load: everything that it started must go, and the next start must find a clean house."""
    name = f"SIGKILL of the server under load ({level})"
    word = secrets.token_hex(8)
    cli = await asyncio.to_thread(reachable_cli, locate_cli(), directory / "cli", VICTIM)
    settings = {"sandbox": level.value, "spares": "1", "cli": str(cli)}
    async with served(directory, settings) as server:
        agent = {"tools": ["Bash"]} if level is not Level.NONE else {"tools": "none"}
        command = {"command": f"(setsid {python_inside()} -c 'import time; time.sleep(300)' {word} &) ; sleep 60"}
        busy = [
            asyncio.create_task(server.ask(f"[[tool Bash {json.dumps(command)}]] [[then]]", agent=agent))
            for _ in range(2)
        ]
        busy += [asyncio.create_task(server.ask("[[tokens 2000]] [[delay 50]]")) for _ in range(2)]
        async with asyncio.timeout(_READY_SECONDS):
            while level is not Level.NONE and len(_with_word(word)) < 2:  # noqa: ASYNC110 - the process table tells nobody
                await asyncio.sleep(0.1)
            await server.upstream.wait_until(lambda: server.upstream.active >= 2)
        started = {found.pid for found in processes.descendants(server.process.pid)} | set(_with_word(word))
        os.kill(server.process.pid, 9)
        began = monotonic()
        await server.process.wait()
        left = await _all_gone(started)
        seconds = monotonic() - began
        await asyncio.gather(*busy, return_exceptions=True)
    if left:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, 9)
        return ServedCheck(name, held=False, detail=f"{len(left)} of {len(started)} processes survived")
    async with served(directory, settings) as again:
        status, body = await again.ask("hello again")
        slots = len(list((directory / "data" / "slots").iterdir()))
    if status != 200:
        return ServedCheck(name, held=False, detail=f"the next start answers {status}: {body}")
    return ServedCheck(
        name, held=True, detail=f"{len(started)} processes gone after {seconds:.1f} s; the next start has {slots} slots"
    )


def _with_word(word: str) -> list[int]:
    found = []
    for process in processes.all_processes():
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
            if word.encode() in arguments:
                found.append(process.pid)
    return found


async def _all_gone(pids: set[int]) -> list[int]:
    until = monotonic() + _GONE_SECONDS
    while True:
        left = [pid for pid in pids if (found := processes.read_process(pid)) is not None and found.alive]
        if not left or monotonic() > until:
            return left
        await asyncio.sleep(0.05)
