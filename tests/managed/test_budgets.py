"""The arithmetic of a session's budget."""

from __future__ import annotations

import pytest

from claude_wrapper.errors import Conflict
from claude_wrapper.sessions.budgets import reached, require_budget, usage_to_wire, with_cost


def _budget(cents: int) -> dict[str, object]:
    return {"type": "limit", "max_list_cost": {"amount": str(cents), "currency": "USD"}}


@pytest.mark.parametrize(("micros", "cents"), [(0, "0"), (1, "1"), (10_000, "1"), (10_001, "2")])
def test_a_begun_cent_is_shown(micros: int, cents: str) -> None:
    usage = with_cost({"output_tokens": 3}, {}, micros)
    assert usage_to_wire(usage) == {"output_tokens": 3, "list_cost": {"amount": cents, "currency": "USD"}}


def test_costs_add_up_to_the_budget_and_not_before() -> None:
    usage = with_cost({}, with_cost({}, {}, 9_000), 999)
    assert not reached(_budget(1), usage)
    assert reached(_budget(1), usage, more_micros=1)
    require_budget("sesn_a", _budget(1), usage)
    with pytest.raises(Conflict, match="1 cents"):
        require_budget("sesn_a", _budget(1), with_cost({}, usage, 1))


def test_without_a_budget_nothing_is_ever_spent() -> None:
    assert not reached(None, with_cost({}, {}, 10**12))
    require_budget("sesn_a", None, with_cost({}, {}, 10**12))
