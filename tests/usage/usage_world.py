"""Calls, a ledger that is wired, and a database that can be away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage import Database
from claude_wrapper.wire.usage import Usage

T = TypeVar("T")

NOON = datetime(2026, 11, 20, 12, 30, tzinfo=UTC)


@dataclass(frozen=True)
class Call:
    """What the broker reports."""

    id: str
    turn: str | None = "turn_1"
    session: str | None = "sesn_1"
    org: str | None = "org_1"
    workspace: str | None = "wrkspc_1"
    key_id: str | None = "apikey_1"
    user: str | None = "user_1"
    credential_id: str | None = "cred_1"
    path: str = "/v1/messages"
    model: str | None = "claude-sonnet-5-5"
    status: int = 200
    error_type: str | None = None
    upstream_request_id: str | None = "req_up"
    usage: Usage = field(default_factory=lambda: Usage(input_tokens=1000, output_tokens=100))
    started_at: datetime = NOON
    first_byte_seconds: float | None = 0.4
    total_seconds: float = 2.0
    attempts: int = 1
    stream_complete: bool = True
    main: bool = True
    cache_hit: bool = False
    saved: Usage = field(default_factory=Usage)


class Switched:
    """A database that refuses transactions while `away`, or after it has committed (`forgetful`)."""

    def __init__(self, inner: Database) -> None:
        self._inner = inner
        self.away = False
        self.forgetful = False
        self.transactions = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        self.transactions += 1
        if self.away:
            raise StorageUnavailable("the database is away")
        async with self._inner.transaction() as tx:
            yield tx
        if self.forgetful:
            raise StorageUnavailable("the link broke during COMMIT", details={"outcome": "unknown"})

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        self.transactions += 1
        if self.away:
            raise StorageUnavailable("the database is away")
        result = await self._inner.write(work)
        if self.forgetful:
            raise StorageUnavailable("the link broke during COMMIT", details={"outcome": "unknown"})
        return result
