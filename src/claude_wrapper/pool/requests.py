"""What a claimer says and hears: the request, how it was answered, how it ends."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from claude_wrapper.pool.settings import Profile


class Kind(enum.StrEnum):
    """How a claim was answered."""

    WARM = "warm"
    """The session's own process."""
    REUSED = "reused"
    """A process that served the same organisation before, rewound."""
    SPARE = "spare"
    """A virgin process that was waiting."""
    COLD = "cold"
    """A process that was started while the claim waited."""


class Refusal(enum.StrEnum):
    """Why a claim gets no process."""

    OVERLOADED = "overloaded"
    TIMEOUT = "timeout"
    DRAINING = "draining"
    SPAWN_FAILED = "spawn_failed"
    FOREIGN = "foreign"
    """The session is bound to another organisation."""


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """One session asks for a process. `claim` is unique among the outstanding claims."""

    claim: str
    session: str
    org: str
    principal: str
    profile: Profile
    reuse_idle: bool = False
    """Whether the same principal's least recently used idle process may be hibernated and rewound for this session."""
    resume: Any = None
    """Special launch data, passed to the factory untouched: then only the session's own or a new process will do."""
    resume_on_spare: bool = False
    """A spare that waits will do, too: the claimer itself gives it what `resume` stands for."""
    weight: int = 1
    """The organisation's share relative to others."""


class Keep(enum.StrEnum):
    """What a claim's holder says about the process when it gives it back."""

    SESSION = "session"
    """The process stays with the session, idle."""
    DETACH = "detach"
    """The session is over; the process may serve the same organisation after a rewind."""
    DISCARD = "discard"
    """The process is broken: it is stopped."""
