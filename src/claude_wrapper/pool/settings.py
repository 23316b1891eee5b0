"""What the pool may do, as one frozen value with a docstring per field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from claude_wrapper.errors import ConfigurationError


class Profile(Protocol):
    """A launch profile: hashable, with a name for statistics. The pool looks at nothing else."""

    @property
    def name(self) -> str: ...

    def __hash__(self) -> int: ...

    def __eq__(self, other: object, /) -> bool: ...


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Limits and times of a pool. Times are in seconds, sizes in bytes; `None` switches a bound off."""

    spares: Mapping[Any, int] = field(default_factory=dict)
    """How many virgin processes wait per launch profile. Each costs about 120 MB and saves one caller a cold start.

    Keys are `Profile`s; the key type of a `Mapping` is invariant, hence `Any`.
    """
    max_processes: int = 32
    """Processes of this server in all: starting, spare, bound and stopping ones."""
    max_processes_per_org: int | None = None
    """Processes that one organisation may hold, idle ones included."""
    max_processes_per_principal: int | None = None
    """Processes that one principal may hold, idle ones included."""
    parallel_spawns: int = 2
    """Starts at the same time. A start is CPU-bound for about 0.3 s: more than the cores only makes each one slower."""
    refill_delay_seconds: float = 0.2
    """How long after a spare was taken its replacement is started, so that it does not compete with the first turn."""
    idle_seconds: float = 300.0
    """An idle process is hibernated after this time."""
    sweep_seconds: float = 60.0
    """How often idle processes are looked at; an idle process lives at most `idle_seconds + sweep_seconds`."""
    freeze_after_seconds: float | None = 5.0
    """An idle process gets no CPU after this time. It would burn 4 ms a second; a thaw costs the next turn 15 ms."""
    freeze_spares: bool = False
    """Whether spares are frozen too; off because a spare is there to answer fast."""
    queue_seconds: float = 30.0
    """How long a claim waits before it fails with `PoolTimeout`."""
    queue_length: int = 256
    """How many claims wait; beyond it the organisation that waits for most is refused with `PoolOverloaded`."""
    spawn_attempts: int = 3
    """After so many failed starts on its behalf a waiting claim is told `SpawnFailed`."""
    max_age_seconds: float | None = 6 * 3600.0
    """A process older than this is recycled when it is given back; up to a tenth earlier, so that not all go at once."""
    max_turns: int | None = 500
    """A process that served so many claims is recycled when it is given back."""
    max_resident_bytes: int | None = 1024 * 2**20
    """A process larger than this is recycled when it is given back."""
    memory_limit_bytes: int | None = None
    """Resident bytes of all processes together: above it nothing is started and idle processes are hibernated."""
    spawn_seconds: float = 30.0
    """A start that takes longer has failed."""
    hibernate_seconds: float = 20.0
    """Keeping a session's state that takes longer is given up; the event log still has the conversation."""
    rewind_seconds: float = 5.0
    """A rewind that takes longer has failed, and the process is stopped."""
    stop_seconds: float = 15.0
    """Ending a process that takes longer is tried once more, then counted in `PoolStats.stop_failures`."""

    def __post_init__(self) -> None:
        """Raise `ConfigurationError` naming the first field whose value cannot be used."""
        for name in ("max_processes", "parallel_spawns", "spawn_attempts"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"pool.{name}: must be at least 1")
        for name in ("max_processes_per_org", "max_processes_per_principal", "max_turns"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"pool.{name}: must be at least 1, or none for no bound")
        for name in ("queue_seconds", "queue_length", "refill_delay_seconds"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"pool.{name}: must not be negative")
        for name in ("idle_seconds", "sweep_seconds", "spawn_seconds", "stop_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"pool.{name}: must be more than 0")
        if any(count < 0 for count in self.spares.values()):
            raise ConfigurationError("pool.spares: a count must not be negative")
        if sum(self.spares.values()) > self.max_processes:
            raise ConfigurationError("pool.spares: more spares than max_processes; lower spares or raise max_processes")
