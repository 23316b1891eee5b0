"""What happens when the shared counters are away: one policy per kind of limit, and no request waits twice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from claude_wrapper.clock import Clock
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.limits.settings import LimitCounts, LimitSettings, WithoutStore
from claude_wrapper.limits.stores import StoreGone

T = TypeVar("T")


class Guard:
    """Asks the store unless it has just failed; then the policy answers at once until it is time to try again."""

    def __init__(self, clock: Clock, settings: LimitSettings, counts: LimitCounts) -> None:
        self.counts = counts
        self._clock = clock
        self._retry_seconds = settings.store_retry_seconds
        self._away_until = float("-inf")

    async def ask(self, kind: str, policy: WithoutStore, question: Callable[[], Awaitable[T]]) -> T | None:
        """The store's answer; None if it is away and `policy` is open. Raises StoreGone if it is away and closed."""
        try:
            return await self._asked(question)
        except StoreGone as error:
            self.decide(kind, policy, error)
            return None

    def decide(self, kind: str, policy: WithoutStore, error: StorageUnavailable) -> None:
        """Count, and raise `error` if the policy is closed."""
        if policy is WithoutStore.OPEN:
            self.counts.count(self.counts.let_through, kind)
            return
        self.counts.count(self.counts.turned_away, kind)
        error.retry_after = self._retry_seconds
        raise error

    async def attempt(self, question: Callable[[], Awaitable[T]]) -> T | None:
        """The store's answer, or None if it is away: for corrections that may be lost."""
        try:
            return await self._asked(question)
        except StoreGone:
            return None

    async def _asked(self, question: Callable[[], Awaitable[T]]) -> T:
        if self._away_until > self._clock.monotonic():
            raise StoreGone("the shared counters could not be reached a moment ago")
        try:
            return await question()
        except StoreGone:
            self._away_until = self._clock.monotonic() + self._retry_seconds
            raise
