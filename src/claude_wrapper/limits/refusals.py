"""Refusals by a limit: which one, whose, how long to wait, and the headers to say it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claude_wrapper.errors import BudgetExceeded, RateLimited
from claude_wrapper.limits.budgets import Action, Budget, Window, dollars
from claude_wrapper.limits.gcra import Rate
from claude_wrapper.limits.values import Resource, Scope, describe

LONGEST_RETRY = 60.0
"""Seconds. Clients obey any `retry-after`, up to weeks: above this they are told not to retry by themselves."""


class LimitReached(RateLimited):
    """A rate or concurrency limit was reached."""

    def __init__(self, message: str, *, headers: Mapping[str, str], **kw: Any) -> None:
        self.headers = headers
        """Response headers: `anthropic-ratelimit-*`, `retry-after`, `x-should-retry`."""
        super().__init__(message, **kw)


class BudgetReached(BudgetExceeded):
    """A spending cap was reached."""

    def __init__(self, message: str, *, headers: Mapping[str, str], **kw: Any) -> None:
        self.headers = headers
        super().__init__(message, **kw)


def retry_headers(retry_after: float | None) -> dict[str, str]:
    """`retry-after` in whole seconds, rounded up, and whether a client should retry by itself."""
    if retry_after is None:
        return {"x-should-retry": "false"}
    headers = {"retry-after": str(max(1, -int(-retry_after // 1)))}
    if retry_after > LONGEST_RETRY:
        headers["x-should-retry"] = "false"
    return headers


def rate_reached(
    resource: Resource, scope: Scope, rate: Rate, retry_after: float, headers: Mapping[str, str]
) -> LimitReached:
    """A rate refused."""
    wait = max(1, -int(-retry_after // 1))
    return LimitReached(
        f"this {scope}'s limit of {describe(rate)} {resource.replace('_', ' ')} is reached; try again in {wait} s",
        retry_after=retry_after,
        headers={**headers, **retry_headers(retry_after)},
        details={"limit": resource.value, "scope": scope.value, "value": rate.limit, "period_seconds": rate.period},
    )


def count_reached(resource: Resource, scope: Scope, capacity: int, headers: Mapping[str, str]) -> LimitReached:
    """A count of things at the same time refused. When one ends is not known: a second is a fair first guess."""
    return LimitReached(
        f"this {scope}'s limit of {capacity} {resource.replace('_', ' ')} is reached; let one end first",
        retry_after=1.0,
        headers={**headers, **retry_headers(1.0)},
        details={"limit": resource.value, "scope": scope.value, "value": capacity},
    )


def budget_reached(budget: Budget, window: Window) -> BudgetReached:
    """A budget refused. `details["action"]` is `block` or `pause`: a paused session keeps its state."""
    until = "" if window.end is None else f" until {window.end:%Y-%m-%d %H:%M} UTC"
    per = "in all" if window.end is None else f"per {budget.period}"
    does = "paused" if budget.action is Action.PAUSE else "blocked"
    return BudgetReached(
        f"this {budget.scope}'s budget of {dollars(budget.cap_micros)} {per} is spent: calls are {does}{until},"
        " or until an admin raises the cap",
        headers=retry_headers(None),
        details={
            "limit": "budget",
            "error_code": "enforced_spend_limit_reached",
            "budget_id": budget.id,
            "scope": budget.scope.value,
            "period": budget.period.value,
            "action": budget.action.value,
            "cap_micros": budget.cap_micros,
            "resets_at": None if window.end is None else window.end.isoformat(),
        },
    )
