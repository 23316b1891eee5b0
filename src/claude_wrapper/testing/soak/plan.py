"""What a soak does, decided by its seed alone: conversations, their turns, and the faults. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

TURN_KINDS: Final = (
    ("plain", 34),
    ("streamed", 30),
    ("recall", 6),
    ("tools", 6),
    ("hang up", 6),
    ("slow", 3),
    ("overloaded once", 3),
    ("overloaded", 2),
    ("rate limited", 2),
    ("server error once", 2),
    ("refused", 2),
    ("cut", 2),
    ("error in stream", 2),
)
"""Kinds of turns with their weights. The last nine are faults."""
CALM: Final = frozenset({"plain", "streamed", "recall", "tools"})
PROCESS_FAULTS: Final = ("kill process", "stop process")
SERVER_FAULTS: Final = ("kill server", "end server")


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """One turn. `prompt` holds the nonce and the directives for the scripted upstream."""

    kind: str
    nonce: str
    prompt: str
    pause: float

    @property
    def fault(self) -> bool:
        return self.kind not in CALM

    @property
    def streamed(self) -> bool:
        return self.kind in {"streamed", "hang up", "cut", "error in stream", "slow"}


@dataclass(frozen=True, slots=True)
class ConversationPlan:
    """One conversation of one caller."""

    number: int
    name: str | None
    """Named conversations are held by the server; the others send their history."""
    calm: bool
    """Untouched by faults of its own: what its latency says is how far others' faults reach."""
    turns: tuple[TurnPlan, ...]


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Something done to a process. `choice` picks among those there are: 0 to 1."""

    at: float
    kind: str
    choice: float


def conversations(seed: int) -> Iterator[ConversationPlan]:
    """Conversations without end; the same ones for the same seed."""
    rng = random.Random(f"conversations {seed}")  # noqa: S311 - a plan, not a secret
    number = 0
    while True:
        number += 1
        calm = rng.random() < 0.3
        turns = tuple(_turn(rng, number, turn, calm=calm) for turn in range(rng.choice((1, 2, 3, 5, 8))))
        yield ConversationPlan(number, f"soak-{number}" if rng.random() < 0.3 else None, calm, turns)


def faults(seed: int, seconds: float, *, process_every: float = 6.0, server_every: float = 120.0) -> list[FaultPlan]:
    """Faults of processes and of the server, in order; none in the last fifth, so that everything can settle."""
    rng = random.Random(f"faults {seed}")  # noqa: S311 - a plan, not a secret
    planned: list[FaultPlan] = []
    for kinds, every in ((PROCESS_FAULTS, process_every), (SERVER_FAULTS, server_every)):
        at = 0.0
        while (at := at + rng.uniform(0.5, 1.5) * every) < seconds * 0.8:
            planned.append(FaultPlan(at, rng.choice(kinds), rng.random()))
    return sorted(planned, key=lambda one: one.at)


def _turn(rng: random.Random, conversation: int, turn: int, *, calm: bool) -> TurnPlan:
    kinds = [(kind, weight) for kind, weight in TURN_KINDS if not calm or kind in CALM]
    kind = rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]
    nonce = f"n{conversation:05d}x{turn:02d}x{rng.randrange(16**6):06x}"
    return TurnPlan(kind, nonce, _prompt(kind, nonce), rng.uniform(0.0, 0.4))


def _prompt(kind: str, nonce: str) -> str:
    said = f"{nonce} [[say {nonce} is the answer]]"
    match kind:
        case "recall":
            return f"{said} [[recall]]"
        case "tools":
            return f'{nonce} [[tool look {{"what": "{nonce}"}}]] [[then]] [[say {nonce} is the answer]]'
        case "hang up":
            return f"{nonce} [[say {nonce}]] [[tokens 200]] [[delay 30]]"
        case "slow":
            return f"{said} [[first 700]] [[delay 40]]"
        case "overloaded once":
            return f"{said} [[error-once 529]]"
        case "overloaded":
            return f"{said} [[error 529]] [[retry-after 0]]"
        case "rate limited":
            return f"{said} [[error 429]] [[retry-after 0]]"
        case "server error once":
            return f"{said} [[error-once 500]]"
        case "refused":
            return f"{said} [[error 400]]"
        case "cut":
            return f"{said} [[cut 2]]"
        case "error in stream":
            return f"{said} [[error-after 2]]"
    return said
