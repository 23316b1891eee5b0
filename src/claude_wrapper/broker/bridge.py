"""One conversation with one remote MCP server (Streamable HTTP), for the CLI's `mcp_message` control requests.

The CLI is told of a server of type `sdk` and sends its JSON-RPC over stdin/stdout; nothing of the network, and nothing of
the credential, is needed inside the sandbox. The server at the other end is somebody else's: whatever it does ends in an
answer or in `McpFailed`, within bounds of time and size.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from claude_wrapper.broker.inject import Headers
from claude_wrapper.broker.legacysse import LegacyStream
from claude_wrapper.broker.mcp import McpAsk, McpClient, McpServer, as_mapping
from claude_wrapper.broker.upstream import Answer, UpstreamFailure
from claude_wrapper.errors import CredentialMissing, NotFound, PermissionDenied, WrapperError
from claude_wrapper.wire.sse import EventStreamError, SSEDecoder

_FAILED: Final = -32000
"""JSON-RPC's range for errors of the implementation."""
_UNKNOWN_METHOD: Final = -32601
_QUICK: Final = frozenset({"initialize", "tools/list", "resources/list", "prompts/list", "ping"})
"""What a server has at hand: its turn waits for these."""
_QUESTIONS: Final = 16
"""Requests of the server that are answered while it answers one of ours."""
_DISCARDED: Final = 64 * 1024
_NOT_STREAMABLE: Final = frozenset({404, 405})
"""What servers of before Streamable HTTP say to a message at the URL of their listening stream."""


class Outcome(enum.StrEnum):
    """How one message went; the label of the metrics."""

    OK = "ok"
    AUTHENTICATION = "authentication"
    FORBIDDEN = "forbidden"
    """The address may not be dialled."""
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    TOO_LARGE = "too_large"
    STATUS = "status"
    PROTOCOL = "protocol"


class McpFailed(Exception):
    """The server gave no answer that can be used. `str()` says why, in words for the caller; it holds no secret."""

    def __init__(self, outcome: Outcome, problem: str) -> None:
        self.outcome = outcome
        self.problem = problem
        super().__init__(problem)


class _ForgottenSession(Exception):
    """The server does not know the session any more."""


Observe = Callable[[str, Outcome, float], None]
"""(method, outcome, seconds) of each message."""


def _unobserved(method: str, outcome: Outcome, seconds: float) -> None:
    del method, outcome, seconds


class McpBridge:
    """`exchange` each message, `close` at the end."""

    def __init__(self, client: McpClient, server: McpServer, *, observe: Observe = _unobserved) -> None:
        self._client = client
        self._server = server
        self._observe = observe
        self._session: str | None = None
        self._protocol: str | None = None
        self._hello: Mapping[str, Any] | None = None
        self._legacy: LegacyStream | None = None

    @property
    def protocol(self) -> str | None:
        """The protocol version that the server chose; None before `initialize`."""
        return self._protocol

    async def exchange(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """The server's JSON-RPC response (its errors too); None for a notification. Raises McpFailed."""
        method, began = str(message.get("method")), time.perf_counter()
        outcome = Outcome.OK
        try:
            return await self._bounded(message, method)
        except McpFailed as failed:
            outcome = failed.outcome
            raise
        finally:
            self._observe(method, outcome, time.perf_counter() - began)

    async def send(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """`exchange`, with failures as JSON-RPC errors."""
        try:
            return await self.exchange(message)
        except McpFailed as failed:
            return error_response(message, f"MCP server {self._server.name}: {failed.problem}")

    async def close(self) -> None:
        """Tell the server that the conversation is over; bounded, and never raises for what the server does."""
        if self._legacy is not None:
            await self._legacy.close()
            self._legacy = None
        if self._session is None:
            return
        try:
            async with asyncio.timeout(5):
                (await self._client.ask(self._server, McpAsk("DELETE", self._headers(), None))).close()
        except (TimeoutError, WrapperError):
            return  # the server forgets the session by itself
        finally:
            self._session = None

    # inside ------------------------------------------------------------------------------------------------------------

    async def _bounded(self, message: Mapping[str, Any], method: str) -> dict[str, Any] | None:
        server = self._server
        seconds = min(server.connect_seconds, server.call_seconds) if method in _QUICK else server.call_seconds
        try:
            async with asyncio.timeout(seconds):
                try:
                    return await self._once(message, method)
                except _ForgottenSession:
                    await self._begin_again()
                    return await self._once(message, method)
        except TimeoutError:
            raise McpFailed(Outcome.TIMEOUT, f"did not answer within {seconds:g} s") from None
        except _ForgottenSession:
            raise McpFailed(Outcome.PROTOCOL, "forgets its sessions") from None
        except PermissionDenied as error:
            raise McpFailed(Outcome.FORBIDDEN, error.message) from error
        except (CredentialMissing, NotFound) as error:
            raise McpFailed(Outcome.AUTHENTICATION, error.message) from error
        except EventStreamError as error:
            raise McpFailed(Outcome.TOO_LARGE, error.message) from error
        except (WrapperError, UpstreamFailure) as error:
            raise McpFailed(Outcome.UNREACHABLE, error.message) from error

    async def _begin_again(self) -> None:
        """A session in place of one that the server lost (it answers 404 then: it may have been restarted)."""
        self._session = self._protocol = None
        if self._hello is None:
            raise _ForgottenSession
        await self._once({**self._hello, "id": "again"}, "initialize")
        await self._once({"jsonrpc": "2.0", "method": "notifications/initialized"}, "notifications/initialized")

    async def _once(self, message: Mapping[str, Any], method: str) -> dict[str, Any] | None:
        if method == "initialize":
            self._session = self._protocol = None
            if self._server.legacy or self._legacy is not None:
                return await self._begin_legacy(message)
        if self._legacy is not None:
            if not self._legacy.open_still:
                raise _ForgottenSession
            return await self._legacy.ask(message)
        wants_answer = "id" in message and "method" in message
        answer = await self._client.ask(self._server, McpAsk("POST", self._headers(), msgspec.json.encode(message)))
        try:
            if method == "initialize" and answer.status in _NOT_STREAMABLE:
                return await self._begin_legacy(message, instead=answer)
            await self._check(answer)
            self._session = answer.headers.get("mcp-session-id") or self._session
            if not wants_answer:
                return None
            if answer.status == 202:
                raise McpFailed(Outcome.PROTOCOL, "did not answer")
            response = await self._response(answer, message["id"])
        finally:
            answer.close()
        if response is None:
            raise McpFailed(Outcome.PROTOCOL, "ended its answer early, or it is not JSON-RPC")
        if method == "initialize" and "result" in response:
            version = as_mapping(response["result"]).get("protocolVersion")
            self._protocol = version if isinstance(version, str) and version.isprintable() else None
            self._hello = dict(message)
        return response

    async def _begin_legacy(self, message: Mapping[str, Any], instead: Answer | None = None) -> dict[str, Any] | None:
        """The transport of before Streamable HTTP, for a server that has `instead` refused a message at its URL."""
        if self._legacy is not None:
            await self._legacy.close()
        self._legacy = legacy = LegacyStream(self._client, self._server)
        answer = await legacy.open()
        if answer.status != 200 or not answer.is_stream:
            self._legacy = None
            await legacy.close()
            await self._check(instead or answer)
            raise McpFailed(Outcome.PROTOCOL, "does not open a listening stream")
        response = await legacy.ask(message)
        self._hello = dict(message)
        version = as_mapping((response or {}).get("result")).get("protocolVersion")
        self._protocol = version if isinstance(version, str) and version.isprintable() else None
        return response

    async def _check(self, answer: Answer) -> None:
        status = answer.status
        if status == 404 and self._session is not None:
            raise _ForgottenSession
        if status in {401, 403}:
            words = "needs a credential" if self._server.credential is None else "does not take its credential"
            raise McpFailed(Outcome.AUTHENTICATION, f"{words} (it answered {status})")
        if status >= 400 or 300 <= status < 400:
            if status == 400 and self._session is not None and b"session" in await answer.read_all(_DISCARDED):
                raise _ForgottenSession  # servers in the wild, where the specification has 404
            raise McpFailed(Outcome.STATUS, f"answered {status}")

    async def _response(self, answer: Answer, wanted: Any) -> dict[str, Any] | None:
        """The response with this id. Progress and logs on the way are dropped, questions of the server answered."""
        bound = self._server.max_answer_bytes
        decoder, body, size, questions = SSEDecoder(bound), bytearray(), 0, 0
        while chunk := await answer.read():
            size += len(chunk)
            if size > bound:
                raise McpFailed(Outcome.TOO_LARGE, f"gave an answer larger than {bound} bytes")
            if not answer.is_stream:
                body += chunk
                continue
            for event in decoder.feed(chunk):
                value = _object(event.data)
                if _answers(value, wanted):
                    return value
                if value is not None and "method" in value and "id" in value and questions < _QUESTIONS:
                    questions += 1
                    await self._answer_question(value)
        value = _object(bytes(body))
        return value if _answers(value, wanted) else None

    async def _answer_question(self, question: Mapping[str, Any]) -> None:
        """A server that asks (sampling, roots, elicitation) gets a no at once, instead of waiting for ever."""
        reply: dict[str, Any] = {"jsonrpc": "2.0", "id": question["id"]}
        if question["method"] == "ping":
            reply["result"] = {}
        else:
            reply["error"] = {"code": _UNKNOWN_METHOD, "message": "this client answers no requests"}
        (await self._client.ask(self._server, McpAsk("POST", self._headers(), msgspec.json.encode(reply)))).close()

    def _headers(self) -> Headers:
        headers = [("content-type", "application/json"), ("accept", "application/json, text/event-stream")]
        if self._session is not None:
            headers.append(("mcp-session-id", self._session))
        if self._protocol is not None:
            headers.append(("mcp-protocol-version", self._protocol))
        return headers


def error_response(message: Mapping[str, Any], text: str, code: int = _FAILED) -> dict[str, Any] | None:
    """A JSON-RPC error in answer to `message`; None for a notification."""
    if "id" not in message:
        return None
    return {"jsonrpc": "2.0", "id": message["id"], "error": {"code": code, "message": text}}


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _answers(value: Mapping[str, Any] | None, wanted: Any) -> bool:
    return value is not None and value.get("id") == wanted and ("result" in value or "error" in value)
