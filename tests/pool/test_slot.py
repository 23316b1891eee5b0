"""The slot table: every pair of state and event is either in it or refused; the diagram in the docs is the table."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from claude_wrapper.errors import IllegalTransition
from claude_wrapper.pool.slot import FREEZABLE, TRANSITIONS, SlotEvent, SlotState, advance, render_mermaid

DOC = Path(__file__).parents[2] / "docs" / "pool-states.md"


@pytest.mark.parametrize(("state", "event"), list(itertools.product(SlotState, SlotEvent)))
def test_each_event_moves_the_slot_as_the_table_says_or_is_refused(state: SlotState, event: SlotEvent) -> None:
    after = TRANSITIONS[state].get(event)
    if after is None:
        with pytest.raises(IllegalTransition, match=state.value):
            advance(state, event)
    else:
        assert advance(state, event) is after


def test_every_state_can_be_reached_and_ends_in_gone() -> None:
    reached = {SlotState.SPAWNING}
    for _ in SlotState:
        reached |= {after for state in reached for after in TRANSITIONS[state].values()}
    assert reached == set(SlotState)
    for state in set(SlotState) - {SlotState.GONE, SlotState.STOPPING}:
        assert TRANSITIONS[state][SlotEvent.STOP] is SlotState.STOPPING


def test_a_used_process_never_becomes_a_spare_except_by_a_hand_back_before_acceptance() -> None:
    into_spare = {(state, event) for state, row in TRANSITIONS.items() for event, to in row.items() if to == "spare"}
    assert into_spare == {
        (SlotState.SPAWNING, SlotEvent.READY),
        (SlotState.BUSY, SlotEvent.HAND_BACK_VIRGIN),
    }


def test_a_slot_that_somebody_works_with_is_not_freezable() -> None:
    assert {SlotState.SPARE, SlotState.IDLE, SlotState.DETACHED} == FREEZABLE


def test_the_diagram_in_the_documentation_is_the_table() -> None:
    assert f"```mermaid\n{render_mermaid()}\n```" in DOC.read_text(encoding="utf-8")
