"""What an environment's `networking` leaves of the network that its session's agent may reach. Pure.

It only narrows: what the server's security level or the organisation's list does not allow stays closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from claude_wrapper.broker.egresslists import REGISTRIES
from claude_wrapper.broker.hosts import HostRule

Hosts = tuple[HostRule, ...]


def hosts_of(environment: Mapping[str, Any] | None) -> Hosts | None:
    """The only hosts that processes of the session may reach; None: the environment does not narrow."""
    networking = (environment or {}).get("networking") or {}
    if networking.get("type") != "limited":
        return None
    names = list(networking.get("allowed_hosts") or ())
    if networking.get("allow_package_managers"):
        names += REGISTRIES
    return tuple(HostRule.parse(str(name)) for name in dict.fromkeys(names))


def closed_servers(environment: Mapping[str, Any] | None, servers: Mapping[str, str]) -> frozenset[str]:
    """Of MCP servers (URL by name), those that the environment does not let the session use.

    They are reached by the server itself, not from the sandbox: `allow_mcp_servers` opens all of the agent's, else their
    hosts must be among the allowed ones.
    """
    hosts = hosts_of(environment)
    if hosts is None or ((environment or {}).get("networking") or {}).get("allow_mcp_servers"):
        return frozenset()
    return frozenset(
        name
        for name, url in servers.items()
        if not any(rule.names((urlsplit(url).hostname or "").lower()) for rule in hosts)
    )
