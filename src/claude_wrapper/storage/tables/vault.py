"""The vault: wrapped data keys of organisations, upstream credentials, and other sealed secrets.

No column holds a secret in the clear: `sealed` and `wrapped` are ciphertext (`vault.envelope`), `hint` is the last four
characters, `fingerprint` is keyed, so that it can neither be guessed nor compared between organisations.
"""

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

vault_master_checks = sa.Table(
    "vault_master_checks",
    metadata,
    # A known text, wrapped by each master key that was ever primary: tells a wrong key at start, before any harm.
    sa.Column("master_key_id", sa.String(ID_LENGTH), primary_key=True),
    sa.Column("wrapped", sa.LargeBinary, nullable=False),
    time_column("created_at"),
)

vault_org_keys = sa.Table(
    "vault_org_keys",
    metadata,
    sa.Column("org_id", sa.String(ID_LENGTH), sa.ForeignKey("organizations.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("key_version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("master_key_id", sa.String(ID_LENGTH), nullable=False, index=True),
    sa.Column("wrapped", sa.LargeBinary, nullable=False),
    time_column("created_at"),
)

vault_credentials = sa.Table(
    "vault_credentials",
    metadata,
    id_column(primary_key=True),
    org_column(),
    sa.Column("workspace_id", sa.String(ID_LENGTH), sa.ForeignKey("workspaces.id", ondelete="CASCADE"), nullable=True),
    sa.Column("user_id", sa.String(ID_LENGTH), sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("base_url", sa.String(2048), nullable=True),
    json_column("config"),  # what is not secret: region, project, client id
    sa.Column("sealed", sa.LargeBinary, nullable=False),
    sa.Column("hint", sa.String(8), nullable=False),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("rank", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.Column("named_only", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("status", sa.String(16), nullable=False, server_default="active"),
    sa.Column("problem", sa.String(200), nullable=True),
    time_column("expires_at", nullable=True),
    time_column("created_at"),
    time_column("updated_at"),
    version_column(),
    sa.Index("ix_vault_credentials_org_id_created_at_id", "org_id", "created_at", "id"),
    sa.Index("ix_vault_credentials_workspace_id", "workspace_id"),
    sa.Index("ix_vault_credentials_user_id", "user_id"),
)

vault_secrets = sa.Table(
    "vault_secrets",
    metadata,
    id_column(primary_key=True),
    org_column(),
    sa.Column("workspace_id", sa.String(ID_LENGTH), sa.ForeignKey("workspaces.id", ondelete="CASCADE"), nullable=True),
    sa.Column("kind", sa.String(64), nullable=False),
    sa.Column("name", sa.String(300), nullable=False),
    sa.Column("sealed", sa.LargeBinary, nullable=False),
    time_column("created_at"),
    time_column("updated_at"),
    version_column(),
    sa.UniqueConstraint("org_id", "kind", "name"),
    sa.Index("ix_vault_secrets_workspace_id", "workspace_id"),
)
