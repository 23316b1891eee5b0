"""The one place where errors of SQLAlchemy and the drivers become facts of this project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from claude_wrapper.errors import Conflict, StorageUnavailable
from claude_wrapper.storage import dialects

NOT_APPLIED = "not_applied"
UNKNOWN = "unknown"


@contextmanager
def mapped_failures(outcome: str = NOT_APPLIED, *, connecting: bool = False) -> Iterator[None]:
    """Raise StorageUnavailable where the database is away, full or busy.

    `details["outcome"]` says what became of the transaction: `not_applied`, or `unknown` when the link broke while
    COMMIT was under way. Errors in statements (integrity, syntax) pass as SQLAlchemy raised them; while `connecting`
    every refusal counts as away.
    """
    try:
        yield
    except sa.exc.TimeoutError as error:
        raise StorageUnavailable(
            "no database connection became free in time; raise the pool size or lower the load",
            details={"outcome": outcome},
        ) from error
    except sa.exc.DBAPIError as error:
        if dialects.is_serialization_failure(error):
            raise StorageUnavailable(
                "the database gave this transaction up in favour of another; try again",
                details={"outcome": NOT_APPLIED},
            ) from error
        if connecting or dialects.is_unavailable(error):
            raise StorageUnavailable(_cause(error.orig or error), details={"outcome": outcome}) from error
        raise
    except OSError as error:
        # asyncpg raises the socket's own error. Inside a block only a broken link is the database's; any other
        # OSError (a file, a time limit) belongs to whoever wrote the block.
        if connecting or isinstance(error, ConnectionError):
            raise StorageUnavailable(_cause(error), details={"outcome": outcome}) from error
        raise


def _cause(error: BaseException) -> str:
    # Only the first line: drivers append the statement and its parameters.
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"the database cannot be used: {first[:200]}"


@contextmanager
def conflict_when_duplicate(message: str) -> Iterator[None]:
    """Raise Conflict(message) when a unique index refuses what the block writes. The transaction is spent then."""
    try:
        yield
    except sa.exc.IntegrityError as error:
        if dialects.is_unique_violation(error):
            raise Conflict(message) from error
        raise
