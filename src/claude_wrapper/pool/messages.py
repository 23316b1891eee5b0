"""What goes into a decision and what comes out of it: plain values, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from claude_wrapper.pool.requests import ClaimRequest, Keep, Kind, Refusal
from claude_wrapper.pool.settings import Profile
from claude_wrapper.pool.slot import Reason

# Events ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The pool begins its work."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A claim arrives."""

    request: ClaimRequest


@dataclass(frozen=True, slots=True)
class Accepted:
    """The claimer has taken over the slot that it was granted."""

    claim: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The claimer is gone before it accepted; it may have been granted a slot meanwhile."""

    claim: str


@dataclass(frozen=True, slots=True)
class Released:
    """The holder gives its slot back. `memory` is the process's resident size now, if measured."""

    claim: str
    keep: Keep
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """A session needs its process no more: wiped for others of its organisation, or with its state kept."""

    session: str
    hibernate: bool = False


@dataclass(frozen=True, slots=True)
class SpawnReady:
    """A process runs and is initialised."""

    slot: str
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class SpawnBroke:
    """A process could not be started."""

    slot: str
    cause: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Hibernated:
    """The state of the slot's session is kept (or keeping it was given up).

    `resume` is the launch data with which the session continues; claims of it that wait already will use it.
    """

    slot: str
    resume: Any = None


@dataclass(frozen=True, slots=True)
class Rewound:
    """A rewind ended; `clean` says whether nothing of the former session is left."""

    slot: str
    clean: bool


@dataclass(frozen=True, slots=True)
class StopEnded:
    """The process is gone and cleaned up."""

    slot: str


@dataclass(frozen=True, slots=True)
class Exited:
    """A process ended by itself."""

    slot: str


@dataclass(frozen=True, slots=True)
class Measured:
    """Resident bytes by slot."""

    memory: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """No new claims from now on."""


@dataclass(frozen=True, slots=True)
class CloseAsked:
    """Everything ends; with `force` also what is busy."""

    force: bool = False


Event = (
    Started
    | Asked
    | Accepted
    | Withdrawn
    | Released
    | SessionEnded
    | SpawnReady
    | SpawnBroke
    | Hibernated
    | Rewound
    | StopEnded
    | Exited
    | Measured
    | Ticked
    | DrainAsked
    | CloseAsked
)


# Actions ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a process; answer with `SpawnReady` or `SpawnBroke`."""

    slot: str
    profile: Profile
    resume: Any = None


@dataclass(frozen=True, slots=True)
class Grant:
    """Hand the slot to the claimer, who answers with `Accepted` or `Withdrawn`."""

    claim: str
    slot: str
    kind: Kind
    waited: float
    resume: Any = None
    """Launch data with which the process was started for this very claim."""


@dataclass(frozen=True, slots=True)
class Revoke:
    """A grant that was not accepted yet is void (the process died): the claimer waits on."""

    claim: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the claimer that it gets nothing; the claim is forgotten already."""

    claim: str
    refusal: Refusal
    cause: BaseException | None = None
    behind_own_session: bool = False
    """Whether it waited for an earlier turn of its own session."""


@dataclass(frozen=True, slots=True)
class Hibernate:
    """Keep the session's state, then answer with `Hibernated`."""

    slot: str
    session: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Rewind:
    """Wipe the former session out of the process, then answer with `Rewound`."""

    slot: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process and whatever is under way for this slot, then answer with `StopEnded`."""

    slot: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Freeze:
    slot: str


@dataclass(frozen=True, slots=True)
class Thaw:
    slot: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The process of an idle session ended by itself."""

    session: str
    slot: str


Action = Spawn | Grant | Revoke | Refuse | Hibernate | Rewind | Stop | Freeze | Thaw | Lost
