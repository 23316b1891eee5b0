"""Limits, budgets and the alerts that budgets have raised."""

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

limits = sa.Table(
    "limits",
    metadata,
    sa.Column("org_id", sa.String(ID_LENGTH), sa.ForeignKey("organizations.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("scope", sa.String(16), primary_key=True),  # limits.values.Scope
    sa.Column("subject_id", sa.String(ID_LENGTH), primary_key=True),
    json_column("limits", nullable=False),
    time_column("updated_at"),
    version_column(),
)

budgets = sa.Table(
    "budgets",
    metadata,
    id_column(primary_key=True),
    org_column(),
    sa.Column("scope", sa.String(16), nullable=False),
    sa.Column("subject_id", sa.String(ID_LENGTH), nullable=False),
    sa.Column("period", sa.String(16), nullable=False),
    sa.Column("cap_micros", sa.BigInteger, nullable=False),
    sa.Column("action", sa.String(16), nullable=False),
    json_column("alert_percents", nullable=False),
    time_column("created_at"),
    time_column("updated_at"),
    version_column(),
    sa.UniqueConstraint("org_id", "scope", "subject_id", "period"),
)

budget_alerts = sa.Table(
    "budget_alerts",
    metadata,
    sa.Column("budget_id", sa.String(ID_LENGTH), sa.ForeignKey("budgets.id", ondelete="CASCADE"), primary_key=True),
    time_column("window_start", primary_key=True),
    sa.Column("percent", sa.Integer, primary_key=True),
    sa.Column("cap_micros", sa.BigInteger, primary_key=True),  # a raised cap may be reached again
    org_column(),
    sa.Column("spent_micros", sa.BigInteger, nullable=False),
    time_column("raised_at"),
    time_column("delivered_at", nullable=True),
)
