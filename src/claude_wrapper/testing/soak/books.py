"""What the server wrote down, read from its database at the end."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from claude_wrapper.storage import Database
from claude_wrapper.storage.dialects import now_ms
from claude_wrapper.storage.tables.replicas import replicas
from claude_wrapper.storage.tables.sessions import session_events
from claude_wrapper.storage.tables.usage import usage_calls


@dataclass(slots=True)
class Books:
    """The ledger and the event logs, of all organisations."""

    ledger: list[dict[str, Any]] = field(default_factory=list)
    sequences: list[tuple[str, int, int, int]] = field(default_factory=list)
    """(session, rows, least number, largest number)."""
    streams: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    """(number, id) of each session's own stream, in order."""
    leases: list[str] = field(default_factory=list)
    """Replicas whose lease on their sessions still runs."""


# tenant-scope: the soak's own look at the books of all organisations of the server that it started itself
async def read_books(url: str) -> Books:
    """Read them all: this is the operator's own look, not a tenant's."""
    database, books = Database(url), Books()
    events = session_events.c
    try:
        async with database.read() as tx:
            books.ledger = [dict(row) for row in (await tx.execute(sa.select(usage_calls))).mappings()]
            living = sa.select(replicas.c.id).where(replicas.c.expires_at > now_ms())
            books.leases = list((await tx.execute(living)).scalars())
            counts = sa.select(
                events.session_id, sa.func.count(), sa.func.min(events.seq), sa.func.max(events.seq)
            ).group_by(events.session_id)
            books.sequences = [(row[0], row[1], row[2], row[3]) for row in await tx.execute(counts)]
            stream = sa.select(events.session_id, events.seq, events.id).where(events.thread_id.is_(None))
            for session, seq, event in await tx.execute(stream.order_by(events.session_id, events.seq)):
                books.streams[session].append((seq, event))
    finally:
        await database.close()
    return books
