"""Vaults: named groups of credentials that a session's tools may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict
from claude_wrapper.sessions.resources.values import (
    Fields,
    merged_metadata,
    metadata_of,
    missing,
    name_of,
    wire_time,
)
from claude_wrapper.storage.dialects import for_update
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.resources import tool_credentials
from claude_wrapper.storage.tables.resources import tool_vaults as table
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal, owned

READ: Final = "read:vaults"
WRITE: Final = "write:vaults"
VAULT: Final = "vlt"

SecretName = tuple[str, str]
"""Kind and name of a secret in the secret store."""


@dataclass(frozen=True, slots=True)
class Vault:
    """One vault."""

    id: str
    display_name: str
    metadata: Mapping[str, str]
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None
    workspace_id: str | None

    def to_wire(self) -> dict[str, Any]:
        """The API's object."""
        return {
            "id": self.id,
            "type": "vault",
            "display_name": self.display_name,
            "metadata": dict(self.metadata),
            "created_at": wire_time(self.created_at),
            "updated_at": wire_time(self.updated_at),
            "archived_at": wire_time(self.archived_at),
        }


async def create_vault(tx: AsyncConnection, principal: Principal, scribe: Scribe, fields: Fields) -> Vault:
    """A new, empty vault. Needs `write:vaults`; raises InvalidRequest naming the field."""
    principal.require(WRITE)
    fields.only("display_name", "metadata")
    vault_id, now = scribe.ids.new(VAULT), scribe.now()
    name = name_of(fields.text("display_name", most=255), fields.at("display_name"))
    await tx.execute(
        sa.insert(table).values(
            id=vault_id,
            org_id=principal.org,
            workspace_id=principal.workspace,
            display_name=name,
            metadata=metadata_of(fields),
            created_at=now,
            updated_at=now,
        )
    )
    await scribe.record(tx, principal, "vault.create", ("vault", vault_id), after={"display_name": name})
    return await get_vault(tx, principal, vault_id)


async def get_vault(tx: AsyncConnection, principal: Principal, vault_id: str) -> Vault:
    """One vault. Needs `read:vaults`; raises NotFound."""
    principal.require(READ)
    row = (await tx.execute(sa.select(table).where(owned(principal, table), table.c.id == vault_id))).first()
    if row is None:
        raise missing("vault", vault_id)
    return _vault(row)


async def list_vaults(
    tx: AsyncConnection, principal: Principal, request: PageRequest, *, include_archived: bool = False
) -> Page[Vault]:
    """Vaults, newest first. Needs `read:vaults`."""
    principal.require(READ)
    statement = sa.select(table).where(owned(principal, table))
    if not include_archived:
        statement = statement.where(table.c.archived_at.is_(None))
    return await fetch_page(tx, statement, (table.c.created_at, table.c.id), request, _vault)


async def update_vault(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, vault_id: str, fields: Fields
) -> Vault:
    """Rename a vault, change its metadata. Needs `write:vaults`; raises Conflict if it is archived."""
    principal.require(WRITE)
    fields.only("display_name", "metadata")
    present = await locked_vault(tx, principal, vault_id)
    values: dict[str, Any] = {}
    if fields.given("display_name"):
        values["display_name"] = name_of(fields.data["display_name"], fields.at("display_name"))
    if (patch := fields.maybe_object("metadata")) is not None:
        values["metadata"] = merged_metadata(present.metadata, patch)
    if values:
        change = table.update().where(owned(principal, table), table.c.id == vault_id)
        await tx.execute(change.values(**values, updated_at=scribe.now()))
        await scribe.record(tx, principal, "vault.update", ("vault", vault_id), after={"fields": sorted(values)})
    return await get_vault(tx, principal, vault_id)


async def archive_vault(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, vault_id: str
) -> tuple[Vault, list[SecretName]]:
    """Archive a vault and its credentials, whose secrets the caller then deletes. Doing it twice is no error."""
    principal.require(WRITE)
    present = await get_vault(tx, principal, vault_id)
    secrets = await _secrets(tx, principal, vault_id)
    if present.archived_at is None:
        now = scribe.now()
        change = table.update().where(owned(principal, table), table.c.id == vault_id)
        await tx.execute(change.values(archived_at=now, updated_at=now))
        inside = tool_credentials.update().where(
            owned(principal, tool_credentials),
            tool_credentials.c.vault_id == vault_id,
            tool_credentials.c.archived_at.is_(None),
        )
        await tx.execute(inside.values(archived_at=now, updated_at=now))
        await scribe.record(tx, principal, "vault.archive", ("vault", vault_id), after={"archived_at": now})
    return await get_vault(tx, principal, vault_id), secrets


async def delete_vault(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, vault_id: str
) -> tuple[Vault, list[SecretName]]:
    """Delete a vault with its credentials, whose secrets the caller then deletes. Needs `write:vaults`."""
    principal.require(WRITE)
    gone = await get_vault(tx, principal, vault_id)
    secrets = await _secrets(tx, principal, vault_id)
    await tx.execute(table.delete().where(owned(principal, table), table.c.id == vault_id))
    await scribe.record(tx, principal, "vault.delete", ("vault", vault_id))
    return gone, secrets


async def locked_vault(tx: AsyncConnection, principal: Principal, vault_id: str) -> Vault:
    """A vault that is about to be changed, locked. Raises NotFound, and Conflict if it is archived."""
    statement = sa.select(table.c.id).where(owned(principal, table), table.c.id == vault_id)
    await tx.execute(for_update(tx.dialect.name, statement))
    vault = await get_vault(tx, principal, vault_id)
    if vault.archived_at is not None:
        raise Conflict(f"vault {vault_id!r} is archived and cannot be changed")
    return vault


async def _secrets(tx: AsyncConnection, principal: Principal, vault_id: str) -> list[SecretName]:
    columns = (tool_credentials.c.kind, tool_credentials.c.id)
    statement = sa.select(*columns).where(owned(principal, tool_credentials), tool_credentials.c.vault_id == vault_id)
    return [(row.kind, row.id) for row in await tx.execute(statement)]


def _vault(row: Any) -> Vault:
    return Vault(
        id=row.id,
        display_name=row.display_name,
        metadata=row.metadata,
        created_at=row.created_at,
        updated_at=row.updated_at,
        archived_at=row.archived_at,
        workspace_id=row.workspace_id,
    )
