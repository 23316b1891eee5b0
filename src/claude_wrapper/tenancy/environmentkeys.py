"""Keys of self-hosted environments: what their workers poll with. Minted, listed and revoked; never shown again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper import ids
from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.environments import environment_keys as table
from claude_wrapper.storage.tables.resources import environments
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.keyformat import ENVIRONMENT_PREFIX, Pepper, mint
from claude_wrapper.tenancy.principal import Principal, owned
from claude_wrapper.tenancy.values import clean_name

READ = "read:api_keys"
WRITE = "write:api_keys"


@dataclass(frozen=True, slots=True)
class EnvironmentKey:
    """A key without its secret."""

    id: str
    environment_id: str
    name: str
    hint: str
    created_by: Mapping[str, Any] | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    def status(self, now: datetime) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"


@dataclass(frozen=True, slots=True)
class NewEnvironmentKey:
    """A key with its secret, which is shown this once."""

    key: EnvironmentKey
    secret: str = field(repr=False)


async def create_environment_key(
    tx: AsyncConnection,
    principal: Principal,
    scribe: Scribe,
    pepper: Pepper,
    environment_id: str,
    *,
    name: str,
    expires_at: datetime | None = None,
) -> NewEnvironmentKey:
    """A new key. Needs `write:api_keys`; raises NotFound, and InvalidRequest for an environment that has no workers."""
    principal.require(WRITE)
    found = await _environment(tx, principal, environment_id)
    if found.config.get("type") != "self_hosted" or found.archived_at is not None:
        why = "archived" if found.archived_at is not None else f"of type {found.config.get('type')!r}"
        raise InvalidRequest(f"is {why}; only self_hosted environments have workers", field="environment_id")
    if expires_at is not None and expires_at <= scribe.now():
        raise InvalidRequest("must be in the future", field="expires_at")
    minted = mint(scribe.ids.new(ids.ENVIRONMENT_KEY), pepper, prefix=ENVIRONMENT_PREFIX)
    row = {
        "id": minted.id,
        "org_id": principal.org,
        "environment_id": environment_id,
        "name": clean_name(name),
        "digest": minted.digest,
        "hint": minted.hint,
        "created_by_kind": str(principal.actor_kind),
        "created_by_id": principal.actor_id,
        "created_at": scribe.now(),
        "expires_at": expires_at,
    }
    await tx.execute(sa.insert(table).values(**row))
    after = {"environment_id": environment_id, "name": row["name"], "expires_at": expires_at}
    await scribe.record(tx, principal, "environment_key.create", ("environment_key", minted.id), after=after)
    return NewEnvironmentKey(await get_environment_key(tx, principal, minted.id), minted.secret)


async def get_environment_key(tx: AsyncConnection, principal: Principal, key_id: str) -> EnvironmentKey:
    """One key. Needs `read:api_keys`; raises NotFound, also when its environment is another workspace's."""
    principal.require(READ)
    row = (await tx.execute(_visible(principal).where(table.c.id == key_id))).first()
    if row is None:
        raise NotFound(f"there is no environment key {key_id[:128]!r}")
    return _read(row)


async def list_environment_keys(
    tx: AsyncConnection, principal: Principal, request: PageRequest, *, environment_id: str | None = None
) -> Page[EnvironmentKey]:
    """Keys, newest first. Needs `read:api_keys`; raises NotFound for an environment that is not there."""
    principal.require(READ)
    statement = _visible(principal)
    if environment_id is not None:
        await _environment(tx, principal, environment_id)
        statement = statement.where(table.c.environment_id == environment_id)
    return await fetch_page(tx, statement, (table.c.created_at, table.c.id), request, _read)


async def revoke_environment_key(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, key_id: str
) -> EnvironmentKey:
    """Revoke a key for good, at once. Doing it twice is no error. Needs `write:api_keys`; raises NotFound.

    Sessions tokens that were handed out live on until their leases end: stop the work to end them.
    """
    principal.require(WRITE)
    before = await get_environment_key(tx, principal, key_id)
    if before.revoked_at is None:
        changed = table.update().where(owned(principal, table), table.c.id == key_id)
        await tx.execute(changed.values(revoked_at=scribe.now()))
        await scribe.record(tx, principal, "environment_key.revoke", ("environment_key", key_id))
    return await get_environment_key(tx, principal, key_id)


def _visible(principal: Principal) -> sa.Select[Any]:
    joined = table.join(environments, environments.c.id == table.c.environment_id)
    return sa.select(table).select_from(joined).where(owned(principal, table), owned(principal, environments))


async def _environment(tx: AsyncConnection, principal: Principal, environment_id: str) -> Any:
    statement = sa.select(environments.c.config, environments.c.archived_at).where(
        owned(principal, environments), environments.c.id == environment_id
    )
    row = (await tx.execute(statement)).first()
    if row is None:
        raise NotFound(
            f"there is no environment {environment_id[:128]!r}", details={"error_code": "environment_not_found"}
        )
    return row


def _read(row: Any) -> EnvironmentKey:
    by = None if row.created_by_id is None else {"id": row.created_by_id, "type": row.created_by_kind}
    return EnvironmentKey(
        row.id, row.environment_id, row.name, row.hint, by, row.created_at, row.expires_at, row.revoked_at
    )
