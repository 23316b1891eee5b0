"""Which snapshot of a session is current. The snapshots themselves lie in the blob store."""

from __future__ import annotations

import sqlalchemy as sa

from claude_wrapper.storage.schema import ID_LENGTH, id_column, metadata, time_column

session_snapshots = sa.Table(
    "session_snapshots",
    metadata,
    sa.Column(
        "org_id",
        sa.String(ID_LENGTH),
        sa.ForeignKey("organizations.id", ondelete="CASCADE"),
        primary_key=True,
        nullable=False,
    ),
    # No foreign key to `sessions`: conversations of the Messages API have files, but no row there until they are named.
    id_column("session_id", primary_key=True, nullable=False),
    id_column("manifest_id", nullable=False),
    id_column("previous_manifest_id", nullable=True),
    time_column("created_at"),
    sa.Column("bytes_logical", sa.BigInteger, nullable=False),
    sa.Column("bytes_stored", sa.BigInteger, nullable=False),
    sa.Column("cli_uuid", sa.String(64), nullable=False),
    sa.Column("cli_version", sa.String(64), nullable=False),
)
