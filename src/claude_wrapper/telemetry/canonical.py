"""The canonical line: everything worth knowing about one request, turn or job, in one log line at its end.

What happens on the way is collected here instead of being logged where it happens; one line then answers most
questions without a join.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import structlog

from claude_wrapper.clock import Clock

EVENTS: Final[Mapping[str, str]] = {"request": "request.completed", "turn": "turn.completed", "job": "job.completed"}
"""The event name of each kind of line."""
MAX_FIELDS: Final = 64


class CanonicalLine:
    """Collects fields and measurements; `emit` writes them once, further calls write nothing.

    As a context manager it emits at the end, with the exception's kind if there was one.
    """

    def __init__(self, kind: str, clock: Clock, **fields: Any) -> None:
        """`kind` is a key of `EVENTS`; raises KeyError for any other."""
        self._event = EVENTS[kind]
        self._clock = clock
        self._start = clock.monotonic()
        self._fields: dict[str, Any] = dict(fields)
        self._log = structlog.get_logger()
        self.emitted = False

    def set(self, **fields: Any) -> None:
        """Keep these fields; a later value replaces an earlier one. Beyond `MAX_FIELDS` new names are left out."""
        for name, value in fields.items():
            if name in self._fields or len(self._fields) < MAX_FIELDS:
                self._fields[name] = value

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a field that counts."""
        self.set(**{name: self._fields.get(name, 0) + amount})

    def mark(self, name: str) -> None:
        """Keep the seconds since the start under `name`, the first time only."""
        if name not in self._fields:
            self.set(**{name: round(self._clock.monotonic() - self._start, 6)})

    def emit(self, *, error: BaseException | None = None) -> None:
        """Write the line: at `info`, at `warning` for a failure that has a code, at `error` for any other exception."""
        if self.emitted:
            return
        self.emitted = True
        self._fields.setdefault("seconds", round(self._clock.monotonic() - self._start, 6))
        if error is None:
            self._log.info(self._event, **self._fields)
            return
        code = getattr(error, "code", None)
        self._fields.setdefault("error", code if isinstance(code, str) else type(error).__name__)
        if isinstance(code, str) and code != "internal_error":
            self._log.warning(self._event, **self._fields)
        else:
            self._log.error(self._event, exc_info=error, **self._fields)

    def __enter__(self) -> CanonicalLine:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.emit(error=error)
