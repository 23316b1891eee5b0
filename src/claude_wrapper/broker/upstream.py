"""The HTTP client towards upstreams: one shared aiohttp session, nothing decided here."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from claude_wrapper.broker.inject import Headers
from claude_wrapper.broker.retry import TIMED_OUT, UNREACHABLE

_NO_AUTOMATIC = ("User-Agent", "Content-Type", "Accept", "Accept-Encoding")
_LARGE = 512 * 1024


@dataclass(frozen=True, slots=True)
class Ask:
    """One upstream request."""

    method: str
    url: str
    headers: Headers = field(repr=False)
    body: bytes | None = field(repr=False)


class UpstreamFailure(Exception):
    """No answer, or an answer that broke off."""

    def __init__(self, status: int, message: str, *, dropped: bool = False) -> None:
        """`status` is 502 (unreachable, broken off) or 504 (silent for too long). `dropped`: an idle connection had
        been closed by the other side, which says nothing of the upstream's health."""
        self.status = status
        self.message = message
        self.dropped = dropped
        super().__init__(message)


class Answer:
    """An upstream answer whose head has arrived."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._content = response.content
        self.status = response.status
        self.headers = response.headers

    def header_pairs(self) -> Headers:
        """As they came, repeated ones included."""
        return list(self.headers.items())

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def encoded(self) -> bool:
        """Whether the body is compressed although it was asked not to be."""
        return self.headers.get("content-encoding", "identity").lower() not in {"", "identity"}

    async def read(self) -> bytes:
        """The next bytes as they arrive; empty at the end. Raises UpstreamFailure."""
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise failure_of(error) from error

    async def read_all(self, limit: int) -> bytes:
        """The rest of the body, at most `limit` bytes. Raises UpstreamFailure."""
        pieces: list[bytes] = []
        size = 0
        while size < limit and (chunk := await self.read()):
            pieces.append(chunk)
            size += len(chunk)
        return b"".join(pieces)[:limit]

    def close(self) -> None:
        """Let the connection go: back to the pool if the answer was read to its end, else closed."""
        if self._content.at_eof():
            self._response.release()
        else:
            self._response.close()


class Upstream:
    """The shared client. Use after `start`, within one event loop."""

    def __init__(self, connect_seconds: float, read_seconds: float) -> None:
        self._timeout = aiohttp.ClientTimeout(
            total=None, connect=None, sock_connect=connect_seconds, sock_read=read_seconds
        )
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=50, ttl_dns_cache=60),
            timeout=self._timeout,
            auto_decompress=False,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),  # a cookie of one tenant's answer must not travel with another's call
            skip_auto_headers=_NO_AUTOMATIC,
            read_bufsize=256 * 1024,
            max_line_size=32 * 1024,
            max_field_size=32 * 1024,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ask(self, ask: Ask) -> Answer:
        """Send a request and wait for the head of its answer. Raises UpstreamFailure."""
        if self._session is None:
            raise UpstreamFailure(UNREACHABLE, "The broker's client is not running.")
        body = ask.body
        data = io.BytesIO(body) if body is not None and len(body) > _LARGE else body
        try:
            response = await self._session.request(
                ask.method,
                URL(ask.url, encoded=True),
                headers=CIMultiDict(ask.headers),
                data=data,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise failure_of(error) from error
        return Answer(response)


def failure_of(error: Exception) -> UpstreamFailure:
    """What a client error means. The texts name no address: they reach the process."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return UpstreamFailure(UNREACHABLE, "The upstream did not accept a connection in time.")
    if isinstance(error, TimeoutError):
        return UpstreamFailure(TIMED_OUT, "The upstream was silent for too long.")
    if isinstance(error, aiohttp.ClientConnectorError):
        return UpstreamFailure(UNREACHABLE, "The upstream cannot be reached.")
    if isinstance(error, aiohttp.ClientPayloadError):
        return UpstreamFailure(UNREACHABLE, "The upstream broke off its answer.")
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionError):
        return UpstreamFailure(UNREACHABLE, "The upstream closed the connection without an answer.", dropped=True)
    return UpstreamFailure(UNREACHABLE, f"The upstream's answer cannot be read ({type(error).__name__}).")
