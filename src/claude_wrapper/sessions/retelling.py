"""Whether a waiting spare may take a conversation whose files were kept, instead of a process started with --resume.

A spare is told the past (`Agent.inject`), which saves the start of a process and costs about 20 ms an exchange. It then
asks the model with the same messages as after --resume, unless the CLI kept something beside them: then only --resume
will do. What that is was measured with CLI 2.1.327 (docs/decisions/sessions-retelling.md) and is listed here the other way
round: everything that is not known to be told again without loss means --resume.

A conversation whose transcript is not resumed from in any case (another CLI's, or one that is too short) loses nothing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.sandbox.files import open_beneath
from claude_wrapper.sessions.clitranscripts import read_transcript
from claude_wrapper.sessions.content.places import relative
from claude_wrapper.sessions.process import Resume
from claude_wrapper.sessions.spec import Message

MAX_MESSAGES: Final = 48
"""With twice as many, telling takes as long as starting a process does (measured)."""
_MAX_BYTES: Final = 4 << 20
"""Of a transcript that is looked through."""
_MAX_FILES: Final = 32
"""That were read or written."""

_LINES: Final = frozenset(
    {
        "api-request",
        "api-request-blob",
        "api-request-shape",
        "assistant",
        "atis-latch",
        "attachment",
        "cost-state",
        "last-prompt",
        "queue-operation",
        "tools-used",
        "user",
    }
)
"""Not among them: `system`, which tells of a compaction. `cost-state` is the CLI's own count, which nobody reads."""
_ATTACHMENTS: Final = frozenset(
    {
        "agent_listing_delta",
        "date",
        "deferred_tools_delta",
        "environment",
        "model",
        "prompt_snapshot",
        "remote_session_change",
        "session_context",
        "skill_listing",
    }
)
"""What every process tells the model by itself."""
_FILE_TOOLS: Final = frozenset({"Read", "Write", "Edit"})
_TOOLS: Final = _FILE_TOOLS | {"Bash", "ToolSearch", "WebFetch", "WebSearch"}
"""Whose calls and results are all that they leave in a process."""
_INTERRUPTED: Final = "[Request interrupted"


@dataclass(frozen=True, slots=True)
class Retelling:
    """A spare will do."""

    seen: tuple[tuple[str, int], ...] = ()
    """Files that the conversation has seen as they are: (path as the agent knows it, its mtime in ms)."""


async def retelling(resume: Resume, past: Sequence[Message]) -> Retelling | None:
    """How the conversation is told to a spare; None: with --resume only, or its files are not there yet."""
    if not resume.ready.is_set():
        return None
    if not resume.uuid:
        return Retelling()
    if len(past) > MAX_MESSAGES:
        return None
    return await asyncio.to_thread(_looked_through, resume.kept, resume.uuid)


def _looked_through(kept: Path, uuid: str) -> Retelling | None:
    content = read_transcript(kept / "home", uuid, _MAX_BYTES)
    files = None if content is None else files_seen(content)
    if files is None or len(files) > _MAX_FILES:
        return None
    seen = []
    for path, seen_ms in files.items():
        try:
            place = relative(path)
        except InvalidRequest:
            continue  # the path of a slot that is gone, or of its /tmp: --resume would not find it either
        changed_ms = _changed_ms(kept / "work", place)
        if changed_ms is None or changed_ms > seen_ms:
            return None  # after --resume the CLI says that the file was changed since it was read
        seen.append((path, changed_ms))
    return Retelling(tuple(seen))


def files_seen(transcript: bytes) -> dict[str, int] | None:
    """Paths of the files that were read or written, with the time in ms; None: something would be lost by telling."""
    calls: dict[str, str] = {}
    files: dict[str, int] = {}
    for raw in transcript.splitlines():
        try:
            line = msgspec.json.decode(raw)
            if not _plain(line):
                return None
            for block in _blocks(line):
                kind = block.get("type")
                if kind == "tool_use":
                    if not _leaves_nothing(block):
                        return None
                    if block["name"] in _FILE_TOOLS:
                        calls[block["id"]] = block["input"]["file_path"]
                elif kind == "text" and line["type"] == "user" and block["text"].startswith(_INTERRUPTED):
                    return None
                elif kind == "tool_result" and block["tool_use_id"] in calls and not block.get("is_error"):
                    at = datetime.fromisoformat(line["timestamp"])
                    files[calls[block["tool_use_id"]]] = int(at.timestamp() * 1000)
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError):
            return None  # not as the CLI writes it: half a line, or an agent's own work
    return files


def _plain(line: Mapping[str, Any]) -> bool:
    kind = line["type"]
    if kind not in _LINES or line.get("isSidechain") or line.get("isCompactSummary"):
        return False
    if kind == "attachment":
        return line["attachment"]["type"] in _ATTACHMENTS
    result = line.get("toolUseResult")
    return not (isinstance(result, Mapping) and "backgroundTaskId" in result)


def _leaves_nothing(call: Mapping[str, Any]) -> bool:
    name = call["name"]
    return (name in _TOOLS or name.startswith("mcp__")) and not call["input"].get("run_in_background")


def _blocks(line: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if line["type"] in {"user", "assistant"}:
        content = line["message"]["content"]
        yield from [{"type": "text", "text": content}] if isinstance(content, str) else content


def _changed_ms(work: Path, place: str) -> int | None:
    """When the file was changed last; None when it is not there or behind a link."""
    try:
        descriptor = open_beneath(work, place, os.O_PATH | os.O_NOFOLLOW)
    except (NotFound, InvalidRequest):
        return None
    try:
        return os.fstat(descriptor).st_mtime_ns // 1_000_000
    finally:
        os.close(descriptor)
