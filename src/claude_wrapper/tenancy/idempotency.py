"""Idempotency keys: a create that is sent twice happens once, and both senders get the first answer.

`begin` and `finish` run in the same transaction as the create, so a key is remembered exactly if the create was done. On
Postgres two at once meet at the primary key: the second waits for the first and then finds its answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict, InvalidRequest
from claude_wrapper.storage import dialects
from claude_wrapper.storage.tables.tenancy import idempotency_keys as table
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal, owned

KEPT_FOR = timedelta(hours=24)
MAX_KEY = 255


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """What the first request was answered."""

    status: int
    body: bytes


def fingerprint(method: str, path: str, body: bytes) -> str:
    """What makes two requests the same."""
    return hashlib.sha256(b"\x00".join((method.encode(), path.encode(), body))).hexdigest()


async def begin(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, key: str, request: str
) -> StoredAnswer | None:
    """None: go on, then `finish`. Otherwise the answer of the first request.

    Raises InvalidRequest if the key was used for another request, Conflict if the first one never finished.
    """
    if not 1 <= len(key) <= MAX_KEY or not key.isprintable():
        raise InvalidRequest(f"must have 1 to {MAX_KEY} printable characters", field="idempotency-key")
    now, mine = scribe.now(), (owned(principal, table), table.c.actor_id == (principal.actor_id or ""))
    await tx.execute(table.delete().where(owned(principal, table), table.c.expires_at <= now))
    insert = dialects.insert_ignore(tx.dialect.name, table, ("org_id", "actor_id", "key"))
    values = {"org_id": principal.org, "actor_id": principal.actor_id or "", "key": key, "fingerprint": request}
    done = await tx.execute(insert.values(**values, created_at=now, expires_at=now + KEPT_FOR))
    if done.rowcount == 1:
        return None
    row = (await tx.execute(sa.select(table).where(owned(principal, table), *mine, table.c.key == key))).one()
    if row.fingerprint != request:
        raise InvalidRequest("this key was used for a different request", field="idempotency-key")
    if row.status is None:
        raise Conflict("a request with this idempotency key is still running")
    return StoredAnswer(row.status, row.response)


async def finish(tx: AsyncConnection, principal: Principal, key: str, answer: StoredAnswer) -> None:
    """Remember the answer, in the transaction of the create."""
    mine = table.update().where(
        owned(principal, table), table.c.actor_id == (principal.actor_id or ""), table.c.key == key
    )
    await tx.execute(mine.values(status=answer.status, response=answer.body))
