"""What a session has cost at list prices, and the budget that it must not pass. Pure.

The cost is counted from what the broker saw, in micro-dollars; clients see whole cents, a begun one counted. A session
that has reached its budget is idle with `budget_reached`; it takes no messages before the budget is raised or removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from claude_wrapper.errors import Conflict

BUDGET_REACHED: Final[Mapping[str, Any]] = {"type": "budget_reached"}
_COST: Final = "list_cost_micros"
_MICROS_PER_CENT: Final = 10_000


def with_cost(usage: Mapping[str, Any], before: Mapping[str, Any], micros: int) -> dict[str, Any]:
    """`usage` with what had been spent before and `micros` more."""
    return {**usage, _COST: int(before.get(_COST, 0)) + micros}


def usage_to_wire(usage: Mapping[str, Any]) -> dict[str, Any]:
    """The usage as clients see it."""
    shown = {name: value for name, value in usage.items() if name != _COST}
    if _COST in usage:
        shown["list_cost"] = {"amount": str(-(-int(usage[_COST]) // _MICROS_PER_CENT)), "currency": "USD"}
    return shown


def reached(budget: Mapping[str, Any] | None, usage: Mapping[str, Any], *, more_micros: int = 0) -> bool:
    """Whether the session has spent its budget, with `more_micros` that are not in its usage yet."""
    if budget is None:
        return False
    most = int(budget["max_list_cost"]["amount"]) * _MICROS_PER_CENT
    return int(usage.get(_COST, 0)) + more_micros >= most


def require_budget(session: str, budget: Mapping[str, Any] | None, usage: Mapping[str, Any]) -> None:
    """Raises Conflict for a session that has spent its budget."""
    if budget is not None and reached(budget, usage):
        cents = budget["max_list_cost"]["amount"]
        raise Conflict(
            f"session {session} has reached its budget of {cents} cents (limit: budget.max_list_cost); "
            "raise it by updating the session, or set it to null",
            details={"error_code": "budget_reached"},
        )
