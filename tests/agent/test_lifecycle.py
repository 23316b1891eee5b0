"""The table of a process."""

from __future__ import annotations

import itertools

import pytest

from claude_wrapper.agent.lifecycle import TRANSITIONS, USABLE, Event, State, advance
from claude_wrapper.errors import IllegalTransition


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair_is_in_the_table_or_raises(state: State, event: Event) -> None:
    if event in TRANSITIONS[state]:
        assert advance(state, event) is TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalTransition, match=f"{state}.*{event}"):
            advance(state, event)


def test_a_process_that_is_not_usable_never_becomes_usable_again() -> None:
    for state in set(State) - USABLE:
        assert not USABLE & set(TRANSITIONS[state].values())


def test_every_state_takes_a_stop_and_every_usable_one_a_break_and_an_exit() -> None:
    assert all(Event.STOP in TRANSITIONS[state] for state in State)
    for state in USABLE:
        assert TRANSITIONS[state][Event.BREAK] is State.FAILED
        assert TRANSITIONS[state][Event.EXITED] is State.FAILED
