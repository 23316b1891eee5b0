"""The server processes that share this database, each with the time until which it counts as alive."""

from __future__ import annotations

import sqlalchemy as sa

from claude_wrapper.storage.schema import id_column, metadata

replicas = sa.Table(
    "replicas",
    metadata,
    id_column(primary_key=True),
    sa.Column("address", sa.String(512), nullable=True),  # by which other replicas reach it; null: they cannot
    # Milliseconds since 1970 by the database's own clock: replicas with wrong clocks agree.
    sa.Column("expires_at", sa.BigInteger, nullable=False),
)
