"""Which snapshot of a session is current."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Forward only: what a migration drops cannot be brought back by another; restore a backup instead."""
    op.create_table(
        "session_snapshots",
        sa.Column("org_id", sa.String(length=128), nullable=False),
        sa.Column("session_id", sa.String(length=128), nullable=False),
        sa.Column("manifest_id", sa.String(length=128), nullable=False),
        sa.Column("previous_manifest_id", sa.String(length=128), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("bytes_logical", sa.BigInteger(), nullable=False),
        sa.Column("bytes_stored", sa.BigInteger(), nullable=False),
        sa.Column("cli_uuid", sa.String(length=64), nullable=False),
        sa.Column("cli_version", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["org_id"], ["organizations.id"], name=op.f("fk_session_snapshots_org_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("org_id", "session_id", name=op.f("pk_session_snapshots")),
    )
