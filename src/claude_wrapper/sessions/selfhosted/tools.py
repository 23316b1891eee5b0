"""The tools that the worker of a self-hosted environment runs, as they are offered to the model. Pure.

Names and inputs are those of the agent toolset (wire reference 2.2), which the official worker implements: what the model
asks for goes to it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from claude_wrapper.sessions.resources.tools import built_in_policies


def _tool(description: str, required: Sequence[str], **properties: Mapping[str, Any]) -> Mapping[str, Any]:
    schema = {"type": "object", "properties": dict(properties), "required": list(required)}
    return MappingProxyType({"description": description, "input_schema": schema})


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


_FILE: Final = _text("Path of the file, absolute or relative to the working directory.")
_ROOT: Final = _text("Directory to search under. Default: the working directory.")

WORKER_TOOLS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "bash": _tool(
            "Run a shell command in a persistent bash session: the working directory and variables stay from call to "
            "call. Gives what it prints to standard output and standard error.",
            (),
            command=_text("The command. Leave it out only with `restart`."),
            restart={"type": "boolean", "description": "Restart the session in place of running a command."},
            timeout_ms={"type": "integer", "minimum": 0, "description": "Longest run, in milliseconds."},
        ),
        "read": _tool(
            "Read a text file.",
            ("file_path",),
            file_path=_FILE,
            view_range={
                "type": "array",
                "items": {"type": "integer"},
                "minItems": 2,
                "maxItems": 2,
                "description": "`[first, last]` line, counted from 1; a last line of -1 is the end of the file.",
            },
        ),
        "write": _tool(
            "Write a file, in place of what it held.",
            ("file_path", "content"),
            file_path=_FILE,
            content=_text("The whole content."),
        ),
        "edit": _tool(
            "Replace a text in a file. It must occur exactly once, unless all are replaced.",
            ("file_path", "old_string", "new_string"),
            file_path=_FILE,
            old_string=_text("The text to be replaced, exactly as it is in the file."),
            new_string=_text("What takes its place."),
            replace_all={"type": "boolean", "description": "Replace every occurrence."},
        ),
        "glob": _tool(
            "Find files by a pattern such as `**/*.py`, newest first.",
            ("pattern",),
            pattern=_text("The pattern."),
            path=_ROOT,
        ),
        "grep": _tool(
            "Search the contents of files with a regular expression; gives the lines that match.",
            ("pattern",),
            pattern=_text("The regular expression."),
            path=_ROOT,
        ),
    }
)


def worker_tools(entries: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Those that the agent's resolved `tools` enable, as the Messages API describes tools."""
    policies = built_in_policies(entries)
    return tuple(
        {"name": name, **tool} for name, tool in WORKER_TOOLS.items() if name in policies and policies[name].enabled
    )
