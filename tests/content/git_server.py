"""A real git server on loopback: git's own http-backend behind HTTP, with a token for what is private."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

TOKEN = "ghp-a-real-token"
_GIT = {
    "PATH": "/usr/bin:/bin",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{who}_{what}": "a@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def git(directory: Path, *arguments: str) -> str:
    """Run git there; what it printed."""
    done = subprocess.run(
        ["/usr/bin/git", *arguments], cwd=directory, env=_GIT, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def make_repository(root: Path, name: str) -> str:
    """A bare repository with two commits on `main` and a branch `side`; the first commit's id."""
    work = root / f"{name}-work"
    work.mkdir(parents=True)
    git(work, "init", "--quiet", "--initial-branch=main")
    (work / "README").write_text("first\n")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "--message=first")
    first = git(work, "rev-parse", "HEAD")
    git(work, "checkout", "--quiet", "-b", "side")
    (work / "side.txt").write_text("on the side\n")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "--message=side")
    git(work, "checkout", "--quiet", "main")
    (work / "README").write_text("second\n")
    git(work, "commit", "--quiet", "--all", "--message=second")
    git(root, "clone", "--quiet", "--bare", str(work), f"{name}.git")
    shutil.rmtree(work)
    return first


@dataclass
class GitServer:
    """Where it is, and what it was asked."""

    url: str
    root: Path
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path with query, authorization."""


@contextlib.asynccontextmanager
async def git_server(root: Path) -> AsyncIterator[GitServer]:
    """Serves the repositories below `root`; those whose names begin with `private` want `TOKEN`."""
    running = GitServer("", root)
    wanted = "Basic " + base64.b64encode(f"x-access-token:{TOKEN}".encode()).decode()

    async def handle(request: web.Request) -> web.Response:
        given = request.headers.get("authorization", "")
        running.asked.append((request.method, request.path_qs, given))
        if request.path.startswith("/moved"):
            raise web.HTTPFound("http://localhost:1/elsewhere/info/refs")
        if request.path.startswith("/forbidden"):
            return web.Response(status=403)
        if request.path.startswith("/private") and given != wanted:
            return web.Response(status=401, headers={"www-authenticate": "Basic"})
        return await _backend(request, root)

    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        running.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield running
    finally:
        await runner.cleanup()


async def _backend(request: web.Request, root: Path) -> web.Response:
    process = await asyncio.create_subprocess_exec(
        "/usr/bin/git",
        "http-backend",
        env={
            **_GIT,
            "GIT_PROJECT_ROOT": str(root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query_string,
            "REQUEST_METHOD": request.method,
            "CONTENT_TYPE": request.headers.get("content-type", ""),
            "HTTP_CONTENT_ENCODING": request.headers.get("content-encoding", ""),
            "GIT_PROTOCOL": request.headers.get("git-protocol", ""),
            "REMOTE_ADDR": "127.0.0.1",
        },
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=os.fspath(root),
    )
    said, _ = await process.communicate(await request.read())
    head, _, body = said.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
    status = int(headers.pop("Status", "200").split()[0])
    return web.Response(status=status, headers=headers, body=body)
