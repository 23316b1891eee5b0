"""The way of one `git clone` to its server: a loopback address that puts the token in and lets nothing else through.

git is given this address in place of the repository's, so that it never has the token, in no argument, environment or
file. The gateway dials addresses that it has checked (no private ones), follows redirects on the same host alone, lets
reading through and nothing else, and counts the bytes.
"""

from __future__ import annotations

import base64
import io
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from yarl import URL

from claude_wrapper.broker.addresses import Network
from claude_wrapper.broker.hosts import Resolver, SystemResolver
from claude_wrapper.errors import WrapperError
from claude_wrapper.sessions.resources.outward import CheckedResolver, checked_url

_SENT_ON: Final = frozenset({"accept", "content-type", "content-encoding", "git-protocol", "user-agent"})
_SENT_BACK: Final = frozenset({"content-type", "cache-control"})
_MAX_REQUEST: Final = 16 * 2**20
_MAX_REDIRECTS: Final = 3
_PIECE: Final = 1 << 16
_USER: Final = "x-access-token"
"""What GitHub expects as the user name beside a token; other hosts ignore it."""


@dataclass(slots=True)
class Passage:
    """What passed, and why it ended if it did not end well."""

    url: str
    """What git is to clone."""
    status: int | None = None
    """The server's first answer that was no success."""
    problem: str | None = None
    """What the gateway itself refused or could not do."""
    received: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """A repository to be read."""

    url: str
    token: str | None = field(default=None, repr=False)


@asynccontextmanager
async def gateway(
    source: Source, *, permitted: tuple[Network, ...], most: int, resolver: Resolver | None = None
) -> AsyncIterator[Passage]:
    """Open while the context lasts. `most`: bytes that the server may send. Raises PermissionDenied for the address."""
    target = checked_url(source.url, permitted)
    secret = secrets.token_urlsafe(32)
    connector = aiohttp.TCPConnector(
        resolver=CheckedResolver(resolver or SystemResolver(), permitted), use_dns_cache=False, force_close=True
    )
    client = aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60),
        auto_decompress=False,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Content-Type", "Accept", "Accept-Encoding"),
    )
    passage = Passage("")
    passing = _Passing(client, passage, source, secret, most)
    runner = web.ServerRunner(web.Server(passing.handle, access_log=None), shutdown_timeout=1)
    async with client:
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            passage.url = f"http://127.0.0.1:{port}/{secret}/{_name(target)}"
            yield passage
        finally:
            await runner.cleanup()


def _name(target: URL) -> str:
    """Only for git's messages."""
    return "".join(one for one in target.name if one.isascii() and one.isalnum()) or "repository"


class _Passing:
    def __init__(self, client: aiohttp.ClientSession, passage: Passage, source: Source, secret: str, most: int) -> None:
        self._client = client
        self._passage = passage
        self._base = URL(source.url.rstrip("/"))
        self._headers: dict[str, str] = {}
        if source.token is not None:
            packed = base64.b64encode(f"{_USER}:{source.token}".encode()).decode()
            self._headers["authorization"] = f"Basic {packed}"
        self._secret = secret
        self._most = most

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        parts = request.path.split("/", 3)
        if len(parts) != 4 or not secrets.compare_digest(parts[1], self._secret):
            return web.Response(status=404)
        asked = (request.method, parts[3], request.query_string)
        if asked not in {("GET", "info/refs", "service=git-upload-pack"), ("POST", "git-upload-pack", "")}:
            return web.Response(status=403, text="only reading is let through\n")
        body = bytearray()
        async for piece in request.content.iter_chunked(_PIECE):
            body += piece
            if len(body) > _MAX_REQUEST:
                return web.Response(status=413)
        sent = {name: value for name, value in request.headers.items() if name.lower() in _SENT_ON}
        try:
            return await self._pass_on(request, parts[3], sent | self._headers, bytes(body))
        except (aiohttp.ClientError, TimeoutError, OSError, WrapperError) as error:
            self._passage.problem = self._passage.problem or _reason(error)
            return web.Response(status=502, text="the server cannot be reached\n")

    async def _pass_on(
        self, request: web.BaseRequest, place: str, headers: Mapping[str, str], body: bytes
    ) -> web.StreamResponse:
        for _ in range(_MAX_REDIRECTS + 1):
            url = URL(f"{self._base}/{place}", encoded=True)
            if request.method == "GET":
                url = url.with_query(service="git-upload-pack")
            data = io.BytesIO(body) if request.method == "POST" else None
            async with self._client.request(
                request.method, url, headers=headers, data=data, allow_redirects=False
            ) as answer:
                moved = answer.headers.get("location") if answer.status in {301, 302, 307, 308} else None
                if moved is None:
                    return await self._answer(request, answer)
                self._follow(url.join(URL(moved)), place)
        return self._refuse("it is redirected too often")

    def _follow(self, to: URL, place: str) -> None:
        """The repository moved: on the same server only, since the token is for that one."""
        base = self._base
        if place != "info/refs" or to.origin() != base.origin() or not to.path.endswith("/info/refs"):
            raise WrapperError("it is redirected to another place, which is not followed")
        self._base = to.with_query(None).with_path(to.path.removesuffix("/info/refs"))

    async def _answer(self, request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        passage = self._passage
        if answer.status != 200:
            passage.status = passage.status or answer.status
            return web.Response(status=answer.status)
        back = web.StreamResponse(status=200)
        back.headers.update({name: value for name, value in answer.headers.items() if name.lower() in _SENT_BACK})
        await back.prepare(request)
        async for piece in answer.content.iter_chunked(_PIECE):
            passage.received += len(piece)
            if passage.received > self._most:
                passage.problem = f"it has more than {self._most} bytes to send"
                if request.transport is not None:
                    request.transport.abort()
                return back
            await back.write(piece)
        await back.write_eof()
        return back

    def _refuse(self, problem: str) -> web.Response:
        self._passage.problem = problem
        return web.Response(status=502)


def _reason(error: BaseException) -> str:
    """Not the text of a client's error: it may quote what was sent."""
    if isinstance(error, WrapperError):
        return error.message
    cause: Any = error
    while cause is not None:
        # The resolver's word about an address that may not be dialled.
        if isinstance(cause, OSError) and str(cause).find(" leads to ") > 0 and urlsplit(str(cause)).scheme == "":
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return f"its server cannot be reached: {type(error).__name__}"
