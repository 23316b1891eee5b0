"""Which replica holds a session."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Forward only: what a migration drops cannot be brought back by another; restore a backup instead."""
    op.create_table(
        "replicas",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("address", sa.String(length=512), nullable=True),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_replicas")),
    )
    json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
    op.add_column("sessions", sa.Column("holder", sa.String(length=128), nullable=True))
    op.add_column("sessions", sa.Column("fence", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("sessions", sa.Column("turn", json, nullable=True))
    op.add_column("sessions", sa.Column("asker", json, nullable=True))
    _partial_index("ix_sessions_running", "sessions", "id", "status = 'running'")
    _partial_index("ix_sessions_holder", "sessions", "holder", "holder IS NOT NULL")
    _partial_index("ix_session_events_queued", "session_events", "session_id", "processed_at IS NULL")


def _partial_index(name: str, table: str, column: str, where: str) -> None:
    op.create_index(name, table, [column], sqlite_where=sa.text(where), postgresql_where=sa.text(where))
