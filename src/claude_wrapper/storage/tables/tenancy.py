"""Organisations, workspaces, people, API keys, invites, the audit log and idempotency keys."""

from __future__ import annotations

import sqlalchemy as sa

from claude_wrapper.storage.schema import (
    id_column,
    json_column,
    metadata,
    org_column,
    time_column,
    version_column,
)

organizations = sa.Table(
    "organizations",
    metadata,
    id_column(primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
    # Staff organisations may fall back on the operator's own upstream credential.
    sa.Column("is_staff", sa.Boolean, nullable=False, server_default=sa.false()),
    json_column("settings"),
    time_column("created_at"),
    time_column("deleted_at", nullable=True),
    version_column(),
    sa.Index("ix_organizations_created_at_id", "created_at", "id"),
)

workspaces = sa.Table(
    "workspaces",
    metadata,
    id_column(primary_key=True),
    org_column(),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("display_color", sa.String(16), nullable=False, server_default="#6C5BB9"),
    json_column("tags"),
    sa.Column("is_default", sa.Boolean, nullable=False, server_default=sa.false()),
    time_column("created_at"),
    time_column("archived_at", nullable=True),
    version_column(),
    sa.Index("ix_workspaces_org_id_created_at_id", "org_id", "created_at", "id"),
)

users = sa.Table(
    "users",
    metadata,
    id_column(primary_key=True),
    sa.Column("email", sa.String(320), nullable=False, unique=True),  # lower-cased; a person is one row in all orgs
    sa.Column("name", sa.String(200), nullable=False, server_default=""),
    sa.Column("is_operator", sa.Boolean, nullable=False, server_default=sa.false()),
    time_column("created_at"),
    time_column("disabled_at", nullable=True),
    version_column(),
)

org_members = sa.Table(
    "org_members",
    metadata,
    sa.Column("org_id", sa.String(128), sa.ForeignKey("organizations.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("user_id", sa.String(128), sa.ForeignKey("users.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("role", sa.String(32), nullable=False),
    time_column("added_at"),
    version_column(),
    sa.Index("ix_org_members_user_id", "user_id"),
    sa.Index("ix_org_members_org_id_added_at_user_id", "org_id", "added_at", "user_id"),
)

workspace_members = sa.Table(
    "workspace_members",
    metadata,
    org_column(),
    sa.Column("workspace_id", sa.String(128), sa.ForeignKey("workspaces.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("user_id", sa.String(128), sa.ForeignKey("users.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("role", sa.String(32), nullable=False),
    time_column("added_at"),
    version_column(),
    sa.Index("ix_workspace_members_org_id_user_id", "org_id", "user_id"),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    id_column(primary_key=True),
    org_column(),
    sa.Column("workspace_id", sa.String(128), sa.ForeignKey("workspaces.id", ondelete="CASCADE"), nullable=True),
    sa.Column("user_id", sa.String(128), sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("digest", sa.LargeBinary(32), nullable=False),  # HMAC-SHA256 of the whole key under the server's pepper
    sa.Column("hint", sa.String(32), nullable=False),
    sa.Column("role", sa.String(32), nullable=False),
    json_column("scopes"),  # null: all scopes of the role
    json_column("allowed_models"),  # null: all models
    json_column("limits"),
    sa.Column("status", sa.String(16), nullable=False, server_default="active"),
    sa.Column("is_operator", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("created_by_kind", sa.String(16), nullable=True),
    sa.Column("created_by_id", sa.String(128), nullable=True),
    sa.Column("replaces", sa.String(128), nullable=True),
    time_column("created_at"),
    time_column("expires_at", nullable=True),
    time_column("revoked_at", nullable=True),
    time_column("last_used_at", nullable=True),
    version_column(),
    sa.Index("ix_api_keys_org_id_created_at_id", "org_id", "created_at", "id"),
    sa.Index("ix_api_keys_workspace_id", "workspace_id"),
    sa.Index("ix_api_keys_user_id", "user_id"),
)

invites = sa.Table(
    "invites",
    metadata,
    id_column(primary_key=True),
    org_column(),
    sa.Column("email", sa.String(320), nullable=False),
    sa.Column("role", sa.String(32), nullable=False),
    sa.Column("digest", sa.LargeBinary(32), nullable=False),
    sa.Column("invited_by", sa.String(128), nullable=True),
    time_column("created_at"),
    time_column("expires_at"),
    time_column("accepted_at", nullable=True),
    time_column("deleted_at", nullable=True),
    sa.Index("ix_invites_org_id_created_at_id", "org_id", "created_at", "id"),
)

audit_log = sa.Table(
    "audit_log",
    metadata,
    id_column(primary_key=True),
    # No foreign key: what was done to an organisation outlives it.
    sa.Column("org_id", sa.String(128), nullable=False),
    time_column("created_at"),
    sa.Column("actor_kind", sa.String(16), nullable=False),
    sa.Column("actor_id", sa.String(128), nullable=True),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("target_kind", sa.String(32), nullable=False),
    sa.Column("target_id", sa.String(256), nullable=False),
    json_column("before"),
    json_column("after"),
    sa.Column("address", sa.String(64), nullable=True),
    sa.Column("user_agent", sa.String(256), nullable=True),
    sa.Column("request_id", sa.String(128), nullable=True),
    sa.Index("ix_audit_log_org_id_created_at_id", "org_id", "created_at", "id"),
    sa.Index("ix_audit_log_org_id_target", "org_id", "target_kind", "target_id"),
)

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("org_id", sa.String(128), sa.ForeignKey("organizations.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("actor_id", sa.String(128), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),  # of method, path and body
    sa.Column("response", sa.LargeBinary, nullable=True),  # null while the first request is in flight
    sa.Column("status", sa.Integer, nullable=True),
    time_column("created_at"),
    time_column("expires_at", index=True),
)
