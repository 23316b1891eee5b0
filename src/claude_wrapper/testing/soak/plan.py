"""What a soak does, decided by its seed alone: conversations, their turns, and the faults. Pure.

How many of the conversations are held depends on the machine; what each of them is does not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MESSAGES: Final = "messages"
"""`/v1/messages`, with the whole history in each request or with a name that the server holds it under."""
SESSIONS: Final = "sessions"
"""`/v1/sessions`, with an event stream beside."""

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
SLOW_READ: Final = "count that hangs"
READS: Final = ("count", SLOW_READ)
"""Token counts. The second kind never comes: only a second, equal request is answered."""
_SLOW_READS: Final = 0.12
"""Less than the share of reads that may be asked twice."""
_READS_FROM: Final = 90_000
"""Numbers of reads among the conversations."""

CALM: Final = frozenset({"plain", "streamed", "recall", "tools", "shell"})
"""Turns that are no faults. `shell` is `tools` in a session whose agent has a shell."""
FAULTY: Final = (frozenset(kind for kind, _ in TURN_KINDS) - CALM) | {SLOW_READ}
"""Requests that bring a fault with them. Requests that are no turns (`create`, `file`, `stream`) are in neither."""

PROCESS_FAULTS: Final = (("kill process", 5), ("stop process", 2), ("flood output", 2), ("pause process", 1))
STORE_FAULTS: Final = ("restart database", "restart redis", "blob store away", "disk full")
SERVER_FAULTS: Final = ("kill server", "end server")
REPLICA_FAULTS: Final = (*SERVER_FAULTS, "pause server", "kill all servers")
"""Of several replicas: one of them, but for the last kind."""
STREAM_FAULT: Final = "stream hung up"
HALF_REQUEST: Final = "half a request"
"""Comes with every fault of a process."""


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
    door: str
    """`MESSAGES` or `SESSIONS`."""
    name: str | None
    """Conversations of `MESSAGES` with a name are held by the server; the others send their history."""
    calm: bool
    """Untouched by faults of its own: what its latency says is how far others' faults reach."""
    turns: tuple[TurnPlan, ...]
    shell: bool = False
    """The session's agent may run commands, where the server's sandbox allows it."""
    stream_cuts: tuple[int, ...] = ()
    """After so many further events the client drops its event stream and comes back."""
    file_bytes: int = 0
    """Size of a file that is uploaded before and read after the turns; 0: none."""


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Something done to a process, a store or the server."""

    after: float
    """Seconds since the fault before it in its lane ended."""
    kind: str
    choice: float
    """Picks among the victims there are, and the length of an outage: 0 to 1."""


def conversations(seed: int) -> Iterator[ConversationPlan]:
    """Conversations without end; the same ones for the same seed."""
    rng = random.Random(f"conversations {seed}")  # noqa: S311 - a plan, not a secret
    number = 0
    while True:
        number += 1
        calm = rng.random() < 0.3
        door = SESSIONS if rng.random() < 0.35 else MESSAGES
        shell = door == SESSIONS and rng.random() < 0.3
        count = rng.choice((1, 2, 3, 5, 8)) if door == MESSAGES else rng.choice((1, 2, 3, 4))
        turns = tuple(_turn(rng, number, turn, door, calm=calm, shell=shell) for turn in range(count))
        name = f"soak-{number}" if door == MESSAGES and rng.random() < 0.3 else None
        cuts = tuple(rng.randint(2, 15) for _ in range(rng.choice((0, 1, 3)))) if door == SESSIONS and not calm else ()
        file_bytes = rng.choice((0, 4_000, 300_000)) if door == SESSIONS else 0
        yield ConversationPlan(number, door, name, calm, turns, shell, cuts, file_bytes)


def process_faults(seed: int, every: float) -> Iterator[FaultPlan]:
    """Faults of single processes, without end."""
    rng = random.Random(f"process faults {seed}")  # noqa: S311 - a plan, not a secret
    kinds, weights = [kind for kind, _ in PROCESS_FAULTS], [weight for _, weight in PROCESS_FAULTS]
    while True:
        yield FaultPlan(rng.uniform(0.5, 1.5) * every, rng.choices(kinds, weights)[0], rng.random())


def large_faults(seed: int, every: float, *, stores: tuple[str, ...], replicas: int = 1) -> Iterator[FaultPlan]:
    """Faults of the stores and of the server, without end, one after the other; every third is the server's, with
    several replicas every second.

    `stores`: those of `STORE_FAULTS` that can be had here. Each comes as often as the others of its kind.
    """
    kinds = SERVER_FAULTS if replicas == 1 else REPLICA_FAULTS
    each = 3 if replicas == 1 else 2
    rng = random.Random(f"large faults {seed}")  # noqa: S311 - a plan, not a secret
    waiting: list[str] = []
    servers: list[str] = []
    for number in range(10**9):
        if number % each == each - 1 or not stores:
            servers = servers or rng.sample(kinds, len(kinds))
            kind = servers.pop()
        else:
            waiting = waiting or rng.sample(stores, len(stores))
            kind = waiting.pop()
        yield FaultPlan(rng.uniform(0.7, 1.3) * every, kind, rng.random())


def reads(seed: int) -> Iterator[TurnPlan]:
    """Token counts, without end."""
    rng = random.Random(f"reads {seed}")  # noqa: S311 - a plan, not a secret
    for number in range(10**9):
        nonce = f"n{_READS_FROM + number // 100 % 10_000:05d}x{number % 100:02d}x{rng.randrange(16**6):06x}"
        slow = rng.random() < _SLOW_READS
        kind, prompt = (SLOW_READ, f"{nonce} [[hang]] [[once]]") if slow else ("count", nonce)
        yield TurnPlan(kind, nonce, prompt, rng.uniform(0.2, 1.0))


def conversation_of(nonce: str) -> int:
    """Whose nonce it is."""
    return int(nonce[1:6])


def _turn(rng: random.Random, conversation: int, turn: int, door: str, *, calm: bool, shell: bool) -> TurnPlan:
    kinds = [(kind, weight) for kind, weight in TURN_KINDS if not calm or kind in CALM]
    kind = rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]
    if shell and kind in {"tools", "streamed"}:
        kind = "shell"
    nonce = f"n{conversation:05d}x{turn:02d}x{rng.randrange(16**6):06x}"
    return TurnPlan(kind, nonce, _prompt(kind, nonce, door), rng.uniform(0.0, 0.4))


def _prompt(kind: str, nonce: str, door: str) -> str:
    said = f"{nonce} [[say {nonce} is the answer]]"
    match kind:
        case "recall":
            return f"{said} [[recall]]"
        case "tools":
            tool = "look" if door == MESSAGES else "mcp__client__look"
            return f'{nonce} [[tool {tool} {{"what": "{nonce}"}}]] [[then]] [[say {nonce} is the answer]]'
        case "shell":
            return f'{nonce} [[tool Bash {{"command": "echo {nonce}"}}]] [[then]]'
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
