"""The floor: the raw CLI driven over stdin with no server, sandbox or broker. What the product is compared with.

The same command line as the chat profile of the product; the driver reads lines and looks for the result, no more. It
knows the two states that a waiting process can be in: *spare* (spawned, nothing said) and *primed* (a throw-away turn
was answered and rewound).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bench.processes import MODEL, calm, cpu_seconds, end_group
from claude_wrapper.agent.launch import CHAT, LaunchSpec, command, locate_cli
from claude_wrapper.wire.streamjson import control_request_line, user_line

_LINE_LIMIT = 16 << 20
_STARTED_CPU = 0.1
"""Seconds of CPU that a process takes at least before it reads its input (0.3 in all on a slow machine)."""


@dataclass(slots=True)
class Timing:
    """Seconds from the first byte sent to the first text and to the result."""

    first: float
    total: float


class RawCli:
    """One CLI process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self._process = process
        self._stdin, self._stdout = process.stdin, process.stdout
        self._calls = 0

    @classmethod
    async def spawn(cls, directory: Path, upstream_url: str) -> RawCli:
        """Start it with a home and a working directory of its own below `directory`."""
        home = directory / f"floor-{uuid.uuid4().hex[:12]}"
        for name in ("home", "work", "tmp"):
            (home / name).mkdir(parents=True)
        cli = locate_cli(None)
        arguments, env = command(
            LaunchSpec(
                profile=CHAT,
                cli=cli,
                base_url=upstream_url,
                socket=None,
                token="sk-ant-bench",
                home=PurePosixPath(home / "home"),
                work=PurePosixPath(home / "work"),
                session_uuid=str(uuid.uuid4()),
                resume_uuid=None,
                model=MODEL,
            )
        )
        process = await asyncio.create_subprocess_exec(
            str(cli),
            *arguments,
            env={**env, "TMPDIR": str(home / "tmp")},
            cwd=home / "work",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE_LIMIT,
            start_new_session=True,
        )
        return cls(process)

    async def settle(self) -> None:
        """Wait until it has started and waits for input. Nothing is asked of it: a question would warm it up."""
        async with asyncio.timeout(30):
            while cpu_seconds([self.pid]) < _STARTED_CPU:
                await asyncio.sleep(0.05)
        await calm([self.pid])

    async def control(self, subtype: str, **fields: Any) -> dict[str, Any]:
        """A control request and its answer."""
        self._calls += 1
        name = f"floor_{self._calls}"
        self._stdin.write(control_request_line(name, {"subtype": subtype, **fields}))
        wanted = name.encode()
        async with asyncio.timeout(60):
            while line := await self._stdout.readline():
                if b'"control_response"' in line[:200] and wanted in line:
                    return dict(json.loads(line)["response"])
        raise ConnectionError(f"the CLI ended before it answered {subtype}")

    async def initialize(self) -> None:
        await self.control("initialize", hooks=None, systemPrompt=["You are a benchmark."])

    async def turn(self, text: str, *, line_id: str | None = None, expect: str | None = None) -> Timing:
        """One user line and its answer. Raises RuntimeError when it is not the answer to this question."""
        line = user_line(text, uuid=line_id or str(uuid.uuid4()))
        expected = json.dumps(f"You said: {text}" if expect is None else expect).encode()
        first = math.nan
        began = time.perf_counter()
        self._stdin.write(line)
        async with asyncio.timeout(60):
            while line := await self._stdout.readline():
                if math.isnan(first) and b'"content_block_delta"' in line:
                    first = time.perf_counter() - began
                elif b'"type":"result"' in line and b'"total_cost_usd"' in line:
                    total = time.perf_counter() - began
                    if expected not in line:
                        raise RuntimeError(f"not the answer to {text!r}: {line[:400]!r}")
                    return Timing(first, total)
        raise ConnectionError("the CLI ended in the middle of a turn")

    async def prime(self) -> None:
        """Initialize, answer a throw-away turn, take it back: only the wish for a first answer is left."""
        await self.initialize()
        line_id = str(uuid.uuid4())
        await self.turn("hi", line_id=line_id)
        response = await self.control("rewind_conversation", target_message_uuid=line_id)
        if response.get("response", {}).get("rewound") is not True:
            raise RuntimeError(f"not rewound: {response}")

    async def first_answer(self, text: str) -> Timing:
        """Initialize and the first turn, as one."""
        began = time.perf_counter()
        await self.initialize()
        before = time.perf_counter() - began
        timing = await self.turn(text)
        return Timing(before + timing.first, before + timing.total)

    async def end(self) -> None:
        """End of input, then by force."""
        self._stdin.close()
        try:
            async with asyncio.timeout(3):
                await self._process.wait()
        except TimeoutError:
            pass
        finally:
            end_group(self.pid, signal.SIGKILL)
            if self._process.returncode is None:
                await self._process.wait()


@contextlib.asynccontextmanager
async def floor(directory: Path, upstream_url: str, count: int, *, together: int = 2) -> AsyncIterator[list[RawCli]]:
    """`count` running processes, started `together` at a time, nothing said to them yet."""
    clis: list[RawCli] = []
    room = asyncio.Semaphore(together)

    async def one() -> None:
        async with room:
            cli = await RawCli.spawn(directory, upstream_url)
            clis.append(cli)
            await cli.settle()

    try:
        await asyncio.gather(*(one() for _ in range(count)))
        yield clis
    finally:
        await asyncio.gather(*(cli.end() for cli in clis))
