"""What the server stands on during a soak, so that it can be taken away: database, shared state, blob store, disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from claude_wrapper.testing import stores
from claude_wrapper.testing.stores import PostgresServer, RedisServer

T = TypeVar("T")

_DISK_BYTES: Final = 640 * 2**20
"""Of the data directory's file system, so that it can be filled up. It takes memory only while it is full."""


@dataclass(eq=False)
class Surroundings:
    """`settings` are what the server is given. What is None cannot be broken here; `without` says why."""

    data_dirs: tuple[Path, ...]
    """Of each replica its own."""
    blobs: Path
    temporaries: tuple[Path, ...]
    """What each replica takes for `/tmp`."""
    settings: dict[str, str]
    postgres: PostgresServer | None = None
    redis: RedisServer | None = None
    without: dict[str, str] = field(default_factory=dict)
    """Fault to reason."""
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "soak-stores"))
    """Starts the stores, which end with it: one thread, for as long as they are wanted."""

    async def run(self, work: Callable[[], T]) -> T:
        """Do something with the stores, outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)

    @property
    def described(self) -> str:
        """In a few words."""
        database = "Postgres" if "database_url" in self.settings else "SQLite"
        state = "Redis" if "redis_url" in self.settings else "memory"
        count = len(self.data_dirs)
        replicas = "1 replica" if count == 1 else f"{count} replicas"
        return f"{database}, shared state in {state}, blobs in a directory, {replicas}"

    async def restart_database(self, seconds: float) -> None:
        """Kill it; start it again after so long."""
        if self.postgres is not None:
            await self.run(self.postgres.kill)
            await asyncio.sleep(seconds)
            await self.run(self.postgres.start)

    async def restart_redis(self, seconds: float) -> None:
        """Kill it, with all that it holds; start it again after so long."""
        if self.redis is not None:
            await self.run(self.redis.kill)
            await asyncio.sleep(seconds)
            await self.run(self.redis.start)

    async def take_blobs_away(self, seconds: float) -> None:
        """Whatever is asked of the blob store fails for so long: its directory is a file, as after a lost mount."""
        aside = self.blobs.with_name("blobs-away")
        await asyncio.to_thread(self.blobs.rename, aside)
        await asyncio.to_thread(self.blobs.write_bytes, b"")
        try:
            await asyncio.sleep(seconds)
        finally:
            self.blobs.unlink()
            aside.rename(self.blobs)

    async def fill_disk(self, replica: int, seconds: float) -> None:
        """Not a byte is free in a replica's data directory for so long."""
        ballast = self.data_dirs[replica] / "ballast"
        try:
            await asyncio.to_thread(_fill, ballast)
            await asyncio.sleep(seconds)
        finally:
            ballast.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def surroundings(
    directory: Path,
    *,
    replicas: int | None = None,
    embedded: bool = False,
    database_url: str | None = None,
    redis_url: str | None = None,
) -> AsyncIterator[Surroundings]:
    """Postgres and Redis of our own where their wheels are installed, else SQLite and memory.

    `embedded` takes those in any case. Servers that are given by URL are used and never broken. `replicas`: None means
    two, or one where they would have nothing to share.
    """
    shared = not embedded and (database_url or stores.have_postgres()) and (redis_url or stores.have_redis())
    count = (replicas or 2) if shared else 1
    data_dirs = tuple(directory / f"data-{number}" for number in range(count))
    temporaries = tuple(directory / f"tmp-{number}" for number in range(count))
    blobs = directory / "blobs"
    for path in (*data_dirs, *temporaries, blobs):
        path.mkdir(mode=0o711)
    made = Surroundings(data_dirs, blobs, temporaries, {"blob_url": str(blobs)})
    if count < (replicas or 2):
        made.without["several replicas"] = "they share a Postgres and a Redis, and here is only what is embedded"
    stack = contextlib.ExitStack()
    try:
        if database_url is not None:
            made.settings["database_url"] = database_url
            made.without["restart database"] = "the database is somebody else's"
        elif embedded or not stores.have_postgres():
            made.without["restart database"] = "the server runs on SQLite" if embedded else "no Postgres is installed"
        else:
            made.postgres = await made.run(lambda: stack.enter_context(stores.running_postgres()))
            name = await made.run(made.postgres.create)
            made.settings["database_url"] = made.postgres.url(name)
        if redis_url is not None:
            made.settings["redis_url"] = redis_url
            made.without["restart redis"] = "the Redis is somebody else's"
        elif embedded or not stores.have_redis():
            made.without["restart redis"] = "the server runs without Redis" if embedded else "no Redis is installed"
        else:
            made.redis = await made.run(lambda: stack.enter_context(stores.running_redis()))
            made.settings["redis_url"] = made.redis.url
        for data_dir in data_dirs:
            if refusal := _mount(data_dir):
                made.without["disk full"] = refusal
            else:
                stack.callback(_unmount, data_dir)
        yield made
    finally:
        await made.run(stack.close)
        made.thread.shutdown()


def _mount(directory: Path) -> str | None:
    """Give the directory a small file system of its own; why that cannot be done here."""
    if os.geteuid() != 0:
        return "only root can mount a small file system"
    if (program := shutil.which("mount")) is None:
        return "there is no mount program"
    options = f"size={_DISK_BYTES},mode=711"
    done = subprocess.run(
        [program, "-t", "tmpfs", "-o", options, "cw-soak", str(directory)], capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else f"mount: {done.stderr.strip()[:200]}"


def _unmount(directory: Path) -> None:
    subprocess.run(["umount", "--lazy", str(directory)], capture_output=True, check=False)


def _fill(ballast: Path) -> None:
    """Take all that is free, down to the last byte."""
    with ballast.open("wb", buffering=0) as file:
        size = 0
        for step in (64 << 20, 1 << 20, 4096):
            while True:
                try:
                    os.posix_fallocate(file.fileno(), size, step)
                except OSError:
                    break
                size += step
