"""Agent behaviour through `/v1/messages`: built-in tools, permissions, MCP, and a workspace that outlives its process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from running_server import Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

AGENT = {"tools": "default"}


def _tool(name: str, **arguments: Any) -> str:
    return f"[[tool {name} {json.dumps(arguments)}]] [[then]]"


async def test_an_agent_runs_tools_in_its_workspace_and_answers_as_one_message(server: Running) -> None:
    written = await server.ask(_tool("Write", file_path="/work/note.txt", content="tea"), session_id="a", agent=AGENT)
    assert written.status == 200, written.body
    assert written.body["stop_reason"] == "end_turn"
    assert [block["type"] for block in written.body["content"]] == ["text"]
    read = await server.ask(_tool("Bash", command="cat /work/note.txt; id -u; pwd"), session_id="a", agent=AGENT)
    assert "tea" in read.text
    assert "/work" in read.text
    assert read.pid == written.pid


async def test_the_sandbox_hides_the_server_from_the_agents_shell(server: Running) -> None:
    command = "ls /root /home 2>&1; env; cat /proc/1/environ 2>&1 | tr '\\0' ' '; ls /proc | grep -c '^[0-9]'"
    answer = await server.ask(_tool("Bash", command=command), agent=AGENT)
    assert answer.status == 200
    assert "sk-ant-real-secret" not in answer.text
    assert str(server.server.data_dir) not in answer.text


async def test_a_hibernated_agent_goes_on_with_its_files_and_its_memory(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, spares=0, max_processes=1, queue_seconds=60.0) as server:
        await server.ask(_tool("Write", file_path="/work/kept.txt", content="still here"), session_id="a", agent=AGENT)
        other = await server.ask("hello", session_id="b")  # takes the only place
        assert other.status == 200
        again = await server.ask(_tool("Bash", command="cat /work/kept.txt"), session_id="a", agent=AGENT)
        assert "still here" in again.text
        recalled = await server.ask("[[recall]]", session_id="a", agent=AGENT)
        assert "kept.txt" in recalled.text


async def test_without_a_sandbox_balanced_gives_no_shell_and_says_so(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, sandbox="none") as server:
        refused = await server.ask("hi", agent={"tools": ["Bash"]})
        assert (refused.status, refused.body["error"]["type"]) == (403, "permission_error")
        assert "no sandbox" in refused.body["error"]["message"]
        local = await server.ask("hi", mcp_servers={"x": {"command": "true"}})
        assert local.status == 403
        outside = await server.ask(_tool("Read", file_path="/etc/hostname"), agent={"tools": ["Read"]})
        assert outside.status == 200
        assert "outside the workspace" in outside.text


async def test_a_permission_mode_beyond_the_level_is_refused(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, security_level="strict", spares=0) as server:
        answer = await server.ask("hi", agent={"tools": ["Read"], "permission_mode": "bypassPermissions"})
        assert answer.status == 403


MCP_SERVER = """
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    method = message["method"]
    if method == "initialize":
        result = {"protocolVersion": message["params"]["protocolVersion"], "capabilities": {"tools": {}},
                  "serverInfo": {"name": "adder", "version": "1"}}
    elif method == "tools/list":
        result = {"tools": [{"name": "add", "description": "adds", "inputSchema": {"type": "object",
                  "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}}]}
    elif method == "tools/call":
        arguments = message["params"]["arguments"]
        result = {"content": [{"type": "text", "text": f"sum={arguments['a'] + arguments['b']}"}]}
    else:
        result = {}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
"""


async def test_a_local_mcp_server_runs_inside_the_sandbox(server: Running) -> None:
    servers = {"adder": {"command": "/usr/bin/python3", "args": ["-c", MCP_SERVER]}}
    answer = await server.ask(_tool("mcp__adder__add", a=2, b=40), mcp_servers=servers)
    assert answer.status == 200, answer.body
    assert "sum=42" in answer.text


async def test_a_remote_mcp_server_is_reached_from_outside_the_sandbox_with_its_secret(
    reachable_tmp_path: Path,
) -> None:
    seen: list[str | None] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        message = await request.json()
        seen.append(request.headers.get("authorization"))
        if "id" not in message:
            return web.Response(status=202)
        method = message["method"]
        result: dict[str, Any] = {}
        if method == "initialize":
            result = {
                "protocolVersion": message["params"]["protocolVersion"],
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "remote", "version": "1"},
            }
        elif method == "tools/list":
            result = {"tools": [{"name": "hello", "inputSchema": {"type": "object"}}]}
        elif method == "tools/call":
            result = {"content": [{"type": "text", "text": "hello from outside"}]}
        return web.json_response({"jsonrpc": "2.0", "id": message["id"], "result": result})

    app = web.Application()
    app.router.add_post("/mcp", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with running(reachable_tmp_path, private_networks=("127.0.0.0/8",)) as server:
            spec = [
                {"type": "url", "name": "remote", "url": f"http://127.0.0.1:{port}/mcp", "authorization_token": "t0p"}
            ]
            answer = await server.ask(_tool("mcp__remote__hello"), mcp_servers=spec)
            assert "hello from outside" in answer.text
            assert set(seen) == {"Bearer t0p"}
        seen.clear()
        async with running(reachable_tmp_path / "two") as strict:
            refused = await strict.ask(_tool("mcp__remote__hello"), mcp_servers=spec)
            assert "hello from outside" not in refused.text
            assert seen == []
    finally:
        await runner.cleanup()


async def test_two_agents_of_one_caller_have_separate_workspaces(server: Running) -> None:
    first, second = await asyncio.gather(
        server.ask(_tool("Write", file_path="/work/mine.txt", content="one"), session_id="a", agent=AGENT),
        server.ask(_tool("Bash", command="ls /work | wc -l"), session_id="b", agent=AGENT),
    )
    assert first.pid != second.pid
    assert "0" in second.text
