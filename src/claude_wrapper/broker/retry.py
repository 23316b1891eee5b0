"""Whether a failed attempt is tried again, and when. Pure: time and random numbers come in as arguments."""

from __future__ import annotations

import email.utils
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from claude_wrapper.broker.settings import BrokerSettings

UNREACHABLE = 502
TIMED_OUT = 504
OVERLOADED = 529

FAIL_FAST = frozenset({400, 401, 402, 403, 404, 413})
"""Answers that the same request would get again."""


def retryable(status: int) -> bool:
    """429, 529 and other 5xx; also the broker's own 502 (unreachable) and 504 (no answer in time)."""
    return status in {408, 409, 429} or status >= 500


@dataclass(frozen=True, slots=True)
class Failure:
    """What an attempt met before any byte went to the process."""

    status: int
    retry_after: float | None = None
    should_retry: bool | None = None
    """The upstream's own word (`x-should-retry`), where it gave one."""


class RetryBudget:
    """Retries that a credential, or all of one upstream, may spend: a reserve, refilled by a share of each call."""

    def __init__(self, ratio: float, reserve: float) -> None:
        self._ratio = ratio
        self._reserve = reserve
        self._left = reserve

    def called(self) -> None:
        """A first attempt was made."""
        self._left = min(self._reserve, self._left + self._ratio)

    @property
    def empty(self) -> bool:
        """Whether no retry is left."""
        return self._left < 1

    def spend(self) -> bool:
        """Take one retry; False: none is left."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


def delay(failure: Failure, attempt: int, elapsed: float, settings: BrokerSettings, rng: random.Random) -> float | None:
    """Seconds to wait before attempt `attempt + 1`; None: give up.

    `attempt` counts from 1; `elapsed` is the time since the call began.
    """
    wanted = retryable(failure.status) if failure.should_retry is None else failure.should_retry
    if not wanted or failure.status in FAIL_FAST or attempt >= settings.retry_attempts:
        return None
    bound = min(settings.retry_base_seconds * 2 ** (attempt - 1), settings.retry_max_delay_seconds)
    pause = bound / 2 + rng.random() * bound / 2
    if failure.retry_after is not None:
        pause = max(pause, failure.retry_after)
    # A longer wait is not shortened: asking earlier than told would only fail again. The caller is told instead.
    return pause if elapsed + pause <= settings.retry_seconds else None


def retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds that an answer asks to wait: `retry-after-ms`, or `retry-after` as seconds or a date; None: no word."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    if value is None:
        return None
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(value) - now).total_seconds())
    except (TypeError, ValueError):
        return None


def should_retry(headers: Mapping[str, str]) -> bool | None:
    """The upstream's own word on retrying."""
    return {"true": True, "false": False}.get(headers.get("x-should-retry", "").lower())


def _number(value: str | None) -> float | None:
    try:
        number = float(value) if value is not None else None
    except ValueError:
        return None
    return number if number is not None and 0 <= number < 86_400 * 7 else None
