"""Self-hosted environments: the keys of their workers and the queue of sessions that need one."""

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


def _parent(name: str, table: str) -> sa.Column[str]:
    return sa.Column(name, sa.String(ID_LENGTH), sa.ForeignKey(f"{table}.id", ondelete="CASCADE"), nullable=False)


environment_keys = sa.Table(
    "environment_keys",
    metadata,
    id_column(primary_key=True),
    org_column(),
    _parent("environment_id", "environments"),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("digest", sa.LargeBinary(32), nullable=False),  # HMAC-SHA256 of the whole key under the server's pepper
    sa.Column("hint", sa.String(32), nullable=False),
    sa.Column("created_by_kind", sa.String(16), nullable=True),
    sa.Column("created_by_id", sa.String(ID_LENGTH), nullable=True),
    time_column("created_at"),
    time_column("expires_at", nullable=True),
    time_column("revoked_at", nullable=True),
    sa.Index("ix_environment_keys_org_id_created_at_id", "org_id", "created_at", "id"),
    sa.Index("ix_environment_keys_environment_id", "environment_id"),
)

environment_work = sa.Table(
    "environment_work",
    metadata,
    id_column(primary_key=True),
    org_column(),
    _parent("environment_id", "environments"),
    _parent("session_id", "sessions"),
    sa.Column("state", sa.String(16), nullable=False),
    json_column("metadata", nullable=False),
    time_column("created_at"),
    time_column("queued_at"),  # since when it waits: its creation, or the loss of its last worker
    time_column("polled_at", nullable=True),  # handed out and not acknowledged yet
    time_column("acknowledged_at", nullable=True),
    time_column("started_at", nullable=True),
    sa.Column("last_heartbeat", sa.String(40), nullable=True),  # the text that the worker has to say again
    sa.Column("ttl_seconds", sa.Integer, nullable=False),
    time_column("lease_expires_at", nullable=True),
    time_column("stop_requested_at", nullable=True),
    time_column("stopped_at", nullable=True),
    # Each poll hands out a token with the next generation. Those up to `floor` belong to workers that lost the item;
    # `holder` is the one whose worker beat first.
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("floor", sa.Integer, nullable=False),
    sa.Column("holder", sa.Integer, nullable=True),
    sa.Column("attempts", sa.Integer, nullable=False),  # items before it for the same session that achieved nothing
    version_column(),
    sa.Index("ix_environment_work_environment_id_state_queued_at", "environment_id", "state", "queued_at"),
    sa.Index("ix_environment_work_org_id_environment_id_created_at_id", "org_id", "environment_id", "created_at", "id"),
    sa.Index("ix_environment_work_session_id_state", "session_id", "state"),
)
