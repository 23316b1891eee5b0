"""Threads of a session: its own agent's, and those of sub-agents."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import NotFound
from claude_wrapper.sessions.budgets import usage_to_wire
from claude_wrapper.sessions.eventlog import rfc3339
from claude_wrapper.sessions.records import Session
from claude_wrapper.storage.dialects import upsert
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.sessions import session_threads
from claude_wrapper.tenancy.principal import Principal, owned


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread."""

    id: str
    parent_id: str | None
    agent_name: str
    status: str
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None

    def to_wire(self, session: Session) -> dict[str, Any]:
        """The API's object. The session's own thread has the session's status and usage."""
        own = self.parent_id is None
        agent = session.agent if own else {**session.agent, "name": self.agent_name}
        return {
            "id": self.id,
            "type": "session_thread",
            "session_id": session.id,
            "parent_thread_id": self.parent_id,
            "agent": agent,
            "status": session.status if own else self.status,
            "stats": {
                "active_seconds": session.active_ms / 1000 if own else None,
                "duration_seconds": (self.updated_at - self.created_at).total_seconds(),
                "startup_seconds": None,
            },
            "usage": usage_to_wire(session.usage) if own else None,
            "created_at": rfc3339(self.created_at),
            "updated_at": rfc3339(session.updated_at if own else self.updated_at),
            "archived_at": None if self.archived_at is None else rfc3339(self.archived_at),
        }


async def note_thread(
    tx: AsyncConnection,
    principal: Principal,
    session: Session,
    thread_id: str,
    *,
    name: str,
    status: str,
    now: datetime,
) -> None:
    """A thread came or changed."""
    changes = {"status": status, "updated_at": now}
    values = {
        "id": thread_id,
        "session_id": session.id,
        "org_id": principal.org,
        "parent_id": None if thread_id == session.thread_id else session.thread_id,
        "agent_name": name[:256],
        "usage": {},
        "created_at": now,
        **changes,
    }
    await tx.execute(upsert(tx.dialect.name, session_threads, ("id",), changes).values(**values))


async def list_threads(
    tx: AsyncConnection, principal: Principal, session: str, statuses: frozenset[str], page: PageRequest
) -> Page[Thread]:
    """A session's threads, the oldest first."""
    table = session_threads
    query = sa.select(table).where(owned(principal, table), table.c.session_id == session)
    if statuses:
        query = query.where(table.c.status.in_(sorted(statuses)))
    return await fetch_page(tx, query, (table.c.created_at, table.c.id), page, _thread)


async def get_thread(tx: AsyncConnection, principal: Principal, session: str, thread_id: str) -> Thread:
    """Raises NotFound."""
    table = session_threads
    query = sa.select(table).where(owned(principal, table), table.c.session_id == session, table.c.id == thread_id)
    row = (await tx.execute(query)).first()
    if row is None:
        raise NotFound(f"session {session} has no thread {thread_id[:128]!r}")
    return _thread(row)


async def archive_thread(
    tx: AsyncConnection, principal: Principal, session: str, thread_id: str, now: datetime
) -> Thread:
    """Archive a sub-agent's thread that has ended."""
    table = session_threads
    where = sa.and_(owned(principal, table), table.c.session_id == session, table.c.id == thread_id)
    await tx.execute(sa.update(table).where(where, table.c.archived_at.is_(None)).values(archived_at=now))
    return await get_thread(tx, principal, session, thread_id)


def _thread(row: Any) -> Thread:
    return Thread(row.id, row.parent_id, row.agent_name, row.status, row.created_at, row.updated_at, row.archived_at)
