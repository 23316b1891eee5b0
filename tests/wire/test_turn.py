"""The table of a turn."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import IllegalTransition
from claude_wrapper.wire.turn import ENDED, LISTENING, TRANSITIONS, TurnEvent, TurnState, advance


@pytest.mark.parametrize(("state", "event"), list(itertools.product(TurnState, TurnEvent)))
def test_every_pair_is_in_the_table_or_raises(state: TurnState, event: TurnEvent) -> None:
    if event in TRANSITIONS[state]:
        assert advance(state, event) is TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalTransition, match=f"{state}.*{event}"):
            advance(state, event)


@given(st.lists(st.sampled_from(list(TurnEvent)), max_size=30))
def test_a_turn_that_has_ended_never_comes_back_and_an_abandoned_one_never_listens_again(
    events: list[TurnEvent],
) -> None:
    state, sent, left = TurnState.QUEUED, False, False
    for event in events:
        try:
            after = advance(state, event)
        except IllegalTransition:
            continue
        assert not (state in ENDED and after is not state)
        left = left or (event is TurnEvent.ABANDON and sent)
        sent = sent or event is TurnEvent.SEND
        assert not (left and after in LISTENING)
        assert after is not TurnState.DONE or not sent or state in ENDED or event is TurnEvent.RESULT
        state = after


def test_every_state_can_be_reached_and_every_unended_state_can_end() -> None:
    reached = {TurnState.QUEUED}
    for _ in TurnState:
        reached |= {after for state in reached for after in TRANSITIONS[state].values()}
    assert reached == set(TurnState)
    for state in set(TurnState) - ENDED:
        assert TRANSITIONS[state][TurnEvent.LOST] is TurnState.FAILED
