"""The listener's side of HTTP/1.1: one connection of a process, parsed by httptools, one request at a time.

Why not a web framework: a streamed event costs a write and nothing else here (see docs/decisions/broker-listener.md).
What a client of the Messages API does not do is not supported: pipelining, HTTP/1.0, upgrades, CONNECT.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol

import httptools

from claude_wrapper.broker.refusals import BUFFERS_FULL, INTERNAL, Refusal, Refused
from claude_wrapper.broker.settings import BrokerSettings

MAX_HEADERS = 128
LINGER_SECONDS = 2.0
_REASONS = {status.value: status.phrase for status in HTTPStatus}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(slots=True)
class Head:
    """Request line and headers, as they came."""

    method: str
    target: str
    headers: list[tuple[str, str]] = field(repr=False)


class Handler(Protocol):
    """Who answers a request; chosen by its head, before the body is read."""

    def hold(self, size: int) -> bool:
        """Room for `size` more bytes of request body; False: there is none."""
        ...

    def release(self, size: int) -> None:
        """Room that was held and is free again."""
        ...

    async def handle(self, head: Head, body: bytes, reply: Reply) -> None:
        """Answer through `reply`. Cancelled when the process disconnects."""
        ...


class Front(Protocol):
    """What a listener opens on."""

    def enter(self, connection: Connection) -> bool:
        """A connection was made; False: no room, it is closed at once."""
        ...

    def leave(self, connection: Connection) -> None:
        """A connection that had entered is gone."""
        ...

    def choose(self, head: Head, connection: Connection) -> Handler:
        """Who answers; raises `Refused`. May rewrite the head's target."""
        ...

    def fault(self, error: BaseException) -> None:
        """A handler raised something that it should not have."""
        ...


class Reply:
    """The answer to one request."""

    def __init__(self, connection: Connection, *, head_only: bool) -> None:
        self._connection = connection
        self._head_only = head_only
        self._chunked = False
        self.started = False
        self.ended = False

    def start(self, status: int, headers: Iterable[tuple[str, str]], *, length: int | None = None) -> None:
        """Send the head. Without a length the body is sent in chunks."""
        self.started = True
        self._chunked = length is None and not self._head_only
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in headers]
        lines.append(
            "transfer-encoding: chunked\r\n\r\n" if self._chunked else f"content-length: {length or 0}\r\n\r\n"
        )
        self._connection.send("".join(lines).encode("utf-8", "surrogateescape"))

    def feed(self, data: bytes) -> None:
        """Send a piece of the body; afterwards wait on `drain` while `congested`."""
        if self._head_only or not data:
            return
        self._connection.send(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    @property
    def congested(self) -> bool:
        """Whether the process does not read as fast as is written."""
        return self._connection.congested

    async def drain(self) -> None:
        """Wait until the process has read. Raises TimeoutError when it does not within the bound."""
        await self._connection.drain()

    def finish(self) -> None:
        """The body is complete."""
        self.ended = True
        if self._chunked:
            self._connection.send(_LAST_CHUNK)

    def whole(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """Head, body and end in one."""
        self.start(status, headers, length=len(body))
        self.feed(body)
        self.finish()

    def refuse(self, refusal: Refusal, *, closing: bool = False) -> None:
        """An Anthropic-shaped error."""
        headers = refusal.headers()
        if closing:
            headers.append(("connection", "close"))
        self.whole(refusal.status, headers, refusal.body())

    def cut(self) -> None:
        """Break off: what was written is delivered, the end of the body is not."""
        self.ended = True
        self._connection.close()


@dataclass(slots=True)
class _Incoming:
    """A request as far as it has arrived."""

    url: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)
    head: Head | None = None
    handler: Handler | None = None
    body: list[bytes] = field(default_factory=list)
    held: int = 0
    head_size: int = 0
    head_done: bool = False
    message_done: bool = False
    refusal: Refusal | None = None

    def refuse(self, refusal: Refusal) -> None:
        """The first reason stands."""
        self.refusal = self.refusal or refusal


class Connection(asyncio.Protocol):
    """One connection of a process."""

    def __init__(self, front: Front, settings: BrokerSettings) -> None:
        self._front = front
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpRequestParser = httptools.HttpRequestParser(self)
        self._entered = False
        self._drained: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._lingering = False
        self._discarded = 0
        self._in = _Incoming()

    # The transport's side ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 (stream transports only; for the type checker)
        self._transport = transport
        transport.set_write_buffer_limits(high=self._settings.write_buffer_bytes)
        self._entered = self._front.enter(self)
        if not self._entered:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            self._discard(data)
            return
        if self._task is not None:
            self.abort()  # a second request before the answer to the first: pipelining, or an attack
            return
        if self._timer is None:
            self._timer = self._loop.call_later(self._settings.receive_seconds, self._too_slow)
        if not self._in.head_done:
            self._in.head_size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._in.refuse(Refusal(400, "invalid_request_error", "Upgrades are not supported."))
        except httptools.HttpParserError:
            self._in.refuse(Refusal(400, "invalid_request_error", "This is not a valid HTTP request."))
        if not self._in.head_done and self._in.head_size > self._settings.max_head_bytes:
            self._in.refuse(_HEAD_TOO_LARGE)
        if self._in.refusal is not None:
            self._refuse_and_close(self._in.refusal)
        elif self._in.message_done:
            self._begin()

    def eof_received(self) -> None:
        return None  # a half-closed connection is a closed one: nobody reads the answer

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._drained is not None:
            self._drained.set()
        if self._task is not None:
            self._task.cancel()
        else:
            self._release()
        if self._entered:
            self._entered = False
            self._front.leave(self)

    def pause_writing(self) -> None:
        self._drained = asyncio.Event()

    def resume_writing(self) -> None:
        if self._drained is not None:
            self._drained.set()
            self._drained = None

    # The parser's side: these must not raise -----------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._in.message_done:
            self._in.refusal = _PIPELINED

    def on_url(self, url: bytes) -> None:
        self._in.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._in.headers.append((name.decode("latin-1"), value.decode("utf-8", "surrogateescape")))
        if len(self._in.headers) > MAX_HEADERS:
            self._in.refusal = _HEAD_TOO_LARGE

    def on_headers_complete(self) -> None:
        self._in.head_done = True
        if self._in.refusal is not None:
            return
        if len(self._in.url) + sum(len(n) + len(v) for n, v in self._in.headers) > self._settings.max_head_bytes:
            self._in.refusal = _HEAD_TOO_LARGE
            return
        if self._parser.get_http_version() != "1.1":
            self._in.refusal = Refusal(505, "invalid_request_error", "Only HTTP/1.1 is spoken here.")
            return
        head = Head(self._parser.get_method().decode("latin-1"), self._in.url.decode("latin-1"), self._in.headers)
        try:
            self._in.handler = self._front.choose(head, self)
        except Refused as refused:
            self._in.refusal = refused.refusal
            return
        except Exception as error:  # noqa: BLE001 (the parser would swallow it)
            self._front.fault(error)
            self._in.refusal = INTERNAL
            return
        self._in.head = head
        self._announced(head)

    def on_body(self, body: bytes) -> None:
        if self._in.refusal is not None or self._in.handler is None:
            return
        if self._in.held + len(body) > self._settings.max_body_bytes:
            self._in.refusal = _too_large(self._settings.max_body_bytes)
        elif not self._in.handler.hold(len(body)):
            self._in.refusal = BUFFERS_FULL
        else:
            self._in.held += len(body)
            self._in.body.append(body)

    def on_message_complete(self) -> None:
        self._in.message_done = True

    # Ours ----------------------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    @property
    def congested(self) -> bool:
        return self._drained is not None and not self._drained.is_set()

    async def drain(self) -> None:
        if self._drained is not None:
            async with asyncio.timeout(self._settings.stall_seconds):
                await self._drained.wait()

    def close(self) -> None:
        """Deliver what was written, then close."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _announced(self, head: Head) -> None:
        """Refuse by the announced length before a byte of it is read; answer an expectation."""
        for name, value in head.headers:
            lower = name.lower()
            if lower == "content-length" and value.isdigit() and int(value) > self._settings.max_body_bytes:
                self._in.refusal = _too_large(self._settings.max_body_bytes)
                return
            if lower == "expect" and value.lower() == "100-continue":
                self.send(_CONTINUE)

    def _begin(self) -> None:
        self._stop_timer()
        head, handler = self._in.head, self._in.handler
        if head is None or handler is None:
            self.abort()
            return
        body = self._in.body[0] if len(self._in.body) == 1 else b"".join(self._in.body)
        self._in.body = []
        reply = Reply(self, head_only=head.method == "HEAD")
        self._task = self._loop.create_task(self._run(handler, head, body, reply))

    async def _run(self, handler: Handler, head: Head, body: bytes, reply: Reply) -> None:
        try:
            await handler.handle(head, body, reply)
        except Refused as refused:
            self._apologise(reply, refused.refusal)
        except asyncio.CancelledError:
            reply.cut()
            raise
        except Exception as error:  # noqa: BLE001 (one request must not take the listener down)
            self._front.fault(error)
            self._apologise(reply, INTERNAL)
        finally:
            self._release()
            self._task = None
            keep_alive = reply.ended and self._parser.should_keep_alive()
            if not keep_alive:
                self.close()
            self._in = _Incoming()

    @staticmethod
    def _apologise(reply: Reply, refusal: Refusal) -> None:
        if reply.started:
            reply.cut()
        else:
            reply.refuse(refusal)

    def _refuse_and_close(self, refusal: Refusal) -> None:
        """Answer, then read on for a moment: closing on unread bytes would take the answer from the process."""
        self._stop_timer()
        self._release()
        Reply(self, head_only=False).refuse(refusal, closing=True)
        self._lingering = True
        self._timer = self._loop.call_later(LINGER_SECONDS, self.abort)

    def _discard(self, data: bytes) -> None:
        self._discarded += len(data)
        if self._discarded > self._settings.max_body_bytes:
            self.abort()

    def _too_slow(self) -> None:
        self._timer = None
        self._in.refusal = Refusal(408, "invalid_request_error", "The request did not arrive in time.")
        self._refuse_and_close(self._in.refusal)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _release(self) -> None:
        if self._in.handler is not None and self._in.held:
            self._in.handler.release(self._in.held)
        self._in.held = 0
        self._in.body = []


_PIPELINED = Refusal(400, "invalid_request_error", "One request at a time, please.")
_HEAD_TOO_LARGE = Refusal(431, "invalid_request_error", "The head of the request is too large.")


def _too_large(limit: int) -> Refusal:
    return Refusal(413, "request_too_large", f"The request body is larger than {limit} bytes.")
