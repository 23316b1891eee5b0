"""What the server's log says at the end: how often which warning, and the errors with their first words. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

_KEPT: Final = 40
_LONGEST: Final = 1500
_ABORTED_CONNECT: Final = re.compile(
    r"sqlalchemy/util/concurrency\.py:\d+: RuntimeWarning: coroutine 'connect' was never awaited|^\s*awaitable\.close\(\)"
    r"|^RuntimeWarning: Enable tracemalloc"
)
"""Python's own warning when SQLAlchemy gives up a connection to a database that is away before it has begun."""


@dataclass(slots=True)
class LogSummary:
    """Warnings and errors."""

    counts: Counter[str] = field(default_factory=Counter)
    """`level event` to how often."""
    errors: list[str] = field(default_factory=list)
    """The first error lines of each event, shortened."""
    unexpected: list[str] = field(default_factory=list)
    """Errors that no fault explains, shortened."""
    unreadable: list[str] = field(default_factory=list)
    """Lines that are no JSON: something wrote past the log."""


def summarize(lines: Iterable[str]) -> LogSummary:
    """Read JSON log lines."""
    found = LogSummary()
    shown: Counter[str] = Counter()
    for line in lines:
        try:
            said: dict[str, Any] = msgspec.json.decode(line)
            level, event = str(said["level"]), str(said["event"])
        except (msgspec.DecodeError, KeyError, TypeError):
            if line.strip() and not _ABORTED_CONNECT.search(line) and len(found.unreadable) < _KEPT:
                found.unreadable.append(line.strip()[:_LONGEST])
            continue
        where = f" ({said['module']})" if event == "library.logged" and "module" in said else ""
        found.counts[f"{level} {event}{where}"] += 1
        if level in {"error", "critical"} and shown[event] < 5 and len(found.errors) < _KEPT:
            shown[event] += 1
            found.errors.append(line.strip()[:_LONGEST])
        if level in {"error", "critical"} and not _explained(said) and len(found.unexpected) < _KEPT:
            found.unexpected.append(line.strip()[:_LONGEST])
    return found


def _explained(said: dict[str, Any]) -> bool:
    """Whether a fault explains an error: a store that is away, or connections that are cut because the server ends.

    A request that failed outside the error table never is: its caller got no clear error.
    """
    if said["event"] == "request.failed":
        return False
    chain = said.get("exception", {}).get("chain", [])
    if said.get("module") == "uvicorn.error":
        return not chain or chain[0]["type"] == "CancelledError"
    return any(one.get("code") == "storage_unavailable" for one in chain)
