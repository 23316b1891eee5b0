"""Host allow-lists, and turning a name into addresses that may be dialled."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from claude_wrapper.broker.addresses import Network, forbidden
from claude_wrapper.errors import ConfigurationError, PermissionDenied, UpstreamUnavailable

RESOLVE_SECONDS = 5.0
MAX_ADDRESSES = 8

_NAME = re.compile(
    r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\Z"
)
_PATTERN = re.compile(r"(?P<host>\*|(?:\*\.)?[a-z0-9_][a-z0-9_.-]*)(?::(?P<port>\d{1,5}))?\Z")
DEFAULT_PORTS = frozenset({443})


@dataclass(frozen=True, slots=True)
class HostRule:
    """One entry of an allow-list: `pypi.org`, `*.githubusercontent.com` (below, not itself), `*`, each with `:port`."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> HostRule:
        """Raises ConfigurationError for what is no pattern."""
        found = _PATTERN.match(text.strip().lower().rstrip("."))
        if found is None or (found["port"] is not None and not 0 < int(found["port"]) < 65536):
            raise ConfigurationError(
                f"{text!r} is not a host pattern such as example.com, *.example.com or example.com:8443"
            )
        return cls(found["host"], int(found["port"]) if found["port"] else None)

    def matches(self, host: str, port: int) -> bool:
        if port != self.port if self.port is not None else port not in DEFAULT_PORTS:
            return False
        return self.names(host)

    def names(self, host: str) -> bool:
        """Whether the rule is about this host, on whatever port."""
        if self.host == "*":
            return True
        return host.endswith(self.host[1:]) if self.host.startswith("*.") else host == self.host


@dataclass(frozen=True, slots=True)
class HostRules:
    """What may be connected to. The empty list allows nothing."""

    allow: tuple[HostRule, ...] = ()
    within: tuple[HostRule, ...] | None = None
    """Narrower than the list: of the hosts that it allows only these, on the ports that it allows."""

    @classmethod
    def parse(cls, patterns: Iterable[str]) -> HostRules:
        return cls(tuple(HostRule.parse(pattern) for pattern in patterns))

    def allows(self, host: str, port: int) -> bool:
        if self.within is not None and not any(rule.names(host) for rule in self.within):
            return False
        return any(rule.matches(host, port) for rule in self.allow)


def canonical(host: str) -> str | None:
    """A host name in the form that rules are written in; None: it is no name (IPv6 addresses are never allowed by name)."""
    lower = host.lower().rstrip(".")
    return lower if _NAME.match(lower) else None


class Resolver(Protocol):
    """Where addresses come from."""

    async def resolve(self, host: str, port: int) -> list[str]:
        """Addresses of `host`; raises OSError if there are none."""
        ...


class SystemResolver:
    """The operating system's resolver, in the event loop's threads."""

    async def resolve(self, host: str, port: int) -> list[str]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def addresses_of(host: str, port: int, resolver: Resolver, permitted: tuple[Network, ...]) -> list[str]:
    """Addresses that may be dialled: those that were checked, so that a second look-up cannot lead elsewhere.

    A name with one forbidden address is refused as a whole. Raises PermissionDenied, UpstreamUnavailable.
    """
    try:
        async with asyncio.timeout(RESOLVE_SECONDS):
            found = await resolver.resolve(host, port)
    except (OSError, TimeoutError, UnicodeError) as error:
        raise UpstreamUnavailable(f"{host} cannot be resolved") from error
    for address in found:
        if reason := forbidden(address, permitted):
            raise PermissionDenied(f"{host} leads to {reason}")
    if not found:
        raise UpstreamUnavailable(f"{host} cannot be resolved")
    return found[:MAX_ADDRESSES]
