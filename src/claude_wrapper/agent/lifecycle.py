"""The life of one agent process, as a table.

    starting ──ready──► ready ◄──finish── busy
        │                 │ ──begin──► │
        └────── stop ─────┴───────────┴──► closing ──exited──► closed
        every living state ──exited / break──► failed

`failed` says that the process is of no use any more: it ended by itself or did what it must not do. It may still be
dying. `closed` says that it ended because we asked.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from claude_wrapper.errors import IllegalTransition


class State(enum.StrEnum):
    """What a process is doing."""

    STARTING = "starting"
    """Spawned; `initialize` has not been answered."""
    READY = "ready"
    BUSY = "busy"
    """A turn is running or being drained."""
    CLOSING = "closing"
    CLOSED = "closed"
    FAILED = "failed"


class Event(enum.StrEnum):
    """What can happen to a process."""

    READY = "ready"
    BEGIN = "begin"
    FINISH = "finish"
    STOP = "stop"
    EXITED = "exited"
    BREAK = "break"
    """It broke a bound or the protocol and is being killed."""


_S, _E = State, Event

TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    _S.STARTING: {
        _E.READY: _S.READY,
        _E.BEGIN: _S.BUSY,  # a turn without `initialize` is legal for the CLI
        _E.STOP: _S.CLOSING,
        _E.EXITED: _S.FAILED,
        _E.BREAK: _S.FAILED,
    },
    _S.READY: {
        _E.READY: _S.READY,  # a second `initialize` is accepted by the CLI
        _E.BEGIN: _S.BUSY,
        _E.STOP: _S.CLOSING,
        _E.EXITED: _S.FAILED,
        _E.BREAK: _S.FAILED,
    },
    _S.BUSY: {
        _E.READY: _S.BUSY,
        _E.FINISH: _S.READY,
        _E.STOP: _S.CLOSING,
        _E.EXITED: _S.FAILED,
        _E.BREAK: _S.FAILED,
    },
    _S.CLOSING: {
        _E.READY: _S.CLOSING,
        _E.FINISH: _S.CLOSING,  # the CLI ends a running turn after the end of its input
        _E.STOP: _S.CLOSING,
        _E.EXITED: _S.CLOSED,
        _E.BREAK: _S.CLOSING,
    },
    _S.CLOSED: {_E.FINISH: _S.CLOSED, _E.STOP: _S.CLOSED, _E.EXITED: _S.CLOSED, _E.BREAK: _S.CLOSED},
    _S.FAILED: {_E.FINISH: _S.FAILED, _E.STOP: _S.FAILED, _E.EXITED: _S.FAILED, _E.BREAK: _S.FAILED},
}

USABLE = frozenset({State.STARTING, State.READY, State.BUSY})
"""States in which a process takes turns and control calls."""


def advance(state: State, event: Event) -> State:
    """The next state. Raises IllegalTransition when the table has none."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"a process that is {state} cannot take the event {event}") from None
