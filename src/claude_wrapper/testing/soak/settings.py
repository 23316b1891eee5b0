"""How long a soak is and how hard, and the settings of the servers that it starts."""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass, field
from typing import Final

from claude_wrapper.testing.soak import canary, reads
from claude_wrapper.testing.soak.messages import TURN_SECONDS

FAULTS_PER_SECOND: Final = 500 / 600
LEASE_SECONDS: Final = 5.0
"""A replica that is silent for longer is dead to the others."""


@dataclass(frozen=True, slots=True)
class SoakSettings:
    """How long, how hard, and what must hold."""

    seconds: float = 600.0
    seed: int = 1
    replicas: int | None = None
    """None: two on Postgres and Redis, one on what is embedded."""
    callers: int = 10
    """At most; fewer while answers are slow."""
    max_processes: int = 16
    """Of all replicas together."""
    process_fault_every: float = 3.0
    large_fault_every: float = 9.0
    """Between the end of one fault of a store or the server and the next one."""
    faults_least: int | None = None
    """None: 500 in ten minutes."""
    calm_p99_seconds: float = 20.0
    most_resident_bytes: float = 700 * 2**20
    most_growth_bytes: float = 120 * 2**20
    most_descriptors: float = 600.0
    embedded: bool = False
    """SQLite and memory, also where Postgres and Redis could be had."""
    database_url: str | None = None
    redis_url: str | None = None
    server_settings: dict[str, str] = field(default_factory=dict)

    @property
    def wanted_faults(self) -> int:
        return int(self.seconds * FAULTS_PER_SECOND) if self.faults_least is None else self.faults_least

    def of_servers(self, replicas: int) -> dict[str, str]:
        """What every one of so many replicas is given, by the settings' names."""
        processes = max(2, self.max_processes // replicas)
        # The tenant that is struck cannot take the places of the one that is not.
        share = str(max(2, processes * 3 // 4))
        return {
            "log_level": "warning",
            "max_processes": str(processes),
            "max_processes_per_org": share,
            "max_processes_per_principal": share,
            "spares": str(min(2, max(1, processes // 4))),
            "agent_spares": "0",
            "idle_seconds": "20",
            "sweep_seconds": "5",
            "session_seconds": "60",
            "held_session_seconds": "60",
            "turn_seconds": str(TURN_SECONDS),
            "queue_seconds": "60",
            "drain_seconds": "5",
            "breaker_failures": "20",
            "breaker_seconds": "2",
            "upstream_attempts": "2",
            "upstream_private": "true",
            "upstream_hedge_seconds": str(reads.HEDGE_SECONDS),
            "lease_seconds": str(LEASE_SECONDS),
            # What one replica writes the others read, and they know each other's signature.
            "master_key": base64.b64encode(secrets.token_bytes(32)).decode(),
            "key_pepper": secrets.token_urlsafe(32),
            **canary.RULES,
            **self.server_settings,
        }
