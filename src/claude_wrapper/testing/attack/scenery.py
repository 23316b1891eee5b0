"""What there is to steal: a server with secrets, another tenant at work, services on the host. All of it is the runner's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from claude_wrapper.sandbox import Containment, Limits, Sandbox, SlotDirs
from claude_wrapper.sandbox.seccomp import this_architecture

LIMITS = Limits(
    memory_bytes=448 << 20,
    processes=128,
    cpu_share=1.0,
    file_bytes=64 << 20,
    open_files=1024,
    tmp_bytes=32 << 20,
    shm_bytes=16 << 20,
    disk_bytes=64 << 20,
    disk_inodes=2000,
    turn_seconds=60,
)
"""Small, so that an attack on a limit is cheap."""


@dataclass(slots=True)
class Scenery:
    """One run's victims."""

    base: Path
    """A directory that other uids may pass through."""
    slots: Path
    targets: dict[str, Any]
    other: SlotDirs
    other_process: asyncio.subprocess.Process
    server_process: asyncio.subprocess.Process
    udp: socket.socket
    """Receives what reaches a datagram service on the host's loopback."""
    open_things: list[Callable[[], None]] = field(default_factory=list)


async def start(
    sandbox: Sandbox, dirs: SlotDirs, script: str, env: dict[str, str], uid: int | None
) -> asyncio.subprocess.Process:
    """A shell in the place of the CLI."""
    shell = await asyncio.to_thread(Path("/bin/sh").resolve)
    layout = sandbox.layout(dirs, shell)
    full = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(layout.home), "LANG": "C.UTF-8", **env}
    spec = Containment(dirs=dirs, cli=shell, argv=("-c", script), env=full, limits=LIMITS, uid=uid)
    launch = sandbox.prepare(spec)
    try:
        return await asyncio.create_subprocess_exec(
            *launch.argv,
            env=launch.env,
            cwd=launch.cwd,
            pass_fds=launch.pass_fds,
            start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    finally:
        launch.close_fds()


@contextlib.asynccontextmanager
async def scenery(base: Path, sandbox: Sandbox, uid: int | None) -> AsyncIterator[Scenery]:
    """Set everything up for one column of the table, and take it down again."""
    word = secrets.token_hex(8)
    marker, secret, credential = f"marker-{word}", f"other-{word}", f"sk-ant-real-{word}"
    server_secret = f"server-{word}"
    server_files = _server_files(base, server_secret)
    other = sandbox.create_dirs(base / "slots" / "other", uid)
    other_files = [other.work / "secret", other.home / "secret"]
    for file in other_files:
        file.write_text(secret)
        file.chmod(0o644)
        if uid is not None:
            os.chown(file, uid, uid)
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import time\ntime.sleep(600)", marker),
        env={"SECRET": server_secret, "ANTHROPIC_API_KEY": credential},
        cwd=base,
    )
    try:
        victim = await start(sandbox, other, f"sleep 600; : {marker}", {"SECRET": secret}, uid)
    except BaseException:
        server.kill()
        await server.wait()
        raise
    targets: dict[str, Any] = {
        "numbers": this_architecture().numbers,
        "slots": str(base / "slots"),
        "other_files": [str(file) for file in other_files],
        "other_secret": secret,
        "other_pid": sandbox.main_pid(victim.pid),
        "server_files": [str(file) for file in server_files],
        "server_secret": server_secret,
        "server_pid": server.pid,
        "credential": credential,
        "marker": marker,
        "survivor": f"survivor-{word}",
        "forged": f"forged-{word}",
        "cli": sys.executable,
        "processes": LIMITS.processes,
        "memory": LIMITS.memory_bytes,
        "tmp": LIMITS.tmp_bytes,
        "shm": LIMITS.shm_bytes,
        "file": LIMITS.file_bytes,
        "disk": LIMITS.disk_bytes,
        "inodes": LIMITS.disk_inodes,
        "cores": LIMITS.cpu_share,
    }
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    udp.setblocking(False)
    made = Scenery(base, base / "slots", targets, other, victim, server, udp)
    _listen(made, word)
    try:
        yield made
    finally:
        for close in made.open_things:
            close()
        server.kill()
        await server.wait()
        await sandbox.kill(victim.pid, other)
        await victim.wait()
        sandbox.remove_dirs(other)


def _server_files(base: Path, secret: str) -> list[Path]:
    base.chmod(0o711)
    files = [base / "server.env", base / "data" / "server.db", base / "world-readable.env"]
    files[1].parent.mkdir(exist_ok=True)
    for file, mode in zip(files, (0o600, 0o600, 0o644), strict=True):
        file.write_text(secret)
        file.chmod(mode)
    return files


def _listen(made: Scenery, word: str) -> None:
    tcp = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0attack-{word}")
    abstract.listen()
    named: list[socket.socket] = []
    owner = made.other.run.stat()
    for path, mode in ((made.base / "open.sock", 0o666), (made.other.run / "api.sock", 0o600)):
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        path.chmod(mode)
        if mode == 0o600:
            os.chown(path, owner.st_uid, owner.st_gid)
        named.append(listener)
    made.targets |= {
        "tcp": tcp.getsockname()[1],
        "udp": made.udp.getsockname()[1],
        "abstract": f"attack-{word}",
        "open_socket": str(made.base / "open.sock"),
        "other_socket": str(made.other.run / "api.sock"),
    }
    made.open_things += [one.close for one in (tcp, made.udp, abstract, *named)]
