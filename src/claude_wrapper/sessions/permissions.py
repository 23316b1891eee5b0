"""Answers to the CLI's question whether a tool may run. The server decides; the process only asks.

A Messages client cannot be asked in the middle of a request, so the answer is the server's policy: what the security
level allows runs (inside the sandbox), the rest is denied with a reason that the model can read.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from claude_wrapper.sessions.mcpservers import ToolRules

_FILE_FIELDS = ("file_path", "notebook_path", "path")


@dataclass(frozen=True, slots=True)
class Permissions:
    """The built-in tools that may run."""

    allowed_tools: frozenset[str]
    confined_to: PurePosixPath | None = None
    """Without a sandbox: the only directory whose files tools may touch. The CLI asks before it leaves its workspace."""
    local_rules: Mapping[str, ToolRules] = field(default_factory=dict)
    """Which tools of local MCP servers may be called; those of remote ones are sifted by the bridge."""

    def decide(self, request: dict[str, Any]) -> dict[str, Any]:
        """The `response` of a `can_use_tool` control request."""
        tool = str(request.get("tool_name", ""))
        if tool.startswith("mcp__"):
            server, _, name = tool.removeprefix("mcp__").partition("__")
            if server in self.local_rules and not self.local_rules[server].allows(name):
                return {"behavior": "deny", "message": f"The tool {name} of {server} is not enabled."}
            return {"behavior": "allow", "updatedInput": request.get("input", {})}
        if tool in self.allowed_tools:
            outside = self._outside(request.get("input", {}))
            if outside is None:
                return {"behavior": "allow", "updatedInput": request.get("input", {})}
            return {
                "behavior": "deny",
                "message": f"{outside} is outside the workspace, which {tool} may not leave here.",
            }
        return {
            "behavior": "deny",
            "message": f"The tool {tool} is not allowed here: this server's security level or the request excludes it.",
        }

    def _outside(self, tool_input: Mapping[str, Any]) -> str | None:
        """The path in the tool's input that leaves the directory, if there is one."""
        if self.confined_to is None:
            return None
        for name in _FILE_FIELDS:
            value = tool_input.get(name)
            if not isinstance(value, str):
                continue
            path = posixpath.normpath(posixpath.join(str(self.confined_to), value))
            if not PurePosixPath(path).is_relative_to(self.confined_to):
                return value
        return None
