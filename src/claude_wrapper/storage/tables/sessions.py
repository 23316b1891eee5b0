"""Sessions: their rows, the event log, pending calls, the transcript that restores them, resources and threads.

Events and transcript bodies are bytes, not JSON columns: they are written once, never searched inside, sent on as they
are, and may hold what a JSON column of Postgres refuses (a NUL in a string).
"""

from __future__ import annotations

import sqlalchemy as sa

from claude_wrapper.storage.schema import (
    ID_LENGTH,
    id_column,
    json_column,
    metadata,
    org_column,
    time_column,
    version_column,
)


def _session_key(*, primary_key: bool) -> sa.Column[str]:
    return sa.Column(
        "session_id",
        sa.String(ID_LENGTH),
        sa.ForeignKey("sessions.id", ondelete="CASCADE"),
        primary_key=primary_key,
        nullable=False,
    )


_RUNNING = sa.text("status = 'running'")
_HELD = sa.text("holder IS NOT NULL")
_QUEUED = sa.text("processed_at IS NULL")

sessions = sa.Table(
    "sessions",
    metadata,
    id_column(primary_key=True),
    org_column(),
    sa.Column("workspace_id", sa.String(ID_LENGTH), nullable=True),
    sa.Column("actor_id", sa.String(ID_LENGTH), nullable=False),  # the key or user that made it
    sa.Column("key_id", sa.String(ID_LENGTH), nullable=True),
    sa.Column("user_id", sa.String(ID_LENGTH), nullable=True),
    sa.Column("origin", sa.String(16), nullable=False),  # sessions | messages: through which door it was made
    sa.Column("name", sa.String(ID_LENGTH), nullable=True),  # the `session_id` that its messages caller gave it
    sa.Column("status", sa.String(16), nullable=False),
    json_column("stop_reason"),
    sa.Column("title", sa.String(512), nullable=True),
    sa.Column("agent_id", sa.String(ID_LENGTH), nullable=True),
    sa.Column("agent_version", sa.Integer, nullable=True),
    json_column("agent", nullable=False),  # the snapshot, as the wire shows it
    sa.Column("environment_id", sa.String(ID_LENGTH), nullable=True),
    json_column("environment"),
    json_column("vault_ids", nullable=False),
    json_column("metadata", nullable=False),
    json_column("budget"),
    json_column("outcomes", nullable=False),
    json_column("usage", nullable=False),
    sa.Column("thread_id", sa.String(ID_LENGTH), nullable=False),  # of the primary thread
    sa.Column("last_seq", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.Column("active_ms", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    time_column("created_at"),
    time_column("updated_at"),
    time_column("archived_at", nullable=True),
    version_column(),
    sa.Column("holder", sa.String(ID_LENGTH), nullable=True),  # the replica that alone may write for its agent
    sa.Column("fence", sa.BigInteger, nullable=False, server_default=sa.text("0")),  # grows with each change of holder
    json_column("turn"),  # the turn that runs: {start: position in the transcript, durable: bool}; null between turns
    json_column("asker"),  # whose turns these are, as it was when they asked (sessions.askers)
    sa.UniqueConstraint("org_id", "actor_id", "name"),
    sa.Index("ix_sessions_org_id_created_at_id", "org_id", "created_at", "id"),
    sa.Index("ix_sessions_org_id_agent_id", "org_id", "agent_id"),
    # Small: what runs, what is held, what waits. Each replica looks for sessions whose holder has gone.
    sa.Index("ix_sessions_running", "id", sqlite_where=_RUNNING, postgresql_where=_RUNNING),
    sa.Index("ix_sessions_holder", "holder", sqlite_where=_HELD, postgresql_where=_HELD),
)

session_events = sa.Table(
    "session_events",
    metadata,
    _session_key(primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    org_column(),
    sa.Column("id", sa.String(ID_LENGTH), nullable=False),
    sa.Column("type", sa.String(64), nullable=False),
    sa.Column("thread_id", sa.String(ID_LENGTH), nullable=True),  # null: the session's own stream
    sa.Column("body", sa.LargeBinary, nullable=False),  # the event's JSON without `processed_at`
    time_column("written_at"),
    time_column("processed_at", nullable=True),  # null: a client's event that still waits
    sa.UniqueConstraint("session_id", "id"),
    sa.Index("ix_session_events_session_id_type_seq", "session_id", "type", "seq"),
    sa.Index("ix_session_events_queued", "session_id", sqlite_where=_QUEUED, postgresql_where=_QUEUED),
)

session_calls = sa.Table(
    "session_calls",
    metadata,
    _session_key(primary_key=True),
    sa.Column("event_id", sa.String(ID_LENGTH), primary_key=True),
    org_column(),
    sa.Column("tool_use_id", sa.String(ID_LENGTH), nullable=False),  # the model's id
    sa.Column("kind", sa.String(16), nullable=False),  # custom | approval | tool | sandbox | sandbox_ask
    sa.Column("thread_id", sa.String(ID_LENGTH), nullable=True),
    json_column("answer"),  # what the client (or the tool) said; null while it is awaited
    time_column("answered_at", nullable=True),
    sa.Index("ix_session_calls_session_id_answered_at", "session_id", "answered_at"),
)

session_messages = sa.Table(
    "session_messages",
    metadata,
    _session_key(primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    org_column(),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("model", sa.String(200), nullable=False, server_default=""),
    sa.Column("body", sa.LargeBinary, nullable=False),  # the content as the model API knows it
)

session_resources = sa.Table(
    "session_resources",
    metadata,
    id_column(primary_key=True),
    _session_key(primary_key=False),
    org_column(),
    sa.Column("type", sa.String(32), nullable=False),
    json_column("body", nullable=False),  # as the wire shows it, without secrets
    time_column("created_at"),
    time_column("updated_at"),
    sa.Index("ix_session_resources_session_id_created_at_id", "session_id", "created_at", "id"),
)

session_threads = sa.Table(
    "session_threads",
    metadata,
    id_column(primary_key=True),
    _session_key(primary_key=False),
    org_column(),
    sa.Column("parent_id", sa.String(ID_LENGTH), nullable=True),
    sa.Column("agent_name", sa.String(256), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    json_column("usage", nullable=False),
    time_column("created_at"),
    time_column("updated_at"),
    time_column("archived_at", nullable=True),
    sa.Index("ix_session_threads_session_id_created_at_id", "session_id", "created_at", "id"),
)
