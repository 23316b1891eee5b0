"""Asking addresses that tenants name: only public ones, no redirects, bounded in time and size."""

from __future__ import annotations

import io
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from claude_wrapper.broker.addresses import Network, forbidden
from claude_wrapper.broker.hosts import Resolver, SystemResolver, addresses_of, canonical
from claude_wrapper.errors import PermissionDenied, UpstreamUnavailable, WrapperError

MAX_ANSWER: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Posted:
    """What came back from a POST."""

    status: int
    content_type: str
    body: bytes = field(repr=False)
    """At most 64 KB."""
    truncated: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Names in lower case."""


class Outward(Protocol):
    """The way out."""

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Posted:
        """Any HTTP answer, redirects included. Raises PermissionDenied for an address that may not be asked,
        UpstreamUnavailable when there is no answer."""
        ...


class CheckedResolver(AbstractResolver):
    """Addresses that may be dialled, and no others."""

    def __init__(self, resolver: Resolver, permitted: tuple[Network, ...]) -> None:
        self._resolver = resolver
        self._permitted = permitted

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        try:
            found = await addresses_of(host, port, self._resolver, self._permitted)
        except WrapperError as error:
            raise OSError(error.message) from error
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in found
        ]

    async def close(self) -> None:
        return None


class HttpOutward:
    """`Outward` over aiohttp. A connection per request: these are rare."""

    def __init__(
        self, *, permitted: tuple[Network, ...] = (), resolver: Resolver | None = None, seconds: float = 20.0
    ) -> None:
        """`permitted`: the operator's own networks, where plain http is allowed too."""
        self._permitted = permitted
        self._resolver = resolver or SystemResolver()
        self._timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=10)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Posted:
        target = checked_url(url, self._permitted)
        connector = aiohttp.TCPConnector(
            resolver=CheckedResolver(self._resolver, self._permitted), use_dns_cache=False, force_close=True
        )
        try:
            async with (
                aiohttp.ClientSession(
                    connector=connector, timeout=self._timeout, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
                ) as session,
                session.post(target, headers=headers, data=io.BytesIO(body), allow_redirects=False) as answer,
            ):
                content = bytearray()
                while len(content) <= MAX_ANSWER and (part := await answer.content.read(MAX_ANSWER + 1 - len(content))):
                    content += part
                return Posted(
                    answer.status,
                    answer.headers.get("content-type", ""),
                    bytes(content[:MAX_ANSWER]),
                    len(content) > MAX_ANSWER,
                    {name.lower(): value for name, value in answer.headers.items()},
                )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            # Not the error's text: it may quote what was sent.
            raise UpstreamUnavailable(f"{target.host} cannot be asked: {type(error).__name__}") from None


def checked_url(url: str, permitted: tuple[Network, ...]) -> URL:
    """A URL that a tenant named and that may be asked; plain http in the operator's own networks alone.

    Raises PermissionDenied. Its host's addresses are checked when they are known (`CheckedResolver`).
    """
    try:
        target = URL(url)
    except ValueError:
        raise PermissionDenied("this is not a URL that can be asked") from None
    if target.scheme not in {"https", "http"} or not target.host or target.user or target.password:
        raise PermissionDenied("only http(s) URLs without a user name can be asked")
    if target.scheme == "http" and not permitted:
        raise PermissionDenied("the URL must begin with https://")
    reason = forbidden(target.host, permitted)
    if reason == "not an address":
        # 2130706433 and 127.1 are addresses to some resolvers and names to us.
        if canonical(target.host) is None or target.host.rstrip(".").rpartition(".")[2][:1].isdigit():
            raise PermissionDenied("the URL must name a host")
    elif reason is not None:
        raise PermissionDenied(f"{target.host} is {reason}")
    return target
