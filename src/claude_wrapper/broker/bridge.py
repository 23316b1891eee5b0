"""Answers the CLI's `mcp_message` control requests for one remote MCP server (Streamable HTTP).

The CLI is told of a server of type `sdk` and sends its JSON-RPC over stdin/stdout; nothing of the network, and nothing of
the credential, is needed inside the sandbox.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec

from claude_wrapper.broker.inject import Headers
from claude_wrapper.broker.mcp import McpAsk, McpClient, McpServer, as_mapping
from claude_wrapper.broker.upstream import Answer, UpstreamFailure
from claude_wrapper.errors import WrapperError
from claude_wrapper.wire.sse import EventStreamError, SSEDecoder

_FAILED = -32000
"""JSON-RPC's range for errors of the implementation."""


class McpBridge:
    """One conversation with one server. `send` each message of the CLI, `close` at the end."""

    def __init__(self, client: McpClient, server: McpServer) -> None:
        self._client = client
        self._server = server
        self._session: str | None = None
        self._protocol: str | None = None

    async def send(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """The server's JSON-RPC response; None for a notification. Failures are JSON-RPC errors, never raised."""
        try:
            async with asyncio.timeout(self._server.call_seconds):
                return await self._exchange(message)
        except TimeoutError:
            problem = f"did not answer within {self._server.call_seconds:g} s"
        except (WrapperError, UpstreamFailure) as error:
            problem = str(error)
        return self._failed(message, problem)

    async def close(self) -> None:
        """Tell the server that the conversation is over; bounded, and never raises for what the server does."""
        if self._session is None:
            return
        try:
            async with asyncio.timeout(5):
                (await self._client.ask(self._server, McpAsk("DELETE", self._headers(), None))).close()
        except (TimeoutError, WrapperError):
            return  # the server forgets the session by itself
        finally:
            self._session = None

    async def _exchange(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        ask = McpAsk("POST", self._headers(), msgspec.json.encode(message))
        answer = await self._client.ask(self._server, ask)
        try:
            if answer.status == 404 and self._session is not None:
                self._session = None
                return self._failed(message, "has forgotten the session")
            if answer.status >= 400:
                return self._failed(message, f"answered {answer.status}")
            self._session = answer.headers.get("mcp-session-id") or self._session
            if "id" not in message or "method" not in message or answer.status == 202:
                return (
                    None if "id" not in message or "method" not in message else self._failed(message, "did not answer")
                )
            response = await self._response(answer, message["id"])
        finally:
            answer.close()
        if response is None:
            return self._failed(message, "ended its answer early")
        if message["method"] == "initialize":
            version = as_mapping(response.get("result")).get("protocolVersion")
            self._protocol = version if isinstance(version, str) else None
        return response

    async def _response(self, answer: Answer, wanted: Any) -> dict[str, Any] | None:
        """The response with this id; what else the server says on the way (progress, logs) is dropped."""
        decoder, body, size = SSEDecoder(self._server.max_answer_bytes), bytearray(), 0
        while chunk := await answer.read():
            size += len(chunk)
            if size > self._server.max_answer_bytes:
                raise EventStreamError(f"the answer is larger than {self._server.max_answer_bytes} bytes")
            if not answer.is_stream:
                body += chunk
                continue
            for event in decoder.feed(chunk):
                if (found := _matching(event.data, wanted)) is not None:
                    return found
        return _matching(bytes(body), wanted)

    def _headers(self) -> Headers:
        headers = [("content-type", "application/json"), ("accept", "application/json, text/event-stream")]
        if self._session is not None:
            headers.append(("mcp-session-id", self._session))
        if self._protocol is not None:
            headers.append(("mcp-protocol-version", self._protocol))
        return headers

    def _failed(self, message: Mapping[str, Any], problem: str) -> dict[str, Any] | None:
        if "id" not in message:
            return None
        error = {"code": _FAILED, "message": f"MCP server {self._server.name}: {problem}"}
        return {"jsonrpc": "2.0", "id": message["id"], "error": error}


def _matching(data: bytes, wanted: Any) -> dict[str, Any] | None:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    is_response = isinstance(value, dict) and value.get("id") == wanted and ("result" in value or "error" in value)
    return value if is_response else None
