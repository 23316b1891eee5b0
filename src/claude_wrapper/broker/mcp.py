"""Remote MCP servers: asked from out here, with credentials that the process never sees.

The server bridges the CLI's `mcp_message` control requests (`claude_wrapper.broker.bridge`) through `McpClient`:
addresses are checked after resolution and the checked one is dialled, redirects are followed one by one and checked
again, size and time are bounded.
"""

from __future__ import annotations

import io
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from multidict import CIMultiDict
from yarl import URL

from claude_wrapper.broker.addresses import Network, forbidden
from claude_wrapper.broker.hosts import Resolver, SystemResolver, addresses_of, canonical
from claude_wrapper.broker.inject import Headers
from claude_wrapper.broker.upstream import Answer, failure_of
from claude_wrapper.errors import PermissionDenied, UpstreamUnavailable, WrapperError
from claude_wrapper.wire.extensions import FRAMING

MAX_REDIRECTS = 3
_SENT_ON = frozenset({"accept", "content-type", "last-event-id", "user-agent", "traceparent", "tracestate"})


class McpCredential(Protocol):
    """Where the headers of a server's credential come from."""

    async def headers(self, *, refused: bool) -> Mapping[str, str]:
        """`refused`: the last ones were answered with 401; get new ones (an expired token is refreshed)."""
        ...


@dataclass(frozen=True, slots=True)
class FixedHeaders:
    """A credential that does not change."""

    values: Mapping[str, str] = field(repr=False)

    async def headers(self, *, refused: bool) -> Mapping[str, str]:
        return {} if refused else self.values


@dataclass(frozen=True, slots=True)
class McpServer:
    """A remote server as a session may use it."""

    name: str
    url: str
    credential: McpCredential | None = None
    call_seconds: float = 300.0
    """Time for one message, its answer included."""
    connect_seconds: float = 10.0
    """Time for what a turn waits for before its model is asked: `initialize` and the lists."""
    max_answer_bytes: int = 16 * 1024 * 1024
    legacy: bool = False
    """Speaks the transport of 2024-11-05; one that turns out to is found out."""


@dataclass(frozen=True, slots=True)
class McpAsk:
    """One request to a server."""

    method: str
    headers: Headers = field(repr=False)
    body: bytes | None = field(repr=False)


class _ForbiddenAddress(OSError):
    """The resolver's word, in the one kind of error that aiohttp expects of it."""


class _CheckedResolver(AbstractResolver):
    def __init__(self, resolver: Resolver, permitted: tuple[Network, ...]) -> None:
        self._resolver = resolver
        self._permitted = permitted

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        try:
            addresses = await addresses_of(host, port, self._resolver, self._permitted)
        except WrapperError as error:
            kind = _ForbiddenAddress if isinstance(error, PermissionDenied) else OSError
            raise kind(error.message) from error
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        return None


class McpClient:
    """The shared client towards remote MCP servers."""

    def __init__(self, *, permitted: tuple[Network, ...] = (), resolver: Resolver | None = None) -> None:
        """`permitted`: the operator's own networks, where plain http is allowed too."""
        self._permitted = permitted
        self._resolver = _CheckedResolver(resolver or SystemResolver(), permitted)
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, resolver=self._resolver, use_dns_cache=False, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=None),
            auto_decompress=False,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Content-Type", "Accept", "Accept-Encoding"),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ask(self, server: McpServer, ask: McpAsk) -> Answer:
        """The head of the server's answer. Raises UpstreamUnavailable, PermissionDenied. The caller bounds the time.

        A 401 is answered once by asking the credential for new headers.
        """
        answer = await self._ask(server, ask, await _credential(server, refused=False))
        if answer.status != 401 or server.credential is None:
            return answer
        renewed = await _credential(server, refused=True)
        if not renewed:
            return answer
        answer.close()
        return await self._ask(server, ask, renewed)

    async def _ask(self, server: McpServer, ask: McpAsk, credential: Mapping[str, str]) -> Answer:
        first = url = URL(server.url)
        for _ in range(MAX_REDIRECTS + 1):
            self._check(url)
            own = url.origin() == first.origin()
            answer = await self._once(url, ask, credential if own else {}, own=own)
            target = _redirected(answer, url, ask.method)
            if target is None:
                return answer
            answer.close()
            url = target
        raise UpstreamUnavailable(f"MCP server {server.name}: more than {MAX_REDIRECTS} redirects")

    def _check(self, url: URL) -> None:
        """Scheme and literal address; names are checked when they are resolved. Raises PermissionDenied."""
        if url.scheme not in {"https", "http"} or not url.host or url.user or url.password:
            raise PermissionDenied("the URL of an MCP server must be https://host/path, without a user name")
        if url.scheme == "http" and not self._permitted:
            raise PermissionDenied("the URL of an MCP server must begin with https://")
        if _literal(url.host):
            reason = forbidden(url.host, self._permitted)
            if reason is not None:
                raise PermissionDenied(f"{url.host} is {reason}")
        elif canonical(url.host) is None or url.host.rstrip(".").rpartition(".")[2][:1].isdigit():
            raise PermissionDenied("the URL of an MCP server must name a host")  # 2130706433 and 127.1 are addresses

    async def _once(self, url: URL, ask: McpAsk, credential: Mapping[str, str], *, own: bool) -> Answer:
        if self._session is None:
            raise UpstreamUnavailable("the broker's MCP client is not running")
        replaced = {name.lower() for name in credential}
        headers: CIMultiDict[str] = CIMultiDict()
        for name, value in ask.headers:
            lower = name.lower()
            passes = lower in _SENT_ON or (lower.startswith("mcp-") and own)
            if passes and lower not in replaced:
                headers.add(name, value)
        headers["accept-encoding"] = "identity"
        headers.update({name: value for name, value in credential.items() if name.lower() not in FRAMING})
        body = io.BytesIO(ask.body) if ask.body is not None else None
        try:
            response = await self._session.request(ask.method, url, headers=headers, data=body, allow_redirects=False)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            if isinstance(found := getattr(error, "os_error", None), _ForbiddenAddress):
                raise PermissionDenied(str(found)) from error
            raise UpstreamUnavailable(failure_of(error).message.replace("upstream", "MCP server")) from error
        return Answer(response)


async def _credential(server: McpServer, *, refused: bool) -> Mapping[str, str]:
    return await server.credential.headers(refused=refused) if server.credential is not None else {}


def _redirected(answer: Answer, url: URL, method: str) -> URL | None:
    """Where a redirect leads. A message is only sent on where the status keeps the method."""
    keeps = answer.status in {307, 308} or (method == "GET" and answer.status in {301, 302, 303})
    location = answer.headers.get("location")
    if not keeps or not location:
        return None
    try:
        target = url.join(URL(location))
    except ValueError:
        raise UpstreamUnavailable("the MCP server redirects to something that is no URL") from None
    if url.scheme == "https" and target.scheme != "https":
        raise PermissionDenied("the MCP server redirects from https to http")
    return target


def _literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object, or an empty one."""
    return value if isinstance(value, Mapping) else {}
