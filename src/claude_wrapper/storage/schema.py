"""The one metadata that all tables are declared on, and the few column shapes that they share.

Tables live in `storage/tables/*.py` as plain data; importing `claude_wrapper.storage.tables` declares all of them.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from claude_wrapper.storage.dialects import UtcDateTime, json_type

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

ID_LENGTH = 128


def id_column(name: str = "id", *args: Any, **kw: Any) -> sa.Column[str]:
    """A column that holds one of our identifiers."""
    return sa.Column(name, sa.String(ID_LENGTH), *args, **kw)


def time_column(name: str, *, nullable: bool = False, **kw: Any) -> sa.Column[Any]:
    """A column that holds an aware time in UTC."""
    return sa.Column(name, UtcDateTime(), nullable=nullable, **kw)


def json_column(name: str, *, nullable: bool = True, **kw: Any) -> sa.Column[Any]:
    """A column that holds a JSON value."""
    return sa.Column(name, json_type(), nullable=nullable, **kw)


def version_column() -> sa.Column[int]:
    """Counts the changes of a row: an update names the version that it read, and a second editor meets a Conflict."""
    return sa.Column("version", sa.Integer, nullable=False, server_default=sa.text("1"))


def org_column(*, index: bool = False) -> sa.Column[str]:
    """The tenant that owns the row; every query on the table names it."""
    return sa.Column(
        "org_id",
        sa.String(ID_LENGTH),
        sa.ForeignKey("organizations.id", ondelete="CASCADE"),
        nullable=False,
        index=index,
    )
