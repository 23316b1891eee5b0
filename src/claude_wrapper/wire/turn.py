"""The life of one turn, from the caller's question to the CLI's `result`, as a table.

A process answers one turn at a time. What makes this a machine and not a flag is the caller who leaves: the process
goes on printing, and these frames must reach nobody, least of all the next turn. So a turn that was sent ends only by
its own `result` (DONE) or with the process (FAILED); a caller's leaving moves it to DRAINING, where frames are dropped
until that `result`. INTERRUPTING differs from DRAINING in one point: the caller still listens.

    queued ──send──► started ──frame──► streaming ──result──► done
      │ abandon         │   interrupt │      │
      ▼                 ▼             ▼      │ abandon
     done            interrupting ──abandon──┴► draining ──result──► done
                        any of them: lost, expire ──► failed

Events that can be late by nature (an interrupt or abandonment after the end, the loss of a process whose turn is over)
are in the table and change nothing. A frame or a result after the end is a fault of the caller of this table and raises.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from claude_wrapper.errors import IllegalTransition


class TurnState(enum.StrEnum):
    """Where a turn is."""

    QUEUED = "queued"
    """Waiting for the turns before it; nothing was written."""
    STARTED = "started"
    """Its line is on its way; no frame of it was seen."""
    STREAMING = "streaming"
    INTERRUPTING = "interrupting"
    """The caller asked to stop and waits for the result."""
    DRAINING = "draining"
    """The caller is gone; frames are dropped until the result."""
    DONE = "done"
    """Its result was seen, or it was given up before it was sent."""
    FAILED = "failed"
    """The process was lost, or had to be killed, before the result."""


class TurnEvent(enum.StrEnum):
    """What can happen to a turn."""

    SEND = "send"
    FRAME = "frame"
    RESULT = "result"
    INTERRUPT = "interrupt"
    ABANDON = "abandon"
    EXPIRE = "expire"
    """A bound on its time or output was reached; the process is killed."""
    LOST = "lost"
    """The process ended or broke the protocol."""


_S, _E = TurnState, TurnEvent

TRANSITIONS: Mapping[TurnState, Mapping[TurnEvent, TurnState]] = {
    _S.QUEUED: {_E.SEND: _S.STARTED, _E.ABANDON: _S.DONE, _E.EXPIRE: _S.FAILED, _E.LOST: _S.FAILED},
    _S.STARTED: {
        _E.FRAME: _S.STREAMING,
        _E.RESULT: _S.DONE,
        _E.INTERRUPT: _S.INTERRUPTING,
        _E.ABANDON: _S.DRAINING,
        _E.EXPIRE: _S.FAILED,
        _E.LOST: _S.FAILED,
    },
    _S.STREAMING: {
        _E.FRAME: _S.STREAMING,
        _E.RESULT: _S.DONE,
        _E.INTERRUPT: _S.INTERRUPTING,
        _E.ABANDON: _S.DRAINING,
        _E.EXPIRE: _S.FAILED,
        _E.LOST: _S.FAILED,
    },
    _S.INTERRUPTING: {
        _E.FRAME: _S.INTERRUPTING,
        _E.RESULT: _S.DONE,
        _E.INTERRUPT: _S.INTERRUPTING,
        _E.ABANDON: _S.DRAINING,
        _E.EXPIRE: _S.FAILED,
        _E.LOST: _S.FAILED,
    },
    _S.DRAINING: {
        _E.FRAME: _S.DRAINING,
        _E.RESULT: _S.DONE,
        _E.INTERRUPT: _S.DRAINING,
        _E.ABANDON: _S.DRAINING,
        _E.EXPIRE: _S.FAILED,
        _E.LOST: _S.FAILED,
    },
    _S.DONE: {_E.INTERRUPT: _S.DONE, _E.ABANDON: _S.DONE, _E.LOST: _S.DONE},
    _S.FAILED: {_E.INTERRUPT: _S.FAILED, _E.ABANDON: _S.FAILED, _E.EXPIRE: _S.FAILED, _E.LOST: _S.FAILED},
}

ENDED = frozenset({TurnState.DONE, TurnState.FAILED})
LISTENING = frozenset({TurnState.STARTED, TurnState.STREAMING, TurnState.INTERRUPTING})
"""States in which frames go to the caller."""


def advance(state: TurnState, event: TurnEvent) -> TurnState:
    """The next state. Raises IllegalTransition when the table has none."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"a turn that is {state} cannot take the event {event}") from None
