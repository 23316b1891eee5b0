"""The life of a slot, as one table.

A slot is a place for one Claude process. It is created when the start of a process is decided and is gone when the
process has been stopped and cleaned up, so that every slot of the table counts towards `max_processes`.

```
spawning -> spare -> bound_busy <-> bound_idle -> hibernating -> stopping -> gone
```

A process that ends by itself is still *stopped*: its directories, its endpoint and what it left behind must go.
Freezing (no CPU for an idle process) is not a state but an attribute with a table of its own, because it is legal in
several states and never changes what a slot may be used for.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from claude_wrapper.errors import IllegalTransition
from claude_wrapper.pool.requests import Keep
from claude_wrapper.pool.settings import Profile


class SlotState(enum.StrEnum):
    """Where a slot is in its life."""

    SPAWNING = "spawning"
    """The process is being started; nobody owns it."""
    SPARE = "spare"
    """Running, virgin: any organisation may take it."""
    BUSY = "bound_busy"
    """A claim holds it."""
    IDLE = "bound_idle"
    """Bound to a session that has no turn now."""
    HIBERNATING = "hibernating"
    """The state of its session is being kept; the session cannot be claimed meanwhile."""
    REWINDING = "rewinding"
    """Its former session is being wiped out of the process."""
    DETACHED = "detached"
    """Clean, without a session; only its own organisation may take it."""
    STOPPING = "stopping"
    """The process is being ended and cleaned up."""
    GONE = "gone"
    """Nothing is left."""


class SlotEvent(enum.StrEnum):
    """What can happen to a slot."""

    READY = "ready"
    FAIL = "fail"
    CLAIM = "claim"
    KEEP = "keep"
    HAND_BACK_VIRGIN = "hand_back_virgin"
    HAND_BACK_CLEAN = "hand_back_clean"
    HIBERNATE = "hibernate"
    REWIND = "rewind"
    CLEAN = "clean"
    STOP = "stop"
    STOPPED = "stopped"


def _table(
    rows: dict[SlotState, dict[SlotEvent, SlotState]],
) -> Mapping[SlotState, Mapping[SlotEvent, SlotState]]:
    return MappingProxyType({state: MappingProxyType(row) for state, row in rows.items()})


TRANSITIONS = _table(
    {
        SlotState.SPAWNING: {
            SlotEvent.READY: SlotState.SPARE,
            SlotEvent.FAIL: SlotState.GONE,
            SlotEvent.STOP: SlotState.STOPPING,
        },
        SlotState.SPARE: {SlotEvent.CLAIM: SlotState.BUSY, SlotEvent.STOP: SlotState.STOPPING},
        SlotState.BUSY: {
            SlotEvent.KEEP: SlotState.IDLE,
            SlotEvent.REWIND: SlotState.REWINDING,
            SlotEvent.HAND_BACK_VIRGIN: SlotState.SPARE,
            SlotEvent.HAND_BACK_CLEAN: SlotState.DETACHED,
            SlotEvent.STOP: SlotState.STOPPING,
        },
        SlotState.IDLE: {
            SlotEvent.CLAIM: SlotState.BUSY,
            SlotEvent.HIBERNATE: SlotState.HIBERNATING,
            SlotEvent.REWIND: SlotState.REWINDING,
            SlotEvent.STOP: SlotState.STOPPING,
        },
        SlotState.HIBERNATING: {SlotEvent.REWIND: SlotState.REWINDING, SlotEvent.STOP: SlotState.STOPPING},
        SlotState.REWINDING: {SlotEvent.CLEAN: SlotState.DETACHED, SlotEvent.STOP: SlotState.STOPPING},
        SlotState.DETACHED: {SlotEvent.CLAIM: SlotState.BUSY, SlotEvent.STOP: SlotState.STOPPING},
        SlotState.STOPPING: {SlotEvent.STOPPED: SlotState.GONE},
        SlotState.GONE: {},
    },
)

FREEZABLE = frozenset({SlotState.SPARE, SlotState.IDLE, SlotState.DETACHED})
"""States in which nobody talks to the process, so that it may be stopped by the freezer."""


def advance(state: SlotState, event: SlotEvent) -> SlotState:
    """The state after `event`. Raises `IllegalTransition` when the table has no such row."""
    after = TRANSITIONS[state].get(event)
    if after is None:
        raise IllegalTransition(f"slot: {event.value} is not possible in state {state.value}")
    return after


class Reason(enum.StrEnum):
    """Why a process is hibernated, rewound or stopped."""

    IDLE = "idle"
    CAPACITY = "capacity"
    ORG_LIMIT = "org_limit"
    PRINCIPAL_LIMIT = "principal_limit"
    MEMORY = "memory"
    PROFILE = "profile"
    REUSE = "reuse"
    AGE = "age"
    TURNS = "turns"
    RESIDENT = "resident"
    SURPLUS = "surplus"
    ASKED = "asked"
    DISCARDED = "discarded"
    CRASHED = "crashed"
    NOT_CLEAN = "not_clean"
    UNCLAIMED = "unclaimed"
    CLOSED = "closed"


@dataclass(slots=True)
class Slot:
    """One slot. Only `claude_wrapper.pool.state` changes `state`, through `apply`."""

    id: str
    profile: Profile
    created_at: float
    """Monotonic seconds at which the start was decided."""
    resume: Any = None
    """Special launch data of a claim; the process then serves that claim or nobody."""
    spawned_for: str | None = None
    """The claim whose demand started this process."""
    state: SlotState = SlotState.SPAWNING
    frozen: bool = False
    ready_at: float | None = None
    ready_step: int = -1
    """Number of the decision in which the process became ready: handed over in the same one, it is a cold start."""
    last_used: float = 0.0
    org: str | None = None
    """Never changes once a claim was accepted."""
    principal: str | None = None
    session: str | None = None
    claim: str | None = None
    virgin: bool = True
    """No holder has ever accepted it."""
    turns: int = 0
    memory: int | None = None
    """Resident bytes when last measured."""
    exited: bool = False
    then_rewind: bool = False
    """After hibernating: rewind for another session instead of stopping."""
    awaited_by: str | None = None
    """The claim for which it is being hibernated and rewound."""
    on_release: Keep | None = None
    """What `end_session` decided while the process was busy."""
    hibernate_on_release: bool = False
    reason: Reason | None = field(default=None)

    @property
    def dedicated(self) -> bool:
        """Whether it was launched for one claim only."""
        return self.resume is not None

    def apply(self, event: SlotEvent) -> SlotState:
        """Take the transition; returns the state before it."""
        before = self.state
        self.state = advance(before, event)
        return before


def render_mermaid() -> str:
    """The table as a mermaid state diagram; `docs/pool-states.md` holds it and a test compares."""
    lines = ["stateDiagram-v2", f"    [*] --> {SlotState.SPAWNING.value}"]
    lines += [
        f"    {state.value} --> {after.value}: {event.value}"
        for state, row in TRANSITIONS.items()
        for event, after in row.items()
    ]
    lines.append(f"    {SlotState.GONE.value} --> [*]")
    return "\n".join(lines)
