"""Forgetting an organisation's secrets for good."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.storage.tables.vault import (
    vault_credentials,
    vault_org_keys,
    vault_secrets,
)
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.vault.credentials import announce_change


async def erase_vault(tx: AsyncConnection, principal: Principal) -> dict[str, int]:
    """Delete all credentials, secrets and data keys of the organisation; how many of each. Needs `delete:organization`.

    Without its data keys, what backups still hold of the organisation (records and snapshots) cannot be opened either.
    The caller then drops the keys from memory (`OrgKeys.forget`).
    """
    principal.require("delete:organization")
    counts: dict[str, int] = {}
    for name, table in (
        ("credentials", vault_credentials),
        ("secrets", vault_secrets),
        ("data_keys", vault_org_keys),
    ):
        done = await tx.execute(table.delete().where(table.c.org_id == principal.org))
        counts[name] = done.rowcount
    announce_change(tx, principal)
    return counts
