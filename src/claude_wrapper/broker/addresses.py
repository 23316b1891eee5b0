"""Which addresses a process may never be connected to, whatever name led there. Pure.

Forbidden is everything that is not a public unicast address, and what clouds answer on public ones. An IPv6 address
that carries an IPv4 one (mapped, 6to4, NAT64, Teredo) is judged by both.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


# The IANA special-purpose registries, written out: `is_global` differs between Python versions.
_SPECIAL = _networks(
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
    *("224.0.0.0/4", "240.0.0.0/4"),
    *("::/127", "::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "3fff::/20", "5f00::/16"),
    *("fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
)
_METADATA = _networks("168.63.129.16/32")  # Azure's, the one metadata service on a public address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def forbidden(address: str, permitted: Iterable[Network] = ()) -> str | None:
    """Why `address` may not be dialled; None: it may. `permitted` are the operator's exceptions (own networks).

    What is not an address is forbidden: names are resolved before they are judged.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "not an address"
    exceptions = tuple(permitted)
    for each in _carried(parsed):
        if any(each in network for network in exceptions if network.version == each.version):
            continue
        if any(each in network for network in _METADATA if network.version == each.version):
            return "a metadata service"
        if any(each in network for network in _SPECIAL if network.version == each.version) or not each.is_global:
            return "a private, local or reserved address"
    return None


def _carried(address: Address) -> Iterator[Address]:
    """The address, or what it carries: a mapped address is only another spelling."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
        return
    if address in _NAT64:
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    yield address
