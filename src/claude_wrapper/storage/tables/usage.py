"""The ledger of upstream calls, its hourly sums, prices that organisations agreed on, and what was exported.

Times of the ledger are whole milliseconds since 1970 in UTC: reports group a million rows by dividing them, which is
the same expression on SQLite and Postgres. No foreign keys: a bill outlives what it was for. Money is micro-dollars.
"""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa

from claude_wrapper.storage.schema import ID_LENGTH, id_column, json_column, metadata, time_column

COUNTERS: Final = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_5m_tokens",
    "cache_write_1h_tokens",
    "thinking_tokens",
    "web_search_requests",
    "web_fetch_requests",
    "cost_micros",
)
"""What is summed, under the same names in both tables."""


def _counters() -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger, nullable=False, server_default=sa.text("0")) for name in COUNTERS]


def _who(name: str, **kw: Any) -> sa.Column[str]:
    """Empty text means none: a part of a primary key cannot be null."""
    return sa.Column(name, sa.String(ID_LENGTH), nullable=False, server_default="", **kw)


usage_calls = sa.Table(
    "usage_calls",
    metadata,
    id_column(primary_key=True),
    _who("org_id"),
    _who("workspace_id"),
    _who("key_id"),
    _who("user_id"),
    _who("session_id"),
    _who("turn_id"),
    _who("credential_id"),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("path", sa.String(200), nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("error_type", sa.String(100), nullable=True),
    sa.Column("upstream_request_id", sa.String(200), nullable=True),
    sa.Column("started_ms", sa.BigInteger, nullable=False),
    sa.Column("first_byte_ms", sa.Integer, nullable=True),
    sa.Column("total_ms", sa.Integer, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("complete", sa.Boolean, nullable=False),
    sa.Column("main", sa.Boolean, nullable=False),
    sa.Column("cache_hit", sa.Boolean, nullable=False),
    *_counters(),
    # What a call that was answered from the cache would have used and cost; its own counters are 0.
    sa.Column("saved_tokens", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("saved_micros", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("price_version", sa.String(64), nullable=False),
    sa.Index("ix_usage_calls_org_id_started_ms", "org_id", "started_ms"),
    sa.Index("ix_usage_calls_session_id", "session_id", "started_ms"),
    sa.Index("ix_usage_calls_started_ms", "started_ms"),
)

usage_hours = sa.Table(
    "usage_hours",
    metadata,
    _who("org_id", primary_key=True),
    sa.Column("hour", sa.Integer, primary_key=True, autoincrement=False),  # started_ms // 3 600 000
    _who("workspace_id", primary_key=True),
    _who("key_id", primary_key=True),
    _who("user_id", primary_key=True),
    sa.Column("model", sa.String(200), primary_key=True),
    sa.Column("calls", sa.BigInteger, nullable=False),
    sa.Column("errors", sa.BigInteger, nullable=False),
    sa.Column("total_ms", sa.BigInteger, nullable=False),
    *_counters(),
    sa.Index("ix_usage_hours_hour", "hour"),
    sqlite_with_rowid=False,
)

usage_prices = sa.Table(
    "usage_prices",
    metadata,
    sa.Column("org_id", sa.String(ID_LENGTH), primary_key=True),
    sa.Column("model", sa.String(200), primary_key=True),  # a prefix, as in the packaged price file
    time_column("effective_from", primary_key=True),
    json_column("price", nullable=False),
    time_column("created_at"),
)

usage_exports = sa.Table(
    "usage_exports",
    metadata,
    sa.Column("sink", sa.String(100), primary_key=True),
    sa.Column("org_id", sa.String(ID_LENGTH), primary_key=True),
    sa.Column("hour", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("calls", sa.BigInteger, nullable=False),  # rows of that hour when it was written: more now, write again
    time_column("exported_at"),
)
