"""The processes of a measurement: started in sessions of their own with small environments, and surely ended.

Also what is read about them from `/proc`: CPU seconds and memory of single processes and of whole trees.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")
MB = 1 << 20
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
KEY = "sk-cw-bench-operator-key"
MODEL = "claude-sonnet-5-5"


# What /proc says -------------------------------------------------------------------------------------------------------


def _stat(pid: int) -> list[str]:
    """Fields of `/proc/PID/stat` after the name: [0] state, [1] parent, [11..14] CPU ticks own and of waited children."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU of these processes so far, all their threads, without their children. In steps of 10 ms a process."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            fields = _stat(pid)
            ticks += int(fields[11]) + int(fields[12])
    return ticks * TICK


def exact_cpu_seconds(pid: int) -> float:
    """The same to the nanosecond, from the scheduler's account of each thread (threads that ended are missing)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text(encoding="ascii").split()[0])
    return total / 1e9


def tree(root: int) -> list[int]:
    """All descendants of `root`, without it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
    found, ahead = [], [root]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def memory_mb(pids: Iterable[int]) -> tuple[float, float]:
    """(resident, proportional share) of these processes in MB. The share is NaN where the kernel will not tell."""
    resident = share = 0.0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            share = float("nan")
            with contextlib.suppress(OSError):
                resident += int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * 4096 / MB
            continue
        values = {name: int(rest.split()[0]) / 1024 for name, _, rest in (line.partition(":") for line in lines)}
        resident += values["Rss"]
        share += values["Pss"]
    return resident, share


async def calm(pids: Iterable[int], *, below: float = 0.1, window: float = 0.25, limit: float = 4.0) -> None:
    """Return when these processes take less than `below` of a core, or after `limit` seconds: start-ups have ended."""
    watched = list(pids)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit
    while loop.time() < deadline:
        before = cpu_seconds(watched)
        await asyncio.sleep(window)
        if (cpu_seconds(watched) - before) / window <= below:
            return


# Starting and ending ---------------------------------------------------------------------------------------------------


def end_group(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal the whole process group of a process that was started as a session of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


@contextlib.asynccontextmanager
async def started(
    argv: list[str], env: Mapping[str, str], *, log: Path, cwd: Path, grace: float = 15
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process with piped stdout, in a session of its own; its group is gone when the context is left."""
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=dict(env),
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end_group(process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await process.wait()
        except TimeoutError:
            pass
        finally:
            end_group(process.pid)
            if process.returncode is None:
                await process.wait()


async def _says(process: asyncio.subprocess.Process, start: str, log: Path) -> str:
    """The first line of its output that contains `start`."""
    assert process.stdout is not None
    async with asyncio.timeout(60):
        while line := await process.stdout.readline():
            if start in (text := line.decode()):
                return text
    raise RuntimeError(f"{process.pid} ended before it said {start!r}:\n{log.read_text(errors='replace')[-2000:]}")


@contextlib.asynccontextmanager
async def scratch() -> AsyncIterator[Path]:
    """A directory that processes of other uids may pass through; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="cw-bench-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o711)
        yield directory


@dataclass(frozen=True, slots=True)
class Upstream:
    """The scripted model API."""

    url: str
    pid: int


@contextlib.asynccontextmanager
async def upstream(directory: Path) -> AsyncIterator[Upstream]:
    """`python -m claude_wrapper.testing.upstream` on a free port."""
    log = directory / "upstream.log"
    argv = [sys.executable, "-m", "claude_wrapper.testing.upstream", "0"]
    async with started(argv, {"PATH": PATH, "LANG": "C.UTF-8"}, log=log, cwd=directory) as process:
        line = await _says(process, "http://", log)
        yield Upstream(line.split()[-1], process.pid)


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """`claude-wrapper serve`."""

    host: str
    port: int
    pid: int
    sandbox: str

    def agents(self) -> list[int]:
        """Everything below it: the CLI processes and their sandboxes."""
        return tree(self.pid)


_MANY = "256"
_DEFAULTS: Mapping[str, str] = {
    "PORT": "0",
    "ADMIN_KEY": KEY,
    "ANTHROPIC_API_KEY": "sk-ant-bench",
    "LOG_LEVEL": "error",
    "DRAIN_SECONDS": "1",
    "QUEUE_SECONDS": "180",
    "MAX_PROCESSES": _MANY,
    "AGENT_SPARES": "0",
    "MAX_PROCESSES_PER_ORG": _MANY,
    "MAX_PROCESSES_PER_PRINCIPAL": _MANY,
    "DEFAULT_MODEL": MODEL,
}


@contextlib.asynccontextmanager
async def server(
    directory: Path, name: str, upstream_url: str, *, source: Path | None = None, **settings: object
) -> AsyncIterator[ServerProcess]:
    """A server with these settings (names without prefix, in lower case); all others are the defaults.

    `source`: another checkout's `src` to run instead of the installed one.
    """
    log = directory / f"{name}.log"
    given = {
        **_DEFAULTS,
        "DATA_DIR": str(directory / name),
        "UPSTREAM_URL": upstream_url,
        **{key.upper(): str(value) for key, value in settings.items()},
    }
    env = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": str(directory), "COLUMNS": "200"}
    if source is not None:
        env["PYTHONPATH"] = str(source)
    env |= {f"CLAUDE_WRAPPER_{key}": value for key, value in given.items()}
    argv = [str(Path(sys.executable).with_name("claude-wrapper")), "serve"]
    async with started(argv, env, log=log, cwd=directory) as process:
        address = (await _says(process, "http://", log)).split("http://")[1].strip()
        sandbox = (await _says(process, "sandbox", log)).split()[1]
        host, _, port = address.rpartition(":")
        yield ServerProcess(host, int(port), process.pid, sandbox)
