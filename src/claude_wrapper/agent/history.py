"""A conversation's past, as the lines that put it into a process. Pure.

The CLI takes the past as user lines that ask nothing (`shouldQuery: false`), each answered by a `result` of its own,
and assistant lines. Two user lines in a row are joined with a newline by the CLI, and lines that are sent without
waiting for that `result` are reordered, so neighbours of one role are merged here, block by block (as the Messages API
does), and every user line is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from claude_wrapper.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Exchange:
    """One user message and the assistant message that follows it."""

    user: str | list[Any]
    assistant: str | list[Any]


def exchanges(messages: Sequence[Mapping[str, Any]]) -> list[Exchange]:
    """The pairs, in order.

    Raises InvalidRequest when the history does not begin with a user message or does not end with an assistant one
    (what the user says last is a turn, not history), or when a role or content is of another kind.
    """
    merged: list[tuple[str, str | list[Any]]] = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in {"user", "assistant"}:
            raise InvalidRequest("must be user or assistant", field=f"messages[{index}].role")
        if not isinstance(content, str | list) or not content:
            raise InvalidRequest("must be a text or a list of blocks, not empty", field=f"messages[{index}].content")
        if merged and merged[-1][0] == role:
            merged[-1] = (role, _blocks(merged[-1][1]) + _blocks(content))
        else:
            merged.append((role, content))
    if merged and merged[0][0] != "user":
        raise InvalidRequest("the first message must be the user's", field="messages[0].role")
    if len(merged) % 2:
        raise InvalidRequest("the last message of a history must be the assistant's", field="messages")
    return [Exchange(merged[at][1], merged[at + 1][1]) for at in range(0, len(merged), 2)]


def _blocks(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
