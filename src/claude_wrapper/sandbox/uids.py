"""Uids for slots: one each, from a configured range, never two live slots with one.

A uid that was given back waits as long as possible before it is given out again, and is skipped while any process of
the host still runs under it (another server with the same range, or a survivor).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from claude_wrapper.errors import ConfigurationError, PoolOverloaded
from claude_wrapper.sandbox import processes

_LOWEST = 1000
_HIGHEST = 2**32 - 2


@dataclass(frozen=True, slots=True)
class UidRange:
    """Uids `first` to `last`, both included; must not be used for anything else on the host."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> UidRange:
        """From `first-last`, as in `200000-265535`. Raises ConfigurationError."""
        first, separator, last = text.partition("-")
        if not (separator and first.strip().isdigit() and last.strip().isdigit()):
            raise ConfigurationError(f"sandbox uids: write `first-last`, as in 200000-265535, not {text!r}")
        found = cls(int(first), int(last))
        if not _LOWEST <= found.first <= found.last <= _HIGHEST:
            raise ConfigurationError(f"sandbox uids: {text} is not a range between {_LOWEST} and {_HIGHEST}")
        return found


DEFAULT_RANGE = UidRange(200_000, 265_535)


def any_process_of(uid: int) -> bool:
    """Whether some living process of this host runs under the uid."""
    return any(found.alive and processes.real_uid(found.pid) == uid for found in processes.all_processes())


class UidAllocator:
    """Gives out uids; not for use from several threads."""

    def __init__(self, span: UidRange, *, in_use: Callable[[int], bool] = any_process_of) -> None:
        """`in_use` is asked before a uid is given out."""
        self._next = span.first
        self._last = span.last
        self._free: deque[int] = deque()
        self._live: set[int] = set()
        self._in_use = in_use

    @property
    def live(self) -> frozenset[int]:
        """What is given out now."""
        return frozenset(self._live)

    def acquire(self) -> int:
        """A uid that no live slot has. Raises PoolOverloaded when the range is used up."""
        skipped = 0
        while True:
            if self._next <= self._last:
                uid = self._next
                self._next += 1
            elif self._free and skipped < len(self._free):
                uid = self._free.popleft()
            else:
                raise PoolOverloaded("every uid of the configured range is in use: widen SANDBOX_UIDS")
            if not self._in_use(uid):
                self._live.add(uid)
                return uid
            self._free.append(uid)
            skipped += 1

    def release(self, uid: int) -> None:
        """Give a uid back once its processes and directories are gone. Releasing twice is an error."""
        self._live.remove(uid)
        self._free.append(uid)
