"""OAuth tokens that come with a request are used as they come: nothing leads from them to a stored credential."""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Forward only: what a migration drops cannot be brought back by another; restore a backup instead."""
    op.drop_table("vault_oauth_identities")
