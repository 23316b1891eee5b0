"""Names and inputs of built-in tools: as Managed Agents calls them and as the CLI does (wire reference 3.2).

What one side has and the other has not is kept under its own name: clients branch on the name and ignore the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

CLIENT_PREFIX: Final = "mcp__client__"
"""Tools that the API's client runs (the server's in-process MCP server `client`)."""
SANDBOX_PREFIX: Final = "mcp__sandbox__"
"""Tools that the worker of a self-hosted environment runs (the server's in-process MCP server `sandbox`)."""

TO_CLI: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bash": "Bash",
        "read": "Read",
        "write": "Write",
        "edit": "Edit",
        "glob": "Glob",
        "grep": "Grep",
        "web_fetch": "WebFetch",
        "web_search": "WebSearch",
    }
)
"""The members of the agent toolset."""
_FROM_CLI: Final = MappingProxyType({cli: name for name, cli in TO_CLI.items()})


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of the CLI as the wire shows it. `kind`: `custom`, `sandbox`, `mcp` or `tool`."""

    kind: str
    name: str
    input: Any
    server: str | None = None


def shown(name: str, tool_input: Any) -> ToolCall:
    """What the CLI calls `name`, as Managed Agents shows it."""
    if name.startswith(CLIENT_PREFIX):
        return ToolCall("custom", name.removeprefix(CLIENT_PREFIX), tool_input)
    if name.startswith(SANDBOX_PREFIX):
        return ToolCall("sandbox", name.removeprefix(SANDBOX_PREFIX), tool_input)
    if name.startswith("mcp__"):
        server, _, tool = name.removeprefix("mcp__").partition("__")
        return ToolCall("mcp", tool, tool_input, server)
    known = _FROM_CLI.get(name)
    if known is None:
        return ToolCall("tool", name.lower(), tool_input)
    return ToolCall("tool", known, _shown_input(known, tool_input))


def _shown_input(name: str, tool_input: Any) -> Any:
    if not isinstance(tool_input, dict):
        return tool_input
    if name == "bash" and "timeout" in tool_input:
        rest = {key: value for key, value in tool_input.items() if key != "timeout"}
        return {**rest, "timeout_ms": tool_input["timeout"]}
    if name == "read" and isinstance(offset := tool_input.get("offset"), int):
        limit = tool_input.get("limit")
        rest = {key: value for key, value in tool_input.items() if key not in {"offset", "limit"}}
        # An end of -1 is the wire's "to the end of the file".
        return {**rest, "view_range": [offset, offset + limit - 1 if isinstance(limit, int) else -1]}
    return tool_input


def result_content(content: Any) -> list[dict[str, Any]]:
    """The content of a `tool_result` block as the wire shows it: text, image, document and search results."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        return [{"type": "text", "text": str(content)}]
    shown_blocks: list[dict[str, Any]] = []
    for block in content:
        if isinstance(block, dict) and block.get("type") in {"text", "image", "document", "search_result"}:
            shown_blocks.append({name: value for name, value in block.items() if name != "cache_control"})
        else:
            shown_blocks.append({"type": "text", "text": str(block)})
    return shown_blocks
