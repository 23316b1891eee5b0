"""Several replicas of one server, each a process of its own, on one Postgres, one Redis and one scripted upstream."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from anthropic import AsyncAnthropic

import claude_wrapper
from claude_wrapper.testing.upstream import ScriptedUpstream
from running_server import KEY

LEASE = 2.0
SHARED = {
    "key_pepper": "the same for all replicas of these tests",
    "master_key": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
}


class Replica:
    """One server process."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, draining: asyncio.Task[bytes]) -> None:
        self.process = process
        self.url = url
        self._output = draining

    def sdk(self, **options: Any) -> AsyncAnthropic:
        """The official SDK, pointed at it."""
        return AsyncAnthropic(base_url=self.url, api_key=KEY, **{"max_retries": 0} | options)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def gone(self) -> int:
        """Its exit code, once it has ended."""
        return await self.process.wait()


@contextlib.asynccontextmanager
async def replica(
    directory: Path, upstream: ScriptedUpstream, *, environment: Mapping[str, str] | None = None, **settings: Any
) -> AsyncIterator[Replica]:
    """A running replica; killed at the end if it still runs. `environment`: variables beside its settings."""
    directory.mkdir(exist_ok=True)
    directory.chmod(0o711)
    values = {
        "data_dir": directory / "data",
        "port": 0,
        "admin_key": KEY,
        "upstream_url": upstream.url,
        "anthropic_api_key": "sk-ant-real-secret",
        "log_level": "warning",
        "sandbox": "none",
        "security_level": "permissive",
        "spares": 1,
        "agent_spares": 0,
        "drain_seconds": 20.0,
        "lease_seconds": LEASE,
        **SHARED,
        **settings,
    }
    variables = {"PATH": os.environ["PATH"], "HOME": str(directory), **(environment or {})}
    variables["PYTHONPATH"] = str(Path(claude_wrapper.__file__).parents[1])  # the code that the tests import
    variables |= {f"CLAUDE_WRAPPER_{name.upper()}": str(value) for name, value in values.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "claude_wrapper.cli", "serve",
        env=variables, stdout=asyncio.subprocess.PIPE, stderr=(directory / "log").open("ab"), start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            while b"listens on" not in (line := await process.stdout.readline()):
                assert line, (directory / "log").read_text(errors="replace")[-3000:]
        draining = asyncio.ensure_future(process.stdout.read())
        yield Replica(process, line.decode().split()[-1], draining)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(25):
                    await process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what a killed server left behind
        await process.wait()


async def ready(url: str) -> bool:
    """What a load balancer asks."""
    try:
        async with aiohttp.ClientSession() as http, http.get(f"{url}/readyz") as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False
