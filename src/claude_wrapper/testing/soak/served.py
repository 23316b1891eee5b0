"""`claude-wrapper serve` as a process of its own, to be stopped, killed and started again; and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_LISTENS: Final = re.compile(rb"listens on (http://\S+)")
_START_SECONDS: Final = 60.0
_PASSED_ON: Final = ("PATH", "HOME", "LANG", "PYTHONPATH")
"""Variables that the server gets: it is to be the same program as this one, wherever that was imported from."""
ADMIN_KEY: Final = "sk-cw-test-operator-key"


@dataclass(eq=False)
class Served:
    """One server process after the other on the same data directory and, after the first one, the same port."""

    data_dir: Path
    upstream_url: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further settings, by their names without the prefix."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Further variables that are no settings."""
    number: int = 0
    """Among the replicas."""
    lives: int = 0
    """How often it was started."""
    url: str = ""
    process: asyncio.subprocess.Process | None = None
    _reading: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Of the process that was started last. Raises RuntimeError before the first start."""
        if self.process is None:
            raise RuntimeError("the server was never started")
        return self.process.pid

    @property
    def log_file(self) -> Path:
        """Everything that the processes wrote to standard error."""
        return self.data_dir.with_name(f"server-{self.number}.log")

    async def migrate(self) -> None:
        """Make the tables of a database that is not in the data directory. Raises RuntimeError with its last words."""
        with self.log_file.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "claude_wrapper.cli", "migrate"),
                env=self._environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log,
            )
        if code := await process.wait():
            raise RuntimeError(f"the migration ended with {code}: {self.log_file.read_text()[-2000:]}")

    async def start(self) -> None:
        """Returns when it listens. Raises RuntimeError with its last words, or TimeoutError."""
        with self.log_file.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "claude_wrapper.cli", "serve"),
                env=self._environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        async with asyncio.timeout(_START_SECONDS):
            self.url = await self._listening(self.process)
        self.lives += 1
        self.settings = {**self.settings, "port": self.url.rsplit(":", 1)[1]}
        self._reading = asyncio.get_running_loop().create_task(_drain(self.process))

    def _environment(self) -> dict[str, str]:
        settings = {
            "data_dir": str(self.data_dir),
            "port": "0",
            "admin_key": ADMIN_KEY,
            "upstream_url": self.upstream_url,
            "anthropic_api_key": "sk-ant-scripted-upstream",
            "log_format": "json",
            **self.settings,
        }
        env = {f"CLAUDE_WRAPPER_{name.upper()}": value for name, value in settings.items()}
        env |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        return env | dict(self.environment)

    async def _listening(self, process: asyncio.subprocess.Process) -> str:
        assert process.stdout is not None  # noqa: S101 - asked for above
        async for line in process.stdout:
            if found := _LISTENS.search(line):
                return found[1].decode()
        code = await process.wait()
        raise RuntimeError(f"the server ended with {code}: {self.log_file.read_text()[-2000:]}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server alone."""
        os.kill(self.pid, number)

    async def ended(self, seconds: float) -> int:
        """Its exit code (negative: by a signal). Raises TimeoutError."""
        assert self.process is not None  # noqa: S101 - callers started it
        async with asyncio.timeout(seconds):
            return await self.process.wait()

    async def close(self) -> None:
        """Stop it whatever it does, also when it is paused. Idempotent."""
        if self.process is not None and self.process.returncode is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            try:
                await self.ended(30)
            except TimeoutError:
                self.signal(signal.SIGKILL)
                await self.ended(10)
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
            self._reading = None


async def _drain(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None  # noqa: S101 - started with a pipe
    async for _ in process.stdout:
        pass


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()[0] != "Z"
        )
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    """Living children, grandchildren and so on."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        for listed in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                kids = [int(kid) for kid in listed.read_text(encoding="ascii").split()]
                found.update(kid for kid in kids if alive(kid))
                waiting += kids
    return found


def descriptors(pid: int) -> int:
    """Open file descriptors of a process; 0 when it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - iterdir makes a Path for each
    except OSError:
        return 0


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
