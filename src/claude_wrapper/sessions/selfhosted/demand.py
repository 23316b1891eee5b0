"""When a session needs a worker: it is queued when it is made, when a dormant one is spoken to, and when its worker
leaves in the middle of something."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import NotFound
from claude_wrapper.ids import WORK
from claude_wrapper.sessions import records
from claude_wrapper.sessions.records import Session
from claude_wrapper.sessions.selfhosted import work as states
from claude_wrapper.sessions.selfhosted import workrows
from claude_wrapper.sessions.selfhosted.work import Work
from claude_wrapper.tenancy.principal import Principal

log = structlog.get_logger(__name__)

MAX_ATTEMPTS: Final = 3
"""Workers in a row that may leave a session without an answered call before nobody else is sent to it by itself."""
_START_NOTHING: Final = frozenset({"user.tool_result", "user.interrupt"})


def queue_channel(environment: str) -> str:
    """Tells the polls of an environment that there is work."""
    return f"environment/{environment}/work"


def is_self_hosted(session: Session) -> bool:
    """Whether its tools run at the customer's."""
    return (session.environment or {}).get("type") == "self_hosted"


async def enqueue(
    tx: AsyncConnection,
    principal: Principal,
    session: Session,
    *,
    now: datetime,
    new_id: Callable[[str], str],
    attempts: int = 0,
) -> bool:
    """Queue a session that needs a worker, unless it has one or waits for one. The caller holds the session's row."""
    if not is_self_hosted(session) or session.environment_id is None or session.ended:
        return False
    live = [states.settled(one, now) for one in await workrows.live_of(tx, principal, session.id)]
    if any(one.state not in {states.STOPPED, states.STOPPING} for one in live):
        return False
    item = Work(
        id=new_id(WORK),
        org_id=session.org_id,
        environment_id=session.environment_id,
        session_id=session.id,
        state=states.QUEUED,
        metadata={},
        created_at=now,
        queued_at=now,
        polled_at=None,
        acknowledged_at=None,
        started_at=None,
        last_heartbeat=None,
        ttl_seconds=0,
        lease_expires_at=None,
        stop_requested_at=None,
        stopped_at=None,
        generation=0,
        floor=0,
        holder=None,
        attempts=attempts,
        version=1,
    )
    await workrows.insert(tx, principal, item)
    return True


def wakes(events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these events of a client make a session go on that may have no worker any more."""
    return any(event["type"] not in _START_NOTHING for event in events)


async def needed_again(
    tx: AsyncConnection, principal: Principal, left: Work, *, now: datetime, new_id: Callable[[str], str]
) -> bool:
    """A worker left this item: queue its session again if it still waits for one. Whether it was queued.

    A worker that leaves just when somebody speaks to the session is no fault; several in a row that achieve nothing are,
    and the session waits for the next message then.
    """
    try:
        session = await records.get_session(tx, principal, left.session_id, lock=True)
    except NotFound:
        return False
    calls = [call for call in await records.calls_of(tx, principal, session.id) if call.kind in records.SANDBOX_KINDS]
    if session.status != records.RUNNING and not any(call.answered_at is None for call in calls):
        return False
    since = left.acknowledged_at or left.created_at
    achieved = any(call.answered_at is not None and call.answered_at >= since for call in calls)
    attempts = 0 if achieved else left.attempts + 1
    if attempts >= MAX_ATTEMPTS:
        log.warning("work.given_up", session=session.id, work=left.id, attempts=attempts)
        return False
    return await enqueue(tx, principal, session, now=now, new_id=new_id, attempts=attempts)


async def dismiss(tx: AsyncConnection, principal: Principal, session: str, *, now: datetime) -> None:
    """The session is over: what waits is stopped, and a worker that serves it is told to."""
    for before in await workrows.live_of(tx, principal, session):
        after = states.settled(before, now)
        if after.state == states.QUEUED:
            after = replace(after, state=states.STOPPED, stop_requested_at=now, stopped_at=now)
        elif after.state != states.STOPPED:
            after = replace(after, state=states.STOPPING, stop_requested_at=after.stop_requested_at or now)
        if not await workrows.write(tx, principal, before, after):
            log.info("work.not_dismissed", work=before.id)  # a worker was faster: it sees the session's end itself
