"""Credentials for tools: what may be shown is a row, the secret is in the secret store under the same id.

A secret is written before its row and deleted after it, so a row that can be used always has its secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import Conflict, InvalidRequest
from claude_wrapper.sessions.resources import vaults
from claude_wrapper.sessions.resources.means import ResourceMeans
from claude_wrapper.sessions.resources.toolauth import ENVIRONMENT_VARIABLE, ToolAuth, changed_auth, new_auth
from claude_wrapper.sessions.resources.values import (
    Fields,
    merged_metadata,
    metadata_of,
    missing,
    name_of,
    wire_time,
)
from claude_wrapper.sessions.resources.vaults import READ, WRITE, SecretName, Vault, get_vault, locked_vault
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.resources import tool_credentials as table
from claude_wrapper.storage.tables.resources import tool_vaults
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal, owned

CREDENTIAL: Final = "vcrd"
MAX_PER_VAULT: Final = 20


@dataclass(frozen=True, slots=True)
class ToolCredential:
    """One credential, without its secret."""

    id: str
    vault_id: str
    display_name: str | None
    kind: str
    target: str
    auth: Mapping[str, Any]
    metadata: Mapping[str, str]
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None
    workspace_id: str | None

    def to_wire(self) -> dict[str, Any]:
        """The API's object."""
        return {
            "id": self.id,
            "type": "vault_credential",
            "vault_id": self.vault_id,
            "display_name": self.display_name,
            "auth": dict(self.auth),
            "metadata": dict(self.metadata),
            "created_at": wire_time(self.created_at),
            "updated_at": wire_time(self.updated_at),
            "archived_at": wire_time(self.archived_at),
        }


async def create_credential(
    means: ResourceMeans, principal: Principal, scribe: Scribe, vault_id: str, fields: Fields
) -> ToolCredential:
    """A new credential. Needs `write:vaults`.

    Raises NotFound, Conflict (the vault is archived or full, or has a credential for this server or variable), and
    InvalidRequest naming the field.
    """
    principal.require(WRITE)
    fields.only("auth", "display_name", "metadata")
    auth = new_auth(fields.object("auth"), scribe.now())
    values = {"display_name": _display_name(fields), "metadata": metadata_of(fields)}
    credential_id, now = scribe.ids.new(CREDENTIAL), scribe.now()

    async def room(tx: AsyncConnection) -> Vault:
        vault = await locked_vault(tx, principal, vault_id)
        await _require_room(tx, principal, vault_id, auth)
        return vault

    async def add(tx: AsyncConnection) -> ToolCredential:
        vault = await room(tx)
        await tx.execute(
            sa.insert(table).values(
                id=credential_id,
                org_id=principal.org,
                workspace_id=vault.workspace_id,
                vault_id=vault_id,
                kind=auth.kind,
                target=auth.target,
                auth=dict(auth.shown),
                created_at=now,
                updated_at=now,
                **values,
            )
        )
        after = {"vault_id": vault_id, "type": auth.kind}
        await scribe.record(tx, principal, "vault_credential.create", ("vault_credential", credential_id), after=after)
        return await get_credential(tx, principal, vault_id, credential_id)

    inside = _within(principal, (await means.db.run(room)).workspace_id)
    await means.secrets.put(inside, auth.kind, credential_id, auth.secret, expected_version=0)
    try:
        return await means.db.run(add)
    except BaseException:
        await means.secrets.delete(inside, auth.kind, credential_id)
        raise


async def get_credential(
    tx: AsyncConnection, principal: Principal, vault_id: str, credential_id: str
) -> ToolCredential:
    """One credential. Needs `read:vaults`; raises NotFound."""
    principal.require(READ)
    statement = sa.select(table).where(
        owned(principal, table), table.c.vault_id == vault_id, table.c.id == credential_id
    )
    row = (await tx.execute(statement)).first()
    if row is None:
        raise missing("credential", credential_id)
    return _credential(row)


async def list_credentials(
    tx: AsyncConnection, principal: Principal, request: PageRequest, vault_id: str, *, include_archived: bool = False
) -> Page[ToolCredential]:
    """The credentials of a vault, newest first. Needs `read:vaults`; raises NotFound."""
    await get_vault(tx, principal, vault_id)
    statement = sa.select(table).where(owned(principal, table), table.c.vault_id == vault_id)
    if not include_archived:
        statement = statement.where(table.c.archived_at.is_(None))
    return await fetch_page(tx, statement, (table.c.created_at, table.c.id), request, _credential)


async def update_credential(
    means: ResourceMeans, principal: Principal, scribe: Scribe, place: tuple[str, str], fields: Fields
) -> ToolCredential:
    """Change a credential; `place` is (vault id, credential id). Needs `write:vaults`.

    Raises NotFound, Conflict for an archived one, InvalidRequest for what cannot be changed.
    """
    principal.require(WRITE)
    fields.only("auth", "display_name", "metadata")

    async def read(tx: AsyncConnection) -> ToolCredential:
        return await get_credential(tx, principal, *place)

    present = await means.db.query(read)
    if present.archived_at is not None:
        raise Conflict(f"credential {present.id!r} is archived and cannot be changed")
    values: dict[str, Any] = {}
    if fields.given("display_name"):
        values["display_name"] = _display_name(fields)
    if (patch := fields.maybe_object("metadata")) is not None:
        values["metadata"] = merged_metadata(present.metadata, patch)
    if (given := fields.maybe_object("auth")) is not None:
        values["auth"] = await _change_secret(means, principal, present, given, scribe.now())

    async def change(tx: AsyncConnection) -> ToolCredential:
        await locked_vault(tx, principal, place[0])
        where = (owned(principal, table), table.c.id == present.id, table.c.archived_at.is_(None))
        done = await tx.execute(table.update().where(*where).values(**values, updated_at=scribe.now()))
        if not done.rowcount:
            raise missing("credential", present.id)
        after = {"fields": sorted(values)}
        await scribe.record(tx, principal, "vault_credential.update", ("vault_credential", present.id), after=after)
        return await get_credential(tx, principal, *place)

    return await means.db.run(change) if values else present


async def archive_credential(
    means: ResourceMeans, principal: Principal, scribe: Scribe, place: tuple[str, str]
) -> ToolCredential:
    """Archive a credential: its record stays, its secret is deleted. Doing it twice is no error."""
    principal.require(WRITE)

    async def archive(tx: AsyncConnection) -> ToolCredential:
        present = await get_credential(tx, principal, *place)
        if present.archived_at is None:
            now = scribe.now()
            where = (owned(principal, table), table.c.id == present.id)
            await tx.execute(table.update().where(*where).values(archived_at=now, updated_at=now))
            target = ("vault_credential", present.id)
            await scribe.record(tx, principal, "vault_credential.archive", target, after={"archived_at": now})
        return await get_credential(tx, principal, *place)

    archived = await means.db.run(archive)
    await forget_secrets(means, principal, archived.workspace_id, [(archived.kind, archived.id)])
    return archived


async def delete_credential(means: ResourceMeans, principal: Principal, scribe: Scribe, place: tuple[str, str]) -> None:
    """Delete a credential and its secret. Needs `write:vaults`; raises NotFound."""
    principal.require(WRITE)

    async def delete(tx: AsyncConnection) -> ToolCredential:
        gone = await get_credential(tx, principal, *place)
        await tx.execute(table.delete().where(owned(principal, table), table.c.id == gone.id))
        await scribe.record(tx, principal, "vault_credential.delete", ("vault_credential", gone.id))
        return gone

    gone = await means.db.run(delete)
    await forget_secrets(means, principal, gone.workspace_id, [(gone.kind, gone.id)])


async def archive_vault(means: ResourceMeans, principal: Principal, scribe: Scribe, vault_id: str) -> Vault:
    """Archive a vault and its credentials; their secrets are deleted."""

    async def archive(tx: AsyncConnection) -> tuple[Vault, list[SecretName]]:
        return await vaults.archive_vault(tx, principal, scribe, vault_id)

    vault, secrets = await means.db.run(archive)
    await forget_secrets(means, principal, vault.workspace_id, secrets)
    return vault


async def delete_vault(means: ResourceMeans, principal: Principal, scribe: Scribe, vault_id: str) -> None:
    """Delete a vault, its credentials and their secrets."""

    async def delete(tx: AsyncConnection) -> tuple[Vault, list[SecretName]]:
        return await vaults.delete_vault(tx, principal, scribe, vault_id)

    vault, secrets = await means.db.run(delete)
    await forget_secrets(means, principal, vault.workspace_id, secrets)


async def forget_secrets(
    means: ResourceMeans, principal: Principal, workspace: str | None, secrets: Sequence[SecretName]
) -> None:
    """Delete secrets whose rows are gone or archived."""
    for kind, name in secrets:
        await means.secrets.delete(_within(principal, workspace), kind, name)


async def read_secret(
    means: ResourceMeans, principal: Principal, credential: ToolCredential
) -> tuple[dict[str, Any], int]:
    """The secret of a credential and its version, for the server's own use. Needs `read:vaults`; raises NotFound."""
    inside = _within(principal, credential.workspace_id)
    return await means.secrets.get_versioned(inside, credential.kind, credential.id)


async def write_secret(
    means: ResourceMeans, principal: Principal, credential: ToolCredential, secret: Mapping[str, Any], version: int
) -> None:
    """Replace a secret that was read at `version`; raises Conflict if somebody was quicker."""
    inside = _within(principal, credential.workspace_id)
    await means.secrets.put(inside, credential.kind, credential.id, secret, expected_version=version)


async def usable_credentials(
    tx: AsyncConnection, principal: Principal, vault_ids: Sequence[str], kind: Sequence[str], target: str | None = None
) -> list[ToolCredential]:
    """Live credentials of live vaults, in the order of the vaults, oldest first. Needs `read:vaults`."""
    principal.require(READ)
    joined = table.join(tool_vaults, tool_vaults.c.id == table.c.vault_id)
    statement = (
        sa.select(table)
        .select_from(joined)
        .where(
            owned(principal, table),
            table.c.vault_id.in_(vault_ids),
            table.c.kind.in_(kind),
            table.c.archived_at.is_(None),
            tool_vaults.c.archived_at.is_(None),
        )
    )
    if target is not None:
        statement = statement.where(table.c.target == target)
    rows = [_credential(row) for row in await tx.execute(statement.order_by(table.c.created_at, table.c.id))]
    order = {vault_id: number for number, vault_id in reversed(list(enumerate(vault_ids)))}
    return sorted(rows, key=lambda one: order[one.vault_id])


async def require_usable(tx: AsyncConnection, principal: Principal, vault_ids: Sequence[str], path: str) -> None:
    """That a session may be made with these vaults. Needs `read:vaults` if there are any.

    Raises NotFound, Conflict for an archived one, InvalidRequest for one with environment variables: the sandbox's way
    out passes TLS through unopened, so that a placeholder could not be replaced by the value on its way.
    """
    for index, vault_id in enumerate(vault_ids):
        vault = await get_vault(tx, principal, vault_id)
        if vault.archived_at is not None:
            raise Conflict(f"{path}[{index}]: vault {vault_id} is archived")
        variables = await usable_credentials(tx, principal, [vault_id], (ENVIRONMENT_VARIABLE,))
        if variables:
            raise InvalidRequest(
                f"vault {vault_id} holds the environment variable {variables[0].target}: this server cannot put its "
                "value into requests, because its egress proxy does not open TLS; use a vault without it",
                field=f"{path}[{index}]",
            )


# inside ----------------------------------------------------------------------------------------------------------------


def _within(principal: Principal, workspace: str | None) -> Principal:
    """The principal as it keeps things of the vault's workspace: they belong to whom the vault belongs to."""
    return replace(principal, workspace=workspace)


async def _change_secret(
    means: ResourceMeans, principal: Principal, present: ToolCredential, given: Fields, now: datetime
) -> dict[str, Any]:
    secret, version = await read_secret(means, principal, present)
    auth = changed_auth(given, present.auth, secret, now)
    if dict(auth.secret) != secret:
        await write_secret(means, principal, present, auth.secret, version)
    return dict(auth.shown)


async def _require_room(tx: AsyncConnection, principal: Principal, vault_id: str, auth: ToolAuth) -> None:
    statement = sa.select(table.c.kind, table.c.target).where(
        owned(principal, table), table.c.vault_id == vault_id, table.c.archived_at.is_(None)
    )
    present = [(row.kind == "environment_variable", row.target) for row in await tx.execute(statement)]
    if (auth.kind == "environment_variable", auth.target) in present:
        raise Conflict(f"this vault has a credential for {auth.target!r} already; change or archive it first")
    if len(present) >= MAX_PER_VAULT:
        raise Conflict(f"a vault has at most {MAX_PER_VAULT} credentials")


def _display_name(fields: Fields) -> str | None:
    if not fields.given("display_name"):
        return None
    return name_of(fields.data["display_name"], fields.at("display_name"))


def _credential(row: Any) -> ToolCredential:
    return ToolCredential(
        id=row.id,
        vault_id=row.vault_id,
        display_name=row.display_name,
        kind=row.kind,
        target=row.target,
        auth=row.auth,
        metadata=row.metadata,
        created_at=row.created_at,
        updated_at=row.updated_at,
        archived_at=row.archived_at,
        workspace_id=row.workspace_id,
    )
