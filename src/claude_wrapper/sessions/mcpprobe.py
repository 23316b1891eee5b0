"""Trying out a remote MCP server: can it be reached, does it take the credential, what does it offer."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from claude_wrapper.broker.bridge import McpFailed, Outcome
from claude_wrapper.sessions.mcpservers import RemoteSpec
from claude_wrapper.sessions.remotes import RemoteServers
from claude_wrapper.sessions.resources.mcptokens import INITIALIZE
from claude_wrapper.sessions.spec import Owner

PROBE_SECONDS: Final = 25.0
_NOT_REACHED: Final = frozenset({Outcome.FORBIDDEN, Outcome.UNREACHABLE, Outcome.TIMEOUT})


async def probe(remotes: RemoteServers, owner: Owner, spec: RemoteSpec) -> dict[str, Any]:
    """The API's answer; never raises for what the server does. Takes at most `PROBE_SECONDS` and a moment to hang up."""
    began = time.perf_counter()
    found: dict[str, Any] = {
        "type": "mcp_probe",
        "url": spec.url,
        "reachable": True,
        "status": "connected",
        "credential": "none",
        "error": None,
        "protocol_version": None,
        "server_info": None,
        "tools": [],
        "tools_left_out": {},
    }
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await _ask(remotes, owner, spec, found)
    except TimeoutError:
        _fail(found, McpFailed(Outcome.TIMEOUT, f"took longer than {PROBE_SECONDS:g} s"))
    except McpFailed as failed:
        _fail(found, failed)
    found["seconds"] = round(time.perf_counter() - began, 3)
    return found


async def _ask(remotes: RemoteServers, owner: Owner, spec: RemoteSpec, found: dict[str, Any]) -> None:
    remote = await remotes.connect(owner, spec)
    found["credential"] = "sent" if remote.has_credential else "none"
    try:
        answer = await remote.exchange(INITIALIZE)
        await remote.exchange({"jsonrpc": "2.0", "method": "notifications/initialized"})
        result = (answer or {}).get("result", {})
        found["protocol_version"], found["server_info"] = result.get("protocolVersion"), result.get("serverInfo")
        offered = await remote.tools()
        found["tools"], found["tools_left_out"] = list(offered.tools), dict(offered.dropped)
    finally:
        await remote.close()


def _fail(found: dict[str, Any], failed: McpFailed) -> None:
    denied = failed.outcome is Outcome.AUTHENTICATION
    found["reachable"] = failed.outcome not in _NOT_REACHED
    found["status"] = "needs_auth" if denied else "failed"
    if denied:
        found["credential"] = "required" if found["credential"] == "none" else "refused"
    found["error"] = {"type": failed.outcome.value, "message": f"The server {failed.problem}."}
