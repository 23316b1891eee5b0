"""The transport of 2024-11-05 (HTTP with SSE): one listening stream for all answers, and a URL for messages that the
server names on it. Servers of before Streamable HTTP speak nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
from yarl import URL

from claude_wrapper.broker.mcp import McpAsk, McpClient, McpServer
from claude_wrapper.broker.upstream import Answer, UpstreamFailure
from claude_wrapper.errors import PermissionDenied, UpstreamUnavailable, WrapperError
from claude_wrapper.wire.sse import SSEDecoder

_HEAD = [("accept", "text/event-stream")]
_POST = [("content-type", "application/json"), ("accept", "application/json")]


class LegacyStream:
    """One listening stream. `open`, `ask` as often as wanted, `close`."""

    def __init__(self, client: McpClient, server: McpServer) -> None:
        self._client = client
        self._server = server
        self._answer: Answer | None = None
        self._reading: asyncio.Task[None] | None = None
        self._target: asyncio.Future[McpServer] | None = None
        self._waiting: dict[Any, asyncio.Future[dict[str, Any]]] = {}

    async def open(self) -> Answer:
        """The head of the stream's answer; anything but 200 is not a stream. Raises WrapperError."""
        self._answer = answer = await self._client.ask(self._server, McpAsk("GET", _HEAD, None))
        if answer.status == 200 and answer.is_stream:
            self._target = asyncio.get_running_loop().create_future()
            self._reading = asyncio.create_task(self._read(answer), name=f"mcp sse {self._server.name}")
        return answer

    @property
    def open_still(self) -> bool:
        """Whether answers can come."""
        return self._reading is not None and not self._reading.done()

    async def ask(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """Send a message and wait for its answer, if it has one. Raises WrapperError; the caller bounds the time."""
        if self._target is None:
            raise UpstreamUnavailable("the listening stream is not open")
        server = await asyncio.shield(self._target)
        wanted = message.get("id") if "method" in message else None
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        if wanted is not None:
            self._waiting[wanted] = future
        try:
            posted = await self._client.ask(server, McpAsk("POST", _POST, msgspec.json.encode(message)))
            posted.close()
            if posted.status >= 300:
                raise UpstreamUnavailable(f"its message URL answered {posted.status}")
            return await future if wanted is not None else None
        finally:
            self._waiting.pop(wanted, None)

    async def close(self) -> None:
        """Hang up."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        if self._answer is not None:
            self._answer.close()

    async def _read(self, answer: Answer) -> None:
        failure: WrapperError = UpstreamUnavailable("the listening stream ended")
        decoder = SSEDecoder(self._server.max_answer_bytes)
        try:
            while chunk := await answer.read():
                for event in decoder.feed(chunk):
                    self._take(event.event or "message", event.data)
        except UpstreamFailure as broken:
            failure = UpstreamUnavailable(broken.message)
        except WrapperError as error:
            failure = error
        finally:
            for future in (self._target, *self._waiting.values()):
                if future is not None and not future.done():
                    future.set_exception(failure)
                    future.exception()  # nobody may be waiting

    def _take(self, name: str, data: bytes) -> None:
        if name == "endpoint":
            self._name_target(data)
            return
        try:
            value = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if isinstance(value, dict) and ("result" in value or "error" in value):
            future = self._waiting.get(value.get("id")) if isinstance(value.get("id"), str | int) else None
            if future is not None and not future.done():
                future.set_result(value)

    def _name_target(self, data: bytes) -> None:
        """Where messages go. The credential goes along, so it must be the same origin."""
        if self._target is None or self._target.done():
            return
        base = URL(self._server.url)
        try:
            url = base.join(URL(data.decode().strip()))
            same = url.origin() == base.origin()
        except ValueError:
            same = False
        if not same:
            raise PermissionDenied("the server names a message URL at another origin")
        self._target.set_result(replace(self._server, url=str(url)))
