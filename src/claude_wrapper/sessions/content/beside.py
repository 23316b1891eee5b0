"""Runs a command in a slot's sandbox, beside its agent: the same walls, files, user and limits, and the same way out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from claude_wrapper.broker.egress import Egress
from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import commands, processes
from claude_wrapper.sandbox.port import Containment, Launch, Sandbox

_KEPT: Final = 16 * 1024
_READY: Final = b"ready\n"
_WAIT: Final = "echo ready; read -r _; "
"""The way out is opened when the sandbox stands: the command waits for it."""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    status: int
    said: str
    """The end of what it wrote, both streams."""


async def run_beside(
    sandbox: Sandbox,
    like: Containment,
    script: str,
    *,
    env: Mapping[str, str],
    open_network: Callable[[int], Awaitable[Egress | None]] | None,
    seconds: float,
) -> Ran:
    """Run `script` with sh, contained `like` the agent is; `env` is added to the agent's without its credential.

    `open_network` gives it a way out, by the pid that was spawned. Raises SandboxUnavailable, TimeoutError.
    """
    shell = shutil.which("sh", path=commands.SYSTEM_PATH)
    if shell is None:
        raise SandboxUnavailable("sh is not installed")
    # A name of its own: control groups are named after the slot's root.
    dirs = replace(like.dirs, root=like.dirs.root.with_name(f"{like.dirs.root.name}-beside"))
    kept = {name: value for name, value in like.env.items() if not name.startswith(("ANTHROPIC_", "CLAUDE_"))}
    spec = replace(like, dirs=dirs, cli=Path(shell), argv=("-c", _WAIT + script), env={**kept, **env})
    launch = sandbox.prepare(spec)
    try:
        process = await _spawned(launch)
        egress: Egress | None = None
        try:
            async with asyncio.timeout(seconds):
                assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - both are pipes
                if await process.stdout.readline() != _READY:
                    return Ran(await process.wait(), "the sandbox did not start")
                if open_network is not None:
                    egress = await open_network(process.pid)
                process.stdin.write(b"\n")
                process.stdin.close()
                said = await _read(process.stdout)
                return Ran(await process.wait(), said)
        finally:
            if process.returncode is None:
                # bubblewrap's first process inside takes everything there along.
                for first in processes.children(process.pid):
                    processes.send(first, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            if egress is not None:
                await egress.close()
    finally:
        launch.close_fds()
        await asyncio.to_thread(sandbox.remove_dirs, dirs)


async def _spawned(launch: Launch) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *launch.argv,
            env=launch.env,
            cwd=launch.cwd,
            pass_fds=launch.pass_fds,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxUnavailable(f"the command cannot be started: {error.strerror}") from error


async def _read(stream: asyncio.StreamReader) -> str:
    kept = b""
    while piece := await stream.read(_KEPT):
        kept = (kept + piece)[-_KEPT:]
    return kept.decode(errors="replace")
