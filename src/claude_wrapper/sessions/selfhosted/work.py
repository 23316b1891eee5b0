"""One work item of a self-hosted environment: a session that needs a worker. Its states and what changes them. Pure.

`queued` –ack→ `starting` –first heartbeat→ `active` –stop→ `stopping` → `stopped`. A poll leaves an item queued, but out
of sight until it is old enough to be handed out again. A lease that ends puts the item back into the queue, or stops it
if that was asked for. Source of the rules: wire reference 2.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from claude_wrapper.errors import Conflict, PreconditionFailed
from claude_wrapper.tenancy.workerring import holds

QUEUED: Final = "queued"
STARTING: Final = "starting"
ACTIVE: Final = "active"
STOPPING: Final = "stopping"
STOPPED: Final = "stopped"
LEASED: Final = frozenset({STARTING, ACTIVE, STOPPING})
NO_HEARTBEAT: Final = "NO_HEARTBEAT"
MIN_TTL: Final = 10
MAX_TTL: Final = 600
RECLAIM_MS: Final = 5000


@dataclass(frozen=True, slots=True)
class Work:
    """A row of the queue."""

    id: str
    org_id: str
    environment_id: str
    session_id: str
    state: str
    metadata: Mapping[str, str]
    created_at: datetime
    queued_at: datetime
    polled_at: datetime | None
    acknowledged_at: datetime | None
    started_at: datetime | None
    last_heartbeat: str | None
    ttl_seconds: int
    lease_expires_at: datetime | None
    stop_requested_at: datetime | None
    stopped_at: datetime | None
    generation: int
    floor: int
    holder: int | None
    attempts: int
    version: int

    def to_wire(self, secret: str | None = None) -> dict[str, Any]:
        """The API's object."""
        return {
            "id": self.id,
            "type": "work",
            "environment_id": self.environment_id,
            "state": self.state,
            "data": {"type": "session", "id": self.session_id},
            "metadata": dict(self.metadata),
            "secret": secret,
            "created_at": _text(self.created_at),
            "acknowledged_at": _text(self.acknowledged_at),
            "started_at": _text(self.started_at),
            "latest_heartbeat_at": self.last_heartbeat,
            "stop_requested_at": _text(self.stop_requested_at),
            "stopped_at": _text(self.stopped_at),
        }


@dataclass(frozen=True, slots=True)
class Beat:
    """The answer to a heartbeat."""

    work: Work
    extended: bool

    def to_wire(self) -> dict[str, Any]:
        """The API's object."""
        return {
            "type": "work_heartbeat",
            "state": self.work.state,
            "last_heartbeat": self.work.last_heartbeat or "",
            "lease_extended": self.extended,
            "ttl_seconds": self.work.ttl_seconds,
        }


def settled(work: Work, now: datetime) -> Work:
    """The item as it is now: a lease that has ended counts as given up, whoever looks first."""
    if work.state not in LEASED or work.lease_expires_at is None or now < work.lease_expires_at:
        return work
    if work.state == STOPPING:
        return replace(work, state=STOPPED, stopped_at=now)
    return replace(
        work,
        state=QUEUED,
        queued_at=now,
        polled_at=None,
        acknowledged_at=None,
        started_at=None,
        last_heartbeat=None,
        lease_expires_at=None,
        floor=work.generation,
        holder=None,
    )


def claimable(work: Work, now: datetime, reclaim_ms: int) -> bool:
    """Whether a poll may hand it out: nobody was given it, or whoever was has not acknowledged it in time."""
    if work.state != QUEUED:
        return False
    return work.polled_at is None or work.polled_at <= now - timedelta(milliseconds=reclaim_ms)


def handed_out(work: Work, now: datetime) -> Work:
    """A poll gave it to a worker, with a token of the next generation."""
    return replace(work, polled_at=now, generation=work.generation + 1)


def acknowledged(work: Work, now: datetime, ttl: int) -> Work:
    """A worker takes it. Raises Conflict for an item that is not waiting for that."""
    if work.state != QUEUED or work.polled_at is None:
        why = "was handed to no worker" if work.state == QUEUED else f"is {work.state}"
        raise Conflict(f"work {work.id} {why}; poll for another item")
    ends = now + timedelta(seconds=ttl)
    return replace(work, state=STARTING, acknowledged_at=now, ttl_seconds=ttl, lease_expires_at=ends)


def beaten(work: Work, now: datetime, ttl: int, *, expected: str | None, generation: int | None) -> Beat:
    """A heartbeat of the worker that holds it. `generation`: of its token; None: it came with an environment key.

    Raises PreconditionFailed (the lease is another's, or back in the queue) and Conflict (not acknowledged yet).
    """
    if generation is not None and not holds(work, generation):
        raise lost(work)
    if work.state == STOPPED:
        return Beat(work, extended=False)
    if work.state == QUEUED:
        if expected is not None and expected != NO_HEARTBEAT:
            raise lost(work)
        raise Conflict(f"work {work.id} is queued; acknowledge it before its first heartbeat")
    if work.state != STOPPING and expected is not None and expected != (work.last_heartbeat or NO_HEARTBEAT):
        raise lost(work)
    return Beat(
        replace(
            work,
            state=STOPPING if work.state == STOPPING else ACTIVE,
            started_at=work.started_at or now,
            last_heartbeat=_later(work.last_heartbeat, now),
            ttl_seconds=ttl,
            lease_expires_at=now + timedelta(seconds=ttl),
            holder=work.holder if generation is None else generation,
        ),
        extended=True,
    )


def lost(work: Work) -> PreconditionFailed:
    """What a worker is told whose lease is another's."""
    state = {
        "state": work.state,
        "ttl_seconds": work.ttl_seconds,
        "last_heartbeat": work.last_heartbeat,
        "lease_extended": False,
    }
    return PreconditionFailed(
        f"expected_last_heartbeat is not the last heartbeat of work {work.id}: another worker may hold it",
        details={"error_code": "heartbeat_precondition_failed", "current_state": state},
    )


def stop_asked(work: Work, now: datetime, *, force: bool, generation: int | None) -> Work:
    """Somebody wants it stopped; `generation`: of a worker's token. Raises Conflict for a stopped item and for a
    worker that has lost it."""
    if work.state == STOPPED:
        raise Conflict(f"work {work.id} is stopped already")
    if generation is not None and not holds(work, generation):
        raise Conflict(f"work {work.id} is another worker's by now")
    if work.state == QUEUED or force:
        return replace(
            work, state=STOPPED, stop_requested_at=work.stop_requested_at or now, stopped_at=now, polled_at=None
        )
    if work.state == STOPPING:
        return work
    return replace(work, state=STOPPING, stop_requested_at=now)


def ttl_of(desired: int | None, default: int) -> int:
    """How long a lease is, in seconds."""
    return default if desired is None else min(max(desired, MIN_TTL), MAX_TTL)


def _later(last: str | None, now: datetime) -> str:
    """A text that no heartbeat of this item had before: it has to be said again byte for byte."""
    if last is not None:
        now = max(now, datetime.fromisoformat(last) + timedelta(microseconds=1))
    return str(_text(now))


def _text(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
