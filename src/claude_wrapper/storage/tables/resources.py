"""What sessions are made of: agents, environments, files, vaults for tools, skills and memory stores.

Every row has a tenant and, where it was made by a key of a workspace, a workspace. Documents that are read and written
whole (an agent's definition, an environment's configuration) are one column; secrets are in `vault_secrets`, bytes
of files and skills in the blob store.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from claude_wrapper.storage.schema import ID_LENGTH, id_column, json_column, metadata, org_column, time_column


def _workspace_column() -> sa.Column[Any]:
    return sa.Column(
        "workspace_id", sa.String(ID_LENGTH), sa.ForeignKey("workspaces.id", ondelete="CASCADE"), nullable=True
    )


def _parent(name: str, table: str) -> sa.Column[Any]:
    return sa.Column(name, sa.String(ID_LENGTH), sa.ForeignKey(f"{table}.id", ondelete="CASCADE"), nullable=False)


def _by_age(table: str, *before: str) -> sa.Index:
    """What a page is read by."""
    columns = ("org_id", *before, "created_at", "id")
    return sa.Index(f"ix_{table}_{'_'.join(columns)}", *columns)


def _of_workspace(table: str) -> sa.Index:
    return sa.Index(f"ix_{table}_workspace_id", "workspace_id")


agents = sa.Table(
    "agents",
    metadata,
    id_column(primary_key=True),
    org_column(),
    _workspace_column(),
    sa.Column("version", sa.Integer, nullable=False),  # the newest
    time_column("created_at"),
    time_column("updated_at"),
    time_column("archived_at", nullable=True),
    _by_age("agents"),
    _of_workspace("agents"),
)

agent_versions = sa.Table(
    "agent_versions",
    metadata,
    sa.Column("agent_id", sa.String(ID_LENGTH), sa.ForeignKey("agents.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    id_column(nullable=False, unique=True),  # only to be a place in a page
    org_column(index=True),
    sa.Column("definition", sa.Text, nullable=False),  # JSON as text: the order of a schema's properties is kept
    time_column("created_at"),
)

environments = sa.Table(
    "environments",
    metadata,
    id_column(primary_key=True),
    org_column(),
    _workspace_column(),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("description", sa.Text, nullable=True),
    json_column("config", nullable=False),
    json_column("metadata", nullable=False),
    time_column("created_at"),
    time_column("updated_at"),
    time_column("archived_at", nullable=True),
    _by_age("environments"),
    _of_workspace("environments"),
)

files = sa.Table(
    "files",
    metadata,
    id_column(primary_key=True),
    org_column(),
    _workspace_column(),
    sa.Column("filename", sa.String(500), nullable=False),
    sa.Column("mime_type", sa.String(255), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("downloadable", sa.Boolean, nullable=False),
    # The session that made the file; null for uploads. No foreign key: a file outlives its session.
    sa.Column("scope_id", sa.String(ID_LENGTH), nullable=True),
    time_column("created_at"),
    time_column("expires_at", nullable=True, index=True),
    _by_age("files"),
    sa.Index("ix_files_org_id_scope_id", "org_id", "scope_id"),
    _of_workspace("files"),
)

tool_vaults = sa.Table(
    "tool_vaults",
    metadata,
    id_column(primary_key=True),
    org_column(),
    _workspace_column(),
    sa.Column("display_name", sa.String(255), nullable=False),
    json_column("metadata", nullable=False),
    time_column("created_at"),
    time_column("updated_at"),
    time_column("archived_at", nullable=True),
    _by_age("tool_vaults"),
    _of_workspace("tool_vaults"),
)

tool_credentials = sa.Table(
    "tool_credentials",
    metadata,
    id_column(primary_key=True),
    org_column(),
    _workspace_column(),
    _parent("vault_id", "tool_vaults"),
    sa.Column("display_name", sa.String(255), nullable=True),
    sa.Column("kind", sa.String(32), nullable=False),
    # What it is found by: the MCP server's URL, or the name of the environment variable.
    sa.Column("target", sa.String(2048), nullable=False),
    json_column("auth", nullable=False),  # what may be shown; the secret is in vault_secrets under (kind, id)
    json_column("metadata", nullable=False),
    time_column("created_at"),
    time_column("updated_at"),
    time_column("archived_at", nullable=True),
    _by_age("tool_credentials", "vault_id"),
    sa.Index("ix_tool_credentials_vault_id", "vault_id"),
    _of_workspace("tool_credentials"),
)

skills = sa.Table(
    "skills",
    metadata,
    id_column(primary_key=True),
    org_column(),
    _workspace_column(),
    sa.Column("display_name", sa.String(255), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("latest_version_id", sa.String(ID_LENGTH), nullable=False),
    time_column("created_at"),
    time_column("updated_at"),
    _by_age("skills"),
    _of_workspace("skills"),
)

skill_versions = sa.Table(
    "skill_versions",
    metadata,
    id_column(primary_key=True),
    org_column(),
    _parent("skill_id", "skills"),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),  # of the archive
    sa.Column("sha256", sa.String(64), nullable=False),
    time_column("created_at"),
    _by_age("skill_versions", "skill_id"),
    sa.Index("ix_skill_versions_skill_id", "skill_id"),
)

memory_stores = sa.Table(
    "memory_stores",
    metadata,
    id_column(primary_key=True),
    org_column(),
    _workspace_column(),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    json_column("metadata", nullable=False),
    time_column("created_at"),
    time_column("updated_at"),
    time_column("archived_at", nullable=True),
    _by_age("memory_stores"),
    _of_workspace("memory_stores"),
)

memories = sa.Table(
    "memories",
    metadata,
    id_column(primary_key=True),
    org_column(index=True),
    _parent("store_id", "memory_stores"),
    sa.Column("path", sa.String(1024), nullable=False),
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("content_size_bytes", sa.Integer, nullable=False),
    sa.Column("content_sha256", sa.String(64), nullable=False),
    sa.Column("memory_version_id", sa.String(ID_LENGTH), nullable=False),
    time_column("created_at"),
    time_column("updated_at"),
    sa.UniqueConstraint("store_id", "path"),
)

memory_versions = sa.Table(
    "memory_versions",
    metadata,
    id_column(primary_key=True),
    org_column(),
    _parent("store_id", "memory_stores"),
    # No foreign key: a memory's history outlives it.
    sa.Column("memory_id", sa.String(ID_LENGTH), nullable=False, index=True),
    sa.Column("operation", sa.String(16), nullable=False),
    sa.Column("path", sa.String(1024), nullable=True),
    sa.Column("content", sa.Text, nullable=True),
    sa.Column("content_size_bytes", sa.Integer, nullable=True),
    sa.Column("content_sha256", sa.String(64), nullable=True),
    json_column("created_by"),
    sa.Column("actor_id", sa.String(ID_LENGTH), nullable=True),  # of `created_by`, to be searched
    time_column("created_at"),
    time_column("redacted_at", nullable=True),
    json_column("redacted_by"),
    _by_age("memory_versions", "store_id"),
    sa.Index("ix_memory_versions_store_id", "store_id"),
)
