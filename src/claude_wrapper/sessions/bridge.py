"""MCP servers that live in this server rather than in the sandbox.

The CLI speaks JSON-RPC with them over its control protocol (`mcp_message`), so that a process without any network can
use (a) the tools that the API's caller runs itself, or the worker of a self-hosted environment, whose calls are parked
until the result is sent, and (b) remote MCP servers, which are reached from outside the sandbox, where their secrets stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from claude_wrapper.broker.bridge import McpFailed, Outcome
from claude_wrapper.sessions.mcpservers import RemoteSpec
from claude_wrapper.sessions.spec import Owner
from claude_wrapper.wire.managed import error_event
from claude_wrapper.wire.managed_mcp import DENIED, UNREACHED

CLIENT_SERVER: Final = "client"
"""Name of the in-process MCP server that offers the caller's tools: the CLI shows them as `mcp__client__NAME`."""
SANDBOX_SERVER: Final = "sandbox"
"""The one that offers a self-hosted environment's tools."""
_PROTOCOL_VERSION: Final = "2025-06-18"
_KEPT_RESULTS: Final = 256
_WORTH_A_SECOND_TRY: Final = frozenset({Outcome.UNREACHABLE, Outcome.STATUS})
"""The CLI tries to connect twice. Who hung, lied or refused the credential is not waited for again in the same turn."""


class RemoteServer(Protocol):
    """A connection to one remote MCP server."""

    async def exchange(self, message: Mapping[str, Any], *, reused: Callable[[], None]) -> dict[str, Any] | None:
        """Send one JSON-RPC message; its response, or None for a notification. Raises McpFailed. `reused` is called
        when a kept answer is given."""
        ...

    async def close(self) -> None:
        """End the server's session with it."""
        ...


class RemoteConnector(Protocol):
    """Connects an owner to a remote server."""

    async def connect(self, owner: Owner, spec: RemoteSpec) -> RemoteServer:
        """Raises McpFailed."""
        ...


@dataclass(frozen=True, slots=True)
class Trouble:
    """A remote server failed in this turn."""

    server: str
    """As its owner calls it."""
    outcome: Outcome
    problem: str
    final: bool
    """Not tried again in this turn."""

    def event(self) -> dict[str, Any]:
        """As the session's clients are told."""
        denied = self.outcome is Outcome.AUTHENTICATION
        kind = DENIED if denied else UNREACHED
        words = f"The MCP server {self.server} {self.problem}."
        if self.outcome is Outcome.FORBIDDEN:
            words = f"The MCP server {self.server} may not be asked: {self.problem}."
        error = error_event(kind, words, "exhausted" if self.final else "retrying", mcp_server_name=self.server)
        return {"type": "session.error", "error": dict(error)}


class Bridge:
    """The in-process MCP servers of one conversation's process."""

    def __init__(self, connect: RemoteConnector, owner: Owner) -> None:
        self._connect = connect
        self._owner = owner
        self._offered: dict[str, list[dict[str, Any]]] = {CLIENT_SERVER: [], SANDBOX_SERVER: []}
        self._specs: dict[str, RemoteSpec] = {}
        self._failures: dict[str, tuple[McpFailed, bool]] = {}
        """Servers that could not be connected to in this turn, and whether that is to be tried once more."""
        self.on_trouble: Callable[[Trouble], None] = lambda _trouble: None
        """Told of each failure of a remote server."""
        self.on_reused: Callable[[str], None] = lambda _tool_use_id: None
        """Told of each call that a kept result answers."""
        self._not_started: set[str] = set()
        """Local servers that the CLI could not start."""
        self._remotes: dict[str, RemoteServer] = {}
        self._calls: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._expected: set[str] = set()

    # The caller's tools -----------------------------------------------------------------------------------------------

    def offer(self, tools: Iterable[Mapping[str, Any]], *, server: str = CLIENT_SERVER) -> None:
        """The tools of this turn's request, as the Messages API describes them."""
        self._offered[server] = [
            {
                "name": tool["name"],
                "description": tool.get("description", ""),
                "inputSchema": tool.get("input_schema", {"type": "object"}),
                # Calls wait for the caller, who may run them side by side.
                "annotations": {"readOnlyHint": True},
            }
            for tool in tools
        ]

    @property
    def pending(self) -> frozenset[str]:
        """Tool calls whose results the caller owes."""
        return frozenset(self._expected)

    def expect(self, tool_use_ids: Iterable[str]) -> None:
        """The caller has been told of these calls."""
        self._expected = set(tool_use_ids)

    def answer(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Results from the caller; a call that the CLI has not made yet finds its result waiting."""
        for block in results:
            tool_use_id = str(block["tool_use_id"])
            self._expected.discard(tool_use_id)
            future = self._call(tool_use_id)
            if not future.done():
                future.set_result(_tool_result(block))

    def _call(self, tool_use_id: str) -> asyncio.Future[dict[str, Any]]:
        future = self._calls.get(tool_use_id)
        if future is None:
            while len(self._calls) >= _KEPT_RESULTS:
                self._calls.pop(next(iter(self._calls))).cancel()
            future = self._calls[tool_use_id] = asyncio.get_running_loop().create_future()
        return future

    # What the CLI asks ------------------------------------------------------------------------------------------------

    async def serve(
        self,
        local: Mapping[str, Mapping[str, Any]],
        remote: Mapping[str, RemoteSpec],
        *,
        with_client_tools: bool,
    ) -> tuple[dict[str, dict[str, Any]], frozenset[str]]:
        """What this turn may use: the `servers` argument of `mcp_set_servers` (local commands as they are, everything
        else in-process), and those among them that the CLI must connect to anew."""
        servers: dict[str, dict[str, Any]] = {name: dict(spec) for name, spec in local.items()}
        servers |= {name: {"type": "sdk", "name": name} for name in remote}
        changed = {name for name, spec in self._specs.items() if remote.get(name) != spec} | self._failures.keys()
        changed |= self._not_started
        self._not_started = set()
        for name in changed:
            connection = self._remotes.pop(name, None)
            if connection is not None:
                await connection.close()
        self._specs = dict(remote)
        self._failures.clear()
        if with_client_tools:
            servers[CLIENT_SERVER] = {"type": "sdk", "name": CLIENT_SERVER}
        if self._offered[SANDBOX_SERVER]:
            servers[SANDBOX_SERVER] = {"type": "sdk", "name": SANDBOX_SERVER}
        return servers, frozenset(changed & servers.keys())

    def note_failures(self, errors: Any) -> None:
        """What the CLI answered to `mcp_set_servers`: local servers that it could not start. The next turn tries again."""
        for name, problem in errors.items() if isinstance(errors, Mapping) else ():
            if name not in self._specs:
                self._not_started.add(str(name))
                words = f"could not be started: {str(problem)[:300]}"
                self.on_trouble(Trouble(str(name), Outcome.UNREACHABLE, words, final=True))

    async def handle(self, server: str, message: dict[str, Any]) -> dict[str, Any]:
        """Answer one JSON-RPC message of the CLI."""
        if server in self._offered:
            return await self._offering(server, message)
        spec = self._specs.get(server)
        if spec is None:
            return _error(message, -32601, f"no MCP server is called {server}")
        try:
            response = await self._remote(server, spec, message)
        except McpFailed as failed:
            return _error(message, -32000, f"{spec.name}: {failed.problem}")
        return response if response is not None else {"jsonrpc": "2.0", "id": message.get("id", 0), "result": {}}

    async def _remote(self, server: str, spec: RemoteSpec, message: Mapping[str, Any]) -> dict[str, Any] | None:
        method = message.get("method")
        before, again = self._failures.get(server, (None, True))
        if before is not None and not (again and method == "initialize"):
            raise before  # the turn goes on without it; the next turn tries again
        try:
            remote = self._remotes.get(server)
            if remote is None:
                remote = self._remotes[server] = await self._connect.connect(self._owner, spec)
            response = await remote.exchange(message, reused=lambda: self._reused(message))
        except McpFailed as failed:
            connecting = method in {"initialize", "tools/list"}
            again = method == "initialize" and before is None and failed.outcome in _WORTH_A_SECOND_TRY
            if connecting:
                self._failures[server] = (failed, again)
            if connecting or failed.outcome is not Outcome.TOO_LARGE:
                self.on_trouble(Trouble(spec.name, failed.outcome, failed.problem, final=not again))
            raise
        if method == "initialize":
            self._failures.pop(server, None)
        return response

    def _reused(self, message: Mapping[str, Any]) -> None:
        tool_use_id = message.get("params", {}).get("_meta", {}).get("claudecode/toolUseId")
        if tool_use_id:
            self.on_reused(str(tool_use_id))

    async def _offering(self, server: str, message: dict[str, Any]) -> dict[str, Any]:
        method = message.get("method")
        if method == "initialize":
            return _result(
                message,
                {
                    "protocolVersion": message.get("params", {}).get("protocolVersion", _PROTOCOL_VERSION),
                    "capabilities": {"tools": {"listChanged": False}},
                    "serverInfo": {"name": server, "version": "1"},
                },
            )
        if method == "tools/list":
            return _result(message, {"tools": self._offered[server]})
        if method == "tools/call":
            tool_use_id = message.get("params", {}).get("_meta", {}).get("claudecode/toolUseId")
            if not tool_use_id:
                return _error(message, -32602, "the call does not say which tool use it belongs to")
            return _result(message, await self._call(str(tool_use_id)))
        if "id" in message and method not in {"ping", "notifications/initialized"}:
            return _error(message, -32601, f"unknown method {method}")
        return _result(message, {})

    async def close(self) -> None:
        """Drop parked calls and connections."""
        for future in self._calls.values():
            future.cancel()
        self._calls.clear()
        await self.disconnect()

    async def disconnect(self) -> None:
        """End the conversations with remote servers: the process that uses them is gone."""
        remotes, self._remotes = list(self._remotes.values()), {}
        await asyncio.gather(*(remote.close() for remote in remotes))


def _tool_result(block: Mapping[str, Any]) -> dict[str, Any]:
    """A Messages `tool_result` block as an MCP tool result."""
    content = block.get("content", "")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return {"content": [_mcp_block(one) for one in blocks], "isError": bool(block.get("is_error", False))}


def _mcp_block(block: Mapping[str, Any]) -> dict[str, Any]:
    if block.get("type") == "image" and block.get("source", {}).get("type") == "base64":
        source = block["source"]
        return {"type": "image", "data": source["data"], "mimeType": source["media_type"]}
    if block.get("type") == "text":
        return {"type": "text", "text": block["text"]}
    # MCP has no twin for the other kinds; the model reads them as JSON text rather than losing them.
    return {"type": "text", "text": str(dict(block))}


def _result(message: Mapping[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": message.get("id", 0), "result": result}


def _error(message: Mapping[str, Any], code: int, text: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": message.get("id", 0), "error": {"code": code, "message": text}}
