"""Other secrets of an organisation, sealed like its credentials: the MCP vaults' tokens and environment variables.

A secret is a small JSON object under (kind, name): kinds are words of the caller (`static_bearer`, `mcp_oauth`,
`environment_variable`, `cache_key`), names are its identifiers. Nothing here is listed or shown; whoever keeps a secret
keeps what may be shown of it elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import Conflict, InvalidRequest, NotFound
from claude_wrapper.ids import Ids
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.failures import conflict_when_duplicate
from claude_wrapper.storage.tables.vault import vault_secrets
from claude_wrapper.tenancy.principal import Principal, owned
from claude_wrapper.vault.orgkeys import OrgKeys

TABLE: Final = "vault_secrets"
READ: Final = "read:vaults"
WRITE: Final = "write:vaults"
MAX_BYTES: Final = 64 * 1024
_KIND: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")


class SecretStore:
    """Puts, gets and deletes secrets of the principal's organisation (and workspace, if it is confined to one)."""

    def __init__(self, db: Database, keys: OrgKeys, clock: Clock, ids: Ids) -> None:
        self._db = db
        self._keys = keys
        self._clock = clock
        self._ids = ids

    async def put(
        self,
        principal: Principal,
        kind: str,
        name: str,
        secret: Mapping[str, Any],
        *,
        expected_version: int | None = None,
    ) -> int:
        """Keep a secret, in place of one of the same kind and name; its version, from 1.

        `expected_version` 0 means that there must be none yet. Needs `write:vaults`; raises Conflict.
        """
        principal.require(WRITE)
        _check(kind, name)
        plain = msgspec.json.encode(dict(secret))
        if len(plain) > MAX_BYTES:
            raise InvalidRequest(f"a secret has at most {MAX_BYTES} bytes", field="secret")
        keys = await self._keys.of(principal.org)
        fresh_id = self._ids.new("vsec")

        async def write(tx: AsyncConnection) -> int:
            row = (
                await tx.execute(_select(principal, kind, name, vault_secrets.c.id, vault_secrets.c.version))
            ).first()
            present = row.version if row else 0
            if expected_version is not None and expected_version != present:
                raise Conflict(f"the secret {name!r} was changed by somebody else meanwhile; read it again")
            secret_id = row.id if row else fresh_id
            values = {
                "sealed": keys.seal(plain, table=TABLE, record=secret_id, field=f"{kind}\0{name}"),
                "updated_at": self._clock.now(),
                "version": present + 1,
            }
            if row:
                where = (owned(principal, vault_secrets), vault_secrets.c.id == secret_id)
                done = await tx.execute(
                    vault_secrets.update().where(*where, vault_secrets.c.version == present).values(**values)
                )
                if not done.rowcount:
                    raise Conflict(f"the secret {name!r} was changed by somebody else meanwhile; read it again")
                return present + 1
            # A name that another workspace has taken is refused like one that two writers race for.
            with conflict_when_duplicate(f"there is a secret {name!r} already"):
                await tx.execute(
                    sa.insert(vault_secrets).values(
                        id=secret_id,
                        org_id=principal.org,
                        workspace_id=principal.workspace,
                        kind=kind,
                        name=name,
                        created_at=self._clock.now(),
                        **values,
                    )
                )
            return 1

        return await self._db.run(write)

    async def get(self, principal: Principal, kind: str, name: str) -> dict[str, Any]:
        """The secret in plain text, for the server's own use. Needs `read:vaults`; raises NotFound."""
        return (await self.get_versioned(principal, kind, name))[0]

    async def get_versioned(self, principal: Principal, kind: str, name: str) -> tuple[dict[str, Any], int]:
        """The secret and its version, for those who change what they read."""
        principal.require(READ)
        columns = (vault_secrets.c.id, vault_secrets.c.sealed, vault_secrets.c.version)

        async def read(tx: AsyncConnection) -> Any:
            return (await tx.execute(_select(principal, kind, name, *columns))).first()

        row = await self._db.query(read)
        if row is None:
            raise NotFound(f"there is no secret {name!r} of the kind {kind!r}")
        sealed = bytes(row.sealed)
        keys = await self._keys.of(principal.org, opening=sealed)
        plain = keys.open(sealed, table=TABLE, record=row.id, field=f"{kind}\0{name}")
        secret: dict[str, Any] = msgspec.json.decode(plain)
        return secret, row.version

    async def delete(self, principal: Principal, kind: str, name: str) -> bool:
        """Delete for good; whether there was one. Needs `write:vaults`."""
        principal.require(WRITE)

        async def write(tx: AsyncConnection) -> bool:
            where = (owned(principal, vault_secrets), vault_secrets.c.kind == kind, vault_secrets.c.name == name)
            return bool((await tx.execute(vault_secrets.delete().where(*where))).rowcount)

        return await self._db.run(write, idempotent=True)


def _select(principal: Principal, kind: str, name: str, *columns: Any) -> sa.Select[Any]:
    return sa.select(*columns).where(
        owned(principal, vault_secrets), vault_secrets.c.kind == kind, vault_secrets.c.name == name
    )


def _check(kind: str, name: str) -> None:
    if not _KIND.fullmatch(kind):
        raise InvalidRequest("is not the kind of a secret", field="kind")
    if not 0 < len(name) <= 300 or not name.isprintable():
        raise InvalidRequest("must have 1 to 300 printable characters", field="name")
