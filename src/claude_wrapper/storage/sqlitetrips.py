"""SQLite in fewer trips to its thread.

A connection of aiosqlite lives in a thread of its own, and SQLAlchemy's adapter goes there four times for each statement:
for a cursor, to execute, to fetch, to close. A trip (two wake-ups and the interpreter lock) costs more than a small
statement itself. Here a statement is one trip, and a connection that is in no transaction makes none to leave it.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite.aiosqlite import AsyncAdapt_aiosqlite_connection, AsyncAdapt_aiosqlite_cursor
from sqlalchemy.util.concurrency import await_


class _Cursor(AsyncAdapt_aiosqlite_cursor):
    """A statement's whole result, fetched where the statement ran."""

    __slots__ = ("_found", "_lastrowid", "_rowcount", "_size")

    def __init__(self, adapt_connection: AsyncAdapt_aiosqlite_connection) -> None:
        self._adapt_connection = adapt_connection
        self._connection = adapt_connection._connection  # noqa: SLF001 (a subclass of SQLAlchemy's own)
        self._rows = deque()
        self._found: Sequence[Any] | None = None
        self._rowcount, self._lastrowid, self._size = -1, 0, 1

    @property
    def description(self) -> Any:
        return self._found

    @property
    def rowcount(self) -> int:
        return self._rowcount

    @property
    def lastrowid(self) -> int:
        return self._lastrowid

    @property
    def arraysize(self) -> int:
        return self._size

    @arraysize.setter
    def arraysize(self, value: int) -> None:
        self._size = value

    def execute(self, operation: Any, parameters: Any = None) -> None:
        self._trip(lambda cursor: cursor.execute(operation, () if parameters is None else parameters))

    def executemany(self, operation: Any, seq_of_parameters: Any) -> None:
        self._trip(lambda cursor: cursor.executemany(operation, seq_of_parameters))

    def _trip(self, run: Callable[[sqlite3.Cursor], object]) -> None:
        try:
            await_(self._go(run))
        except Exception as error:  # noqa: BLE001 (always raises; the adapter knows what the driver means)
            self._adapt_connection._handle_exception(error)  # noqa: SLF001

    async def _go(self, run: Callable[[sqlite3.Cursor], object]) -> None:
        driver: Any = self._connection

        def work() -> tuple[Any, list[Any], int, int]:
            cursor = driver._conn.cursor()  # noqa: SLF001 (the connection of sqlite3, in its own thread)
            try:
                run(cursor)
                rows = cursor.fetchall() if cursor.description else []
                return cursor.description, rows, cursor.rowcount, cursor.lastrowid
            finally:
                cursor.close()

        async with self._adapt_connection._execute_mutex:  # noqa: SLF001
            found, rows, self._rowcount, self._lastrowid = await driver._execute(work)  # noqa: SLF001
        self._found, self._rows = found, deque(rows)

    async def _async_soft_close(self) -> None:
        return

    def close(self) -> None:
        self._rows.clear()


class _Connection(AsyncAdapt_aiosqlite_connection):
    __slots__ = ()

    _cursor_cls = _Cursor  # type: ignore[assignment]

    def rollback(self) -> None:
        driver: Any = self._connection
        if driver._connection is not None and driver.in_transaction:  # noqa: SLF001
            super().rollback()


def save_trips(engine: sa.Engine) -> None:
    """Let the connections of this engine (of aiosqlite) be such ones."""

    @sa.event.listens_for(engine, "do_connect")
    def _connect(dialect: Any, _record: Any, args: Any, kwargs: Any) -> _Connection:
        made = dialect.connect(*args, **kwargs)
        return _Connection(made.dbapi, made._connection)  # noqa: SLF001
