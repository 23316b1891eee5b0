"""The rows of sessions, their pending calls and their transcripts. Plain functions over a transaction.

Who may see a session: everybody of its organisation (and workspace) who holds the scope; a conversation that was made
through `/v1/messages` belongs to the key that made it alone, as it does there.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import LeaseLost, NotFound
from claude_wrapper.sessions.budgets import usage_to_wire
from claude_wrapper.sessions.eventlog import rfc3339
from claude_wrapper.sessions.outcomes import shown
from claude_wrapper.sessions.spec import Message, Owner
from claude_wrapper.storage.dialects import for_update, now_ms, upsert
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.replicas import replicas
from claude_wrapper.storage.tables.sessions import session_calls, session_events, session_messages, sessions
from claude_wrapper.storage.tables.snapshots import session_snapshots
from claude_wrapper.tenancy.principal import Principal, owned
from claude_wrapper.wire.managed import Call

IDLE: Final = "idle"
RUNNING: Final = "running"
RESCHEDULING: Final = "rescheduling"
TERMINATED: Final = "terminated"
_CALLING: Final = ("user.define_outcome", "user.interrupt")
STATUSES: Final = frozenset({IDLE, RUNNING, RESCHEDULING, TERMINATED})

BY_SESSIONS: Final = "sessions"
BY_MESSAGES: Final = "messages"

CLIENT_KINDS: Final = frozenset({"custom", "sandbox", "sandbox_ask"})
"""Kinds of calls whose results come from outside: from the API's client, or from the worker of a self-hosted environment."""
CANCELLED: Final[Mapping[str, Any]] = {
    "content": [{"type": "text", "text": "The call was cancelled before it had a result."}],
    "is_error": True,
}
SANDBOX_KINDS: Final = frozenset({"sandbox", "sandbox_ask"})
"""A worker's calls; the second kind waits for a confirmation first."""


@dataclass(frozen=True, slots=True)
class Session:
    """One session as it is stored."""

    id: str
    org_id: str
    workspace_id: str | None
    actor_id: str
    key_id: str | None
    user_id: str | None
    origin: str
    name: str | None
    status: str
    stop_reason: Mapping[str, Any] | None
    title: str | None
    agent_id: str | None
    agent_version: int | None
    agent: Mapping[str, Any]
    environment_id: str | None
    environment: Mapping[str, Any] | None
    vault_ids: Sequence[str]
    metadata: Mapping[str, str]
    budget: Mapping[str, Any] | None
    outcomes: Sequence[Mapping[str, Any]]
    usage: Mapping[str, Any]
    thread_id: str
    last_seq: int
    active_ms: int
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None
    version: int
    holder: str | None
    """The replica that holds it (which may be dead)."""
    fence: int
    turn: Mapping[str, Any] | None
    """The turn that runs, or ran when its server died: `{start, durable}`."""
    asker: Mapping[str, Any] | None

    @property
    def owner(self) -> Owner:
        """Whose conversation it is at the Messages door."""
        return Owner(self.org_id, self.actor_id, self.workspace_id, self.key_id, self.user_id)

    @property
    def agent_name(self) -> str:
        return str(self.agent.get("name") or "agent")

    @property
    def awaited(self) -> tuple[str, ...]:
        """Events that the session waits for the client to answer."""
        reason = self.stop_reason or {}
        return tuple(reason.get("event_ids", ())) if reason.get("type") == "requires_action" else ()

    @property
    def ended(self) -> bool:
        return self.status == TERMINATED or self.archived_at is not None

    def to_wire(self, now: datetime, resources: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """The API's object."""
        ended = self.archived_at or now
        return {
            "id": self.id,
            "type": "session",
            "status": self.status,
            "title": self.title,
            "agent": self.agent,
            "environment_id": self.environment_id,
            "vault_ids": list(self.vault_ids),
            "resources": list(resources),
            "metadata": self.metadata,
            "outcome_evaluations": [shown(one) for one in self.outcomes],
            "budget": self.budget,
            "deployment_id": None,
            "stats": {
                "active_seconds": round(self.active_ms / 1000, 3),
                "duration_seconds": round((ended - self.created_at).total_seconds(), 3),
            },
            "usage": {**usage_to_wire(self.usage), "active_seconds": round(self.active_ms / 1000, 3)},
            "created_at": rfc3339(self.created_at),
            "updated_at": rfc3339(self.updated_at),
            "archived_at": None if self.archived_at is None else rfc3339(self.archived_at),
        }


@dataclass(frozen=True, slots=True)
class Filter:
    """Which sessions a list holds; None: all."""

    agent_id: str | None = None
    agent_version: int | None = None
    statuses: frozenset[str] = frozenset()
    include_archived: bool = False
    created: Mapping[str, datetime] | None = None
    """Bounds of the creation time by gt, gte, lt, lte."""


def visible(principal: Principal) -> sa.ColumnElement[bool]:
    """The WHERE clause of every look at a session."""
    theirs = owned(principal, sessions)
    if principal.is_operator:
        return theirs
    own = sessions.c.actor_id == (principal.actor_id or principal.org)
    return sa.and_(theirs, sa.or_(sessions.c.origin == BY_SESSIONS, own))


async def insert_session(tx: AsyncConnection, values: Mapping[str, Any]) -> None:
    """A new row; the caller gives every column without a default."""
    await tx.execute(sa.insert(sessions).values(**values))


async def get_session(tx: AsyncConnection, principal: Principal, session: str, *, lock: bool = False) -> Session:
    """Raises NotFound, also for somebody else's. `lock`: nobody else changes it before this transaction ends."""
    query = sa.select(sessions).where(visible(principal), sessions.c.id == session)
    row = (await tx.execute(for_update(tx.dialect.name, query) if lock else query)).first()
    if row is None:
        raise NotFound(f"there is no session {session[:128]!r}")
    return _session(row)


async def get_held(tx: AsyncConnection, principal: Principal, session: str, fence: int) -> Session:
    """The session, locked, for a write by its holder. Raises LeaseLost once another replica holds it, and NotFound."""
    found = await get_session(tx, principal, session, lock=True)
    if found.fence != fence:
        raise LeaseLost(f"session {session} was taken over by another replica")
    return found


async def guard(tx: AsyncConnection, principal: Principal, session: str, fence: int) -> None:
    """`get_held` for writes that need nothing of the row; whatever holds its own data of a session can be given it."""
    await _fenced(tx, principal, session, fence, lock=True)


async def check_fence(tx: AsyncConnection, principal: Principal, session: str, fence: int) -> None:
    """The same for those who only read: true at the moment of the question."""
    await _fenced(tx, principal, session, fence, lock=False)


async def _fenced(tx: AsyncConnection, principal: Principal, session: str, fence: int, *, lock: bool) -> None:
    query = sa.select(sessions.c.fence).where(owned(principal, sessions), sessions.c.id == session)
    found = (await tx.execute(for_update(tx.dialect.name, query) if lock else query)).scalar()
    if found is None:
        raise NotFound(f"there is no session {session}")
    if found != fence:
        raise LeaseLost(f"session {session} was taken over by another replica")


# tenant-scope: the server's own upkeep, for all organisations
async def unattended(tx: AsyncConnection, replica: str, limit: int) -> list[Session]:
    """Sessions with something to do that `replica` holds, that nobody holds, or whose holder is dead."""
    living = sa.select(replicas.c.id).where(replicas.c.expires_at > now_ms())
    waiting = (
        sa.select(session_events.c.session_id)
        .where(session_events.c.processed_at.is_(None), session_events.c.type.in_(["user.message", *_CALLING]))
        .distinct()
    )
    free = sa.or_(sessions.c.holder.is_(None), sessions.c.holder == replica, sessions.c.holder.not_in(living))
    query = sa.select(sessions).where(
        free, sessions.c.archived_at.is_(None), sa.or_(sessions.c.status == RUNNING, sessions.c.id.in_(waiting))
    )
    return [_session(row) for row in (await tx.execute(query.order_by(sessions.c.updated_at).limit(limit))).all()]


# tenant-scope: the server's own: a session that another replica named
async def any_session(tx: AsyncConnection, session: str) -> Session | None:
    """The session, whosever it is; None if it was deleted."""
    row = (await tx.execute(sa.select(sessions).where(sessions.c.id == session))).first()
    return None if row is None else _session(row)


async def find_named(tx: AsyncConnection, principal: Principal, actor: str, name: str) -> Session | None:
    """The session that a Messages caller knows under a name of its own."""
    query = sa.select(sessions).where(
        owned(principal, sessions),
        sessions.c.actor_id == actor,
        sessions.c.name == name,
        sessions.c.archived_at.is_(None),
    )
    row = (await tx.execute(query)).first()
    return None if row is None else _session(row)


async def list_sessions(tx: AsyncConnection, principal: Principal, wanted: Filter, page: PageRequest) -> Page[Session]:
    """A page of sessions by creation time."""
    query = sa.select(sessions).where(visible(principal))
    if not wanted.include_archived:
        query = query.where(sessions.c.archived_at.is_(None))
    if wanted.agent_id is not None:
        query = query.where(sessions.c.agent_id == wanted.agent_id)
    if wanted.agent_version is not None:
        query = query.where(sessions.c.agent_version == wanted.agent_version)
    if wanted.statuses:
        query = query.where(sessions.c.status.in_(sorted(wanted.statuses)))
    for bound, at in (wanted.created or {}).items():
        query = query.where(COMPARE[bound](sessions.c.created_at, at))
    return await fetch_page(tx, query, (sessions.c.created_at, sessions.c.id), page, _session)


async def change_session(tx: AsyncConnection, principal: Principal, session: str, **values: Any) -> None:
    """Set columns."""
    await tx.execute(
        sa.update(sessions)
        .where(owned(principal, sessions), sessions.c.id == session)
        .values(version=sessions.c.version + 1, **values)
    )


async def delete_session(tx: AsyncConnection, principal: Principal, session: str) -> None:
    """The row and everything that hangs on it."""
    snapshot = sa.delete(session_snapshots).where(owned(principal, session_snapshots))
    await tx.execute(snapshot.where(session_snapshots.c.session_id == session))
    await tx.execute(sa.delete(sessions).where(owned(principal, sessions), sessions.c.id == session))


def _session(row: Any) -> Session:
    return Session(**row._mapping)  # noqa: SLF001 (SQLAlchemy's public name for it)


COMPARE: Final = {
    "gt": lambda column, at: column > at,
    "gte": lambda column, at: column >= at,
    "lt": lambda column, at: column < at,
    "lte": lambda column, at: column <= at,
}

# Calls ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallRow:
    """A tool call of the session's agent."""

    event_id: str
    tool_use_id: str
    kind: str
    """custom, approval, tool, sandbox or sandbox_ask."""
    thread_id: str | None
    answer: Mapping[str, Any] | None
    """custom and sandbox: `{content, is_error}`; approval and a denied sandbox_ask: `{result, deny_message?}`, with
    `given` once the process knows that an approval's call may run; `output` once the server ran it;
    `{cancelled: true}` when nobody will answer any more."""
    answered_at: datetime | None

    @property
    def result(self) -> Mapping[str, Any]:
        """What its process is given for it: `{content, is_error}`."""
        answer = self.answer or {}
        if answer.get("result") == "deny":
            text = str(answer.get("deny_message") or "The user does not allow this call.")
            return {"content": [{"type": "text", "text": text}], "is_error": True}
        given: Mapping[str, Any] = answer.get("output", answer)
        return given


async def add_calls(tx: AsyncConnection, principal: Principal, session: str, calls: Sequence[Call]) -> None:
    """Note calls that were published."""
    if calls:
        rows = [
            {
                "session_id": session,
                "org_id": principal.org,
                "event_id": call.event_id,
                "tool_use_id": call.tool_use_id,
                "kind": call.kind,
                "thread_id": call.thread_id,
            }
            for call in calls
        ]
        await tx.execute(sa.insert(session_calls), rows)


async def calls_of(
    tx: AsyncConnection, principal: Principal, session: str, *, event_id: str | None = None, open_only: bool = False
) -> list[CallRow]:
    """The calls of a session: all, one, or those that the client owes an answer."""
    table = session_calls
    columns = (
        table.c.event_id,
        table.c.tool_use_id,
        table.c.kind,
        table.c.thread_id,
        table.c.answer,
        table.c.answered_at,
    )
    query = sa.select(*columns).where(owned(principal, table), table.c.session_id == session)
    if event_id is not None:
        query = query.where(table.c.event_id == event_id)
    if open_only:
        query = query.where(table.c.answered_at.is_(None), table.c.kind != "tool")
        # In the order in which they were made.
        made = sa.and_(session_events.c.session_id == table.c.session_id, session_events.c.id == table.c.event_id)
        query = query.join(session_events, made).where(owned(principal, session_events)).order_by(session_events.c.seq)
    return [CallRow(*row) for row in (await tx.execute(query)).all()]


async def has_call(tx: AsyncConnection, principal: Principal, session: str, tool_use_id: str) -> bool:
    """Whether this call of the model was published."""
    table = session_calls
    query = sa.select(table.c.event_id).where(owned(principal, table), table.c.session_id == session)
    return (await tx.execute(query.where(table.c.tool_use_id == tool_use_id).limit(1))).first() is not None


async def answer_call(
    tx: AsyncConnection, principal: Principal, session: str, event_id: str, *, answer: Mapping[str, Any], now: datetime
) -> bool:
    """Record the client's answer; False if there is one already."""
    changed = await tx.execute(
        sa.update(session_calls)
        .where(owned(principal, session_calls), session_calls.c.session_id == session)
        .where(session_calls.c.event_id == event_id, session_calls.c.answered_at.is_(None))
        .values(answer=dict(answer), answered_at=now)
    )
    return bool(changed.rowcount)


async def release_call(tx: AsyncConnection, principal: Principal, session: str, event_id: str) -> bool:
    """A person allows a worker's call: from now on its result is awaited. False if that was answered already."""
    changed = await tx.execute(
        sa.update(session_calls)
        .where(owned(principal, session_calls), session_calls.c.session_id == session)
        .where(session_calls.c.event_id == event_id, session_calls.c.kind == "sandbox_ask")
        .where(session_calls.c.answered_at.is_(None))
        .values(kind="sandbox")
    )
    return bool(changed.rowcount)


async def note_given(tx: AsyncConnection, principal: Principal, session: str, call: CallRow) -> None:
    """The process is about to be told that this call is allowed: from now on it may have run."""
    await tx.execute(
        sa.update(session_calls)
        .where(owned(principal, session_calls), session_calls.c.session_id == session)
        .where(session_calls.c.event_id == call.event_id)
        .values(answer={**(call.answer or {}), "given": True})
    )


async def set_output(
    tx: AsyncConnection, principal: Principal, session: str, call: CallRow, *, output: Mapping[str, Any], now: datetime
) -> None:
    """The server ran this call: it is not run again, whatever happens."""
    await tx.execute(
        sa.update(session_calls)
        .where(owned(principal, session_calls), session_calls.c.session_id == session)
        .where(session_calls.c.event_id == call.event_id)
        .values(answer={**(call.answer or {}), "output": dict(output)}, answered_at=call.answered_at or now)
    )


async def cancel_calls(tx: AsyncConnection, principal: Principal, session: str, now: datetime) -> list[dict[str, Any]]:
    """Nobody will answer what is open. The events that say so: without them a worker would run its calls later on."""
    left = await calls_of(tx, principal, session, open_only=True)
    await tx.execute(
        sa.update(session_calls)
        .where(owned(principal, session_calls), session_calls.c.session_id == session)
        .where(session_calls.c.answered_at.is_(None))
        .values(answer={"cancelled": True}, answered_at=now)
    )
    return [cancelled_event(call, CANCELLED) for call in left if call.kind in SANDBOX_KINDS]


def cancelled_event(call: CallRow, output: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's call that was answered in its place, in the form by which workers know that it is."""
    return {"type": "user.tool_result", "tool_use_id": call.event_id, **output}


# Transcript ----------------------------------------------------------------------------------------------------------


async def save_messages(
    tx: AsyncConnection, principal: Principal, session: str, messages: Mapping[int, Message], *, model: str = ""
) -> None:
    """Write (or write again, as they grow) messages of the conversation as the model knows it, by their positions.

    `model` is what the assistant's are from.
    """
    await tx.run_sync(save_messages_now, message_rows(principal, session, messages, model=model))


def message_rows(
    principal: Principal, session: str, messages: Mapping[int, Message], *, model: str = ""
) -> list[dict[str, Any]]:
    """Messages as they are stored: how they grow afterwards does not matter."""
    return [
        {
            "session_id": session,
            "position": position,
            "org_id": principal.org,
            "role": message.role,
            "model": model if message.role == "assistant" else "",
            "body": msgspec.json.encode(message.content),
        }
        for position, message in sorted(messages.items())
    ]


def save_messages_now(tx: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """`save_messages` as a plain function, for `Database.write`."""
    if rows:
        tx.execute(_save_messages(tx.dialect.name), rows)


@functools.cache
def _save_messages(dialect: str) -> Any:
    """Made once: what an upsert may refer to (`excluded`) is a copy of the whole table."""
    changes = {name: operator.attrgetter(name) for name in ("role", "model", "body")}
    return upsert(dialect, session_messages, ("session_id", "position"), changes)


async def load_messages(tx: AsyncConnection, principal: Principal, session: str) -> list[Message]:
    """The conversation, in order."""
    table = session_messages
    query = sa.select(table.c.role, table.c.body).where(owned(principal, table), table.c.session_id == session)
    rows = (await tx.execute(query.order_by(table.c.position))).all()
    return [Message(row.role, msgspec.json.decode(row.body)) for row in rows]


async def last_message(tx: AsyncConnection, principal: Principal, session: str) -> tuple[int, bool]:
    """How many messages the conversation has, and whether the last one is the model's."""
    table = session_messages
    query = sa.select(table.c.position, table.c.role).where(owned(principal, table), table.c.session_id == session)
    row = (await tx.execute(query.order_by(table.c.position.desc()).limit(1))).first()
    return (0, False) if row is None else (row.position + 1, row.role == "assistant")


async def cut_messages(tx: AsyncConnection, principal: Principal, session: str, position: int) -> None:
    """Forget the messages from this position on."""
    await tx.run_sync(cut_messages_now, principal, session, position)


def cut_messages_now(tx: sa.Connection, principal: Principal, session: str, position: int) -> None:
    """`cut_messages` as a plain function, for `Database.write`."""
    table = session_messages
    tx.execute(
        sa.delete(table).where(owned(principal, table), table.c.session_id == session, table.c.position >= position)
    )
