"""What a session's clients are told of its agent's MCP servers: failures, and a status that has changed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from claude_wrapper.wire.extensions import RESERVED_MCP_NAMES

DENIED: Final = "mcp_authentication_failed_error"
UNREACHED: Final = "mcp_connection_failed_error"
_ERRORS: Final[Mapping[str, str]] = {"failed": UNREACHED, "needs-auth": DENIED}


class McpStatus:
    """The servers of one conversation, over its turns."""

    def __init__(self) -> None:
        self.names: Mapping[str, str] = {}
        """The CLI's name of a server → the agent's, where they differ."""
        self._last: dict[str, str] = {}
        self._failed: dict[str, str] = {}

    def begin(self, names: Mapping[str, str]) -> None:
        """A turn begins: who failed in the one before is tried again."""
        self.names = names
        self._failed.clear()

    def name(self, cli_name: str) -> str:
        """The agent's name of a server."""
        return self.names.get(cli_name, cli_name)

    def noted(self, event: Mapping[str, Any]) -> None:
        """The server said this of an MCP server itself: the CLI's later word about it is no news."""
        error = event.get("error")
        if isinstance(error, Mapping) and isinstance(name := error.get("mcp_server_name"), str):
            self._failed[name] = str(error.get("type"))

    def failures(self, servers: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
        """From the CLI's `init`: (error type, server) of each that cannot be used and of which nobody has told yet."""
        found = []
        for server in servers:
            kind, name = _ERRORS.get(str(server.get("status"))), self.name(str(server.get("name")))
            if kind is not None and name not in self._failed:
                self._failed[name] = kind
                found.append((kind, name))
        return found

    def news(self, servers: Iterable[Mapping[str, Any]]) -> list[dict[str, str]] | None:
        """From the CLI's `init`: every server with its status (connected, failed, needs_auth, pending, disabled), if
        something has changed since it was told last; else None."""
        status: dict[str, str] = {}
        for server in servers:
            cli_name, found = str(server.get("name")), str(server.get("status")).replace("-", "_")
            if cli_name in RESERVED_MCP_NAMES:
                continue
            name = self.name(cli_name)
            # The CLI knows of a server behind the bridge only that it failed; we know why.
            status[name] = "needs_auth" if found == "failed" and self._failed.get(name) == DENIED else found
        if status == self._last:
            return None
        self._last = status
        return [{"name": name, "status": found} for name, found in status.items()]
