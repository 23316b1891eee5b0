"""Both ends as bytes: an upstream that writes just what a test says, and a process that sends just what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from claude_wrapper.broker import Endpoint

Write = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class RawUpstream:
    """`answers` are taken in turn, the last one for ever."""

    answers: list[Write]
    url: str = ""
    requests: list[bytes] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    """The broker hung up on an answer."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(length[0].split(b":")[1])) if length else b""
                self.requests.append(head + body)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                answering = asyncio.ensure_future(answer(writer))
                watching = asyncio.ensure_future(reader.read(1))
                done, _ = await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
                if answering not in done:
                    self.closed.set()
                    answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)
                if answering not in done:
                    return
                watching.cancel()
                await asyncio.wait({watching})
                if writer.is_closing():
                    return
        except (ConnectionError, asyncio.IncompleteReadError, RuntimeError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def raw_upstream(*answers: Write) -> AsyncIterator[RawUpstream]:
    upstream = RawUpstream(list(answers))
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield upstream
    finally:
        server.close()


def pieces(*parts: bytes, status: str = "200 OK", headers: str = "content-type: text/event-stream") -> Write:
    """An answer in chunks, each written by itself."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status}\r\n{headers}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for part in parts:
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    return answer


def whole(status: str, body: bytes, headers: str = "content-type: application/json") -> Write:
    """An answer with a length."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status}\r\n{headers}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    return answer


def then(first: bytes, what: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> Write:
    """The head and a first piece of a stream, then something else."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%b\r\n" % (len(first), first))
        await writer.drain()
        await what(writer)

    return answer


async def hang(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def drop(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def exchange(endpoint: Endpoint, *parts: bytes, eof: bool = False) -> bytes:
    """Send bytes to an endpoint's socket; what came back until it closed, or until it waits for more."""
    reader, writer = await asyncio.open_unix_connection(str(endpoint.socket))
    got = b""
    try:
        for part in parts:
            writer.write(part)
            with suppress(ConnectionError):
                await writer.drain()
        if eof:
            writer.write_eof()
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(3):
                while piece := await reader.read(65536):
                    got += piece
                    if not eof and complete(got):
                        break
    finally:
        writer.close()
    return got


def complete(answer: bytes) -> bool:
    head, mark, body = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    if not mark:
        return False
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return len(body) >= int(lengths[0].split(b":")[1]) if lengths else body.endswith(b"0\r\n\r\n")


def request(
    endpoint: Endpoint, body: bytes, *, target: str = "/v1/messages", method: str = "POST", extra: str = ""
) -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nhost: x\r\nx-api-key: {endpoint.token}\r\n{extra}"
    return (head + f"content-length: {len(body)}\r\n\r\n").encode() + body
