"""A client that costs little: raw HTTP/1.1 over a kept connection, nothing parsed that is not needed."""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

from bench.processes import KEY, MODEL, ServerProcess

_DELTA = b"event: content_block_delta"


@dataclass(slots=True)
class Reply:
    """One answer; times in seconds from the first byte sent."""

    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)
    first: float
    """To the first text; NaN if there was none."""
    total: float

    @property
    def kind(self) -> str:
        return self.headers.get("cw-process", "?")

    @property
    def pid(self) -> int:
        return int(self.headers["cw-process-pid"])


class Connection:
    """One kept connection to the server."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Connection:
        self._streams = await asyncio.open_connection(self._server.host, self._server.port, limit=1 << 20)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._streams is not None
        self._streams[1].close()

    async def get(self, path: str) -> Any:
        """The JSON of a GET."""
        return json.loads((await self.request("GET", path, b"")).body)

    async def message(self, body: dict[str, Any]) -> Reply:
        """`POST /v1/messages`."""
        return await self.request("POST", "/v1/messages", json.dumps(body).encode())

    async def request(self, method: str, path: str, body: bytes) -> Reply:
        assert self._streams is not None
        reader, writer = self._streams
        began = time.perf_counter()
        writer.write(
            f"{method} {path} HTTP/1.1\r\nhost: bench\r\nx-api-key: {KEY}\r\nanthropic-version: 2023-06-01\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        first = math.nan
        if "content-length" in headers:
            content = await reader.readexactly(int(headers["content-length"]))
        else:
            pieces: list[bytes] = []
            while size := int(await reader.readline(), 16):
                piece = (await reader.readexactly(size + 2))[:-2]
                if math.isnan(first) and _DELTA in piece:
                    first = time.perf_counter() - began
                pieces.append(piece)
            await reader.readexactly(2)
            content = b"".join(pieces)
        return Reply(int(head[0].split()[1]), headers, content, first, time.perf_counter() - began)


class WrongAnswer(Exception):
    """An answer that was not the right one."""


class Conversation:
    """A caller that keeps its history itself and sends all of it with every request, as the API's clients do."""

    def __init__(self, connection: Connection, *, session: str | None = None, **fields: Any) -> None:
        self._connection = connection
        self._session = session
        self._fields = fields
        self._history: list[dict[str, Any]] = []

    async def ask(self, text: str, *, expect: str | None = None) -> Reply:
        """One streamed turn. Raises WrongAnswer when the answer is not the one to this question."""
        question = {"role": "user", "content": text}
        messages = [question] if self._session else [*self._history, question]
        body = {"model": MODEL, "max_tokens": 1024, "stream": True, "messages": messages, **self._fields}
        if self._session:
            body["session_id"] = self._session
        reply = await self._connection.message(body)
        answer = text_of(reply.body)
        if reply.status != 200 or answer != (expected := f"You said: {text}" if expect is None else expect):
            raise WrongAnswer(f"{reply.status}: {reply.body[-300:]!r}, expected {expected[:80]!r}")
        self._history += [question, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return reply


def text_of(stream: bytes) -> str:
    """The text of a Messages event stream."""
    deltas = (
        json.loads(line[6:])["delta"].get("text", "")
        for line in stream.splitlines()
        if line.startswith(b'data: {"type":"content_block_delta"')
    )
    return "".join(deltas)


async def wait_for_spares(connection: Connection, count: int, *, limit: float = 120) -> None:
    """Until `count` spares wait."""
    async with asyncio.timeout(limit):
        while (await connection.get("/v1/pool/stats"))["spares"].get("chat", 0) < count:
            await asyncio.sleep(0.05)
