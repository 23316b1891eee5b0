"""Remote MCP servers that an organisation's agents and sessions have named, and how they were found last."""

from __future__ import annotations

import sqlalchemy as sa

from claude_wrapper.storage.schema import ID_LENGTH, id_column, json_column, metadata, org_column, time_column

mcp_servers = sa.Table(
    "mcp_servers",
    metadata,
    id_column(primary_key=True),  # a hash of organisation, workspace and URL
    org_column(),
    sa.Column("workspace_id", sa.String(ID_LENGTH), nullable=True),
    sa.Column("name", sa.String(255), nullable=False),  # as it was last called
    sa.Column("url", sa.String(2048), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),  # unknown | connected | needs_auth | failed
    sa.Column("problem", sa.String(512), nullable=True),
    sa.Column("protocol_version", sa.String(32), nullable=True),
    json_column("server_info"),
    json_column("tools"),  # names
    json_column("tools_left_out"),  # reason: how many
    time_column("created_at"),
    time_column("checked_at", nullable=True),
    sa.Index("ix_mcp_servers_org_id_created_at_id", "org_id", "created_at", "id"),
)
