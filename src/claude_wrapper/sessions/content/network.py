"""What an environment's `networking` leaves of the network that its session's agent may reach. Pure.

It only narrows: what the server's security level or the organisation's list does not allow stays closed. MCP servers are
not reached from the sandbox: `sessions.mcpservers` decides about them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
