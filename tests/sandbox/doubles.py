"""A stub upstream on a unix socket, and the pieces that sandbox tests share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

from claude_wrapper.sandbox import Containment, Launch, Limits, Sandbox, SlotDirs
from claude_wrapper.sandbox.cgroup import CgroupTree, hierarchies, open_tree
from claude_wrapper.sandbox.commands import SYSTEM_PATH, find_tools

LIMITS = Limits(
    memory_bytes=1 << 30,
    processes=256,
    cpu_share=None,
    file_bytes=64 << 20,
    open_files=4096,
    tmp_bytes=32 << 20,
    shm_bytes=16 << 20,
    disk_bytes=None,
    disk_inodes=None,
    turn_seconds=60,
)
SHELL = Path("/bin/sh").resolve()


def limits(**changed: object) -> Limits:
    return replace(LIMITS, **changed)  # type: ignore[arg-type]


def host_cgroups() -> CgroupTree:
    return open_tree(
        hierarchies(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text()), str(os.getpid())
    )


def why_no_bwrap() -> str | None:
    return None if find_tools(SYSTEM_PATH).bwrap else "bubblewrap is not installed"


def why_no_uids() -> str | None:
    if os.geteuid() != 0:
        return "not root: cannot become other users"
    return None if shutil.which("setpriv") else "setpriv is not installed"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One Messages API answer: `pong` for everything."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(
                next((line.split(":")[1] for line in head.split("\r\n") if line.startswith("content-length")), 0)
            )
            await reader.readexactly(length)
            usage = {"input_tokens": 1, "output_tokens": 1}
            message = {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": "m",
                "content": [],
                "usage": usage,
            }
            frames = [
                {"type": "message_start", "message": {**message, "stop_reason": None, "stop_sequence": None}},
                {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "pong"}},
                {"type": "content_block_stop", "index": 0},
                {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
                {"type": "message_stop"},
            ]
            body = "".join(f"event: {frame['type']}\ndata: {json.dumps(frame)}\n\n" for frame in frames).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def upstream(dirs: SlotDirs) -> AsyncIterator[Path]:
    socket = dirs.run / "api.sock"
    server = await asyncio.start_unix_server(answer, socket)
    socket.chmod(0o666)
    try:
        yield socket
    finally:
        server.close()


async def eventually(holds: Callable[[], bool]) -> None:
    """Look again, at every turn of the loop, until it holds; the caller's timeout bounds it."""
    while not holds():
        await asyncio.to_thread(os.sched_yield)


async def spawn(launch: Launch, **kw: object) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    streams = {"stdin": pipe, "stdout": pipe, "stderr": pipe} | kw
    try:
        return await asyncio.create_subprocess_exec(
            *launch.argv,
            env=launch.env,
            cwd=launch.cwd,
            pass_fds=launch.pass_fds,
            start_new_session=True,
            limit=2**20,
            **streams,  # type: ignore[arg-type]
        )
    finally:
        launch.close_fds()


def shell_spec(sandbox: Sandbox, dirs: SlotDirs, script: str, *, uid: int | None = None, **kw: object) -> Containment:
    """The shell in the place of the CLI: what can it do in there?"""
    layout = sandbox.layout(dirs, SHELL)
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(layout.home), "LANG": "C.UTF-8"}
    spec = Containment(dirs=dirs, cli=SHELL, argv=("-c", script), env=env, limits=LIMITS, uid=uid)
    return replace(spec, **kw)  # type: ignore[arg-type]


async def run(
    sandbox: Sandbox, dirs: SlotDirs, script: str, *, uid: int | None = None, seconds: float = 20, **kw: object
) -> tuple[int, str, str]:
    """Run a shell script inside to its end; returns exit code, stdout, stderr."""
    process = await spawn(sandbox.prepare(shell_spec(sandbox, dirs, script, uid=uid, **kw)))
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
    finally:
        await sandbox.kill(process.pid, dirs)
        if process.returncode is None:
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


async def one_turn(sandbox: Sandbox, dirs: SlotDirs, cli: Path, *, uid: int | None = None) -> dict[str, object]:
    """The real CLI answers one turn; returns its `result` line."""
    layout = sandbox.layout(dirs, cli)
    assert layout.socket is not None
    argv = (
        "-p",
        "--input-format",
        "stream-json",
        "--output-format",
        "stream-json",
        "--verbose",
        "--bare",
        "--tools",
        "",
    )
    env = {
        "HOME": str(layout.home),
        "PATH": "/usr/bin:/bin",
        "ANTHROPIC_BASE_URL": "http://broker.invalid",
        "ANTHROPIC_UNIX_SOCKET": str(layout.socket),
        "ANTHROPIC_API_KEY": "sk-ant-dummy",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "CLAUDE_CODE_MAX_RETRIES": "0",
    }
    roomy = limits(memory_bytes=2 << 30)
    spec = Containment(dirs=dirs, cli=cli, argv=(*argv, "--model", "m"), env=env, limits=roomy, uid=uid)
    async with upstream(dirs):
        process = await spawn(sandbox.prepare(spec))
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            line = {"type": "user", "message": {"role": "user", "content": "ping"}}
            process.stdin.write(json.dumps(line).encode() + b"\n")
            await process.stdin.drain()
            async with asyncio.timeout(30):
                async for raw in process.stdout:
                    frame = json.loads(raw)
                    if frame["type"] == "result":
                        exe = os.stat(f"/proc/{sandbox.main_pid(process.pid)}/exe")
                        return dict(frame) | {"inode": exe.st_ino}
                raise AssertionError((await process.stderr.read()).decode())
        finally:
            await sandbox.kill(process.pid, dirs)
            await process.wait()
