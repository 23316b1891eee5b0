"""Real MCP servers, from PyPI and from npm: as local commands inside the sandbox, and remote through the broker."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from claude_wrapper.sandbox.port import Level
from claude_wrapper.sandbox.probe import probe
from running_server import Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli, pytest.mark.process]

ROOT = Path(__file__).parents[2]
PYPI = next(ROOT.glob(".venv-mcp/lib/python3*/site-packages"), None)
NPM = Path(__file__).parent / "npm" / "node_modules"
EVERYTHING = NPM / "@modelcontextprotocol" / "server-everything" / "dist" / "index.js"
REMOTE_TIME = """
import asyncio, sys
from mcp_server_time.server import create_server
asyncio.run(create_server("UTC").run_streamable_http_async(host="127.0.0.1", port=int(sys.argv[1])))
"""


def python_of_the_sandbox() -> str:
    """A Python that a sandbox sees and that the installed packages were built for."""
    if PYPI is None:
        pytest.skip("mcp-server-time is not installed: run `make setup`")
    for found in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if Path(found).exists():
            said = subprocess.run(
                [found, "-c", "import sys; print('python%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
            )
            if said.stdout.strip() == PYPI.parent.name:
                return found
    pytest.skip(f"no {PYPI.parent.name} under /usr, where a sandboxed process could run it")


def node() -> str:
    if not EVERYTHING.exists():
        pytest.skip("server-everything is not installed: it needs npm, then `make setup`")
    found = shutil.which("node")
    if found is None or not Path(found).resolve().is_relative_to("/usr"):
        pytest.skip("there is no node under /usr, where a sandboxed process could run it")
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    if int(version.removeprefix("v").partition(".")[0] or 0) < 20:
        pytest.skip(f"server-everything needs Node 20; this is {version.strip()}")
    return found


@pytest.fixture
async def server(reachable_tmp_path: Path) -> AsyncIterator[Running]:
    """With the best sandbox that this host has."""
    level = "permissive" if probe().best is Level.NONE else "balanced"
    private = ("127.0.0.0/8",)
    async with running(reachable_tmp_path, sandbox="auto", security_level=level, private_networks=private) as one:
        yield one


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@asynccontextmanager
async def listening(argv: list[str], port: int, env: dict[str, str]) -> AsyncIterator[str]:
    """A server process that listens on this port; ended at the end."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        env={"PATH": os.environ["PATH"], **env},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(30):
            while True:
                try:
                    (await asyncio.open_connection("127.0.0.1", port))[1].close()
                    break
                except OSError:
                    assert process.returncode is None, "the MCP server ended"
                    await asyncio.sleep(0.05)  # a real process: nothing else tells that it listens
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.terminate()
        await process.wait()


async def asked(server: Running, spec: dict[str, Any], tool: str, arguments: str, **fields: Any) -> str:
    """What the model is told of this call."""
    answer = await server.ask(
        f"[[tool mcp__{spec['name']}__{tool} {arguments}]] [[then]]",
        mcp_servers=[spec],
        agent={"tools": ["Write"]},
        **fields,
    )
    assert answer.status == 200, answer.body
    return answer.text


async def in_workspace(server: Running, source: Path) -> None:
    """Copy a directory into the workspace of the only agent, as an installation by it would have."""
    (slot,) = [one for one in (server.server.data_dir / "slots").iterdir() if (one / "work" / "here").exists()]
    target = slot / "work" / source.name
    await asyncio.to_thread(shutil.copytree, source, target, symlinks=True)
    owner = (slot / "work").stat()
    for path in (target, *target.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


TIME = '{"timezone": "UTC"}'
ECHO = '{"message": "through npm"}'


async def test_a_server_from_pypi_runs_in_the_sandbox_and_remotely(server: Running) -> None:
    python = python_of_the_sandbox()
    assert PYPI is not None
    port = free_port()
    async with listening([python, "-c", REMOTE_TIME, str(port)], port, {"PYTHONPATH": str(PYPI)}) as url:
        assert "day_of_week" in await asked(
            server, {"type": "url", "name": "clock", "url": url}, "get_current_time", TIME
        )
    await server.ask(
        '[[tool Write {"file_path": "/work/here", "content": "x"}]] [[then]]',
        agent={"tools": ["Write"]},
        session_id="a",
    )
    await in_workspace(server, PYPI)
    local = {
        "type": "stdio",
        "name": "clock",
        "command": python,
        "args": ["-m", "mcp_server_time", "--local-timezone", "UTC"],
        "env": {"PYTHONPATH": f"/work/{PYPI.name}"},
    }
    assert "day_of_week" in await asked(server, local, "get_current_time", TIME, session_id="a")
    only = {**local, "tool_configuration": {"allowed_tools": ["convert_time"]}}
    assert "not enabled" in await asked(server, only, "get_current_time", TIME, session_id="a")


async def test_a_server_from_npm_runs_in_the_sandbox_and_remotely(server: Running) -> None:
    program, port = node(), free_port()
    async with listening([program, str(EVERYTHING), "streamableHttp"], port, {"PORT": str(port)}) as url:
        remote = {"type": "url", "name": "all", "url": url}
        assert "through npm" in await asked(server, remote, "echo", ECHO, session_id="remote")
        found = await server.http.post("/v1/mcp/probe", json={"url": url})
        probed = await found.json()
        assert (probed["status"], probed["server_info"]["name"]) == ("connected", "mcp-servers/everything")
        assert "echo" in [tool["name"] for tool in probed["tools"]]
    await server.ask(
        '[[tool Write {"file_path": "/work/here", "content": "x"}]] [[then]]',
        agent={"tools": ["Write"]},
        session_id="b",
    )
    await in_workspace(server, NPM)
    script = EVERYTHING.relative_to(NPM)
    local = {"type": "stdio", "name": "all", "command": program, "args": [f"/work/node_modules/{script}", "stdio"]}
    assert "through npm" in await asked(server, local, "echo", ECHO, session_id="b")
