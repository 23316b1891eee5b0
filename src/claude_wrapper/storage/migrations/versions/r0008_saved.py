"""What answers from the cache saved."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Forward only: what a migration drops cannot be brought back by another; restore a backup instead."""
    for name in ("saved_tokens", "saved_micros"):
        op.add_column("usage_calls", sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False))
