"""Data keys of organisations: made at first use, kept wrapped in the database, cached unwrapped for a while.

At start `unseal` proves that the master key is the right one, before anything is written with a wrong one.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import VaultSealed
from claude_wrapper.storage.dialects import insert_ignore
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.tables.vault import vault_master_checks, vault_org_keys
from claude_wrapper.vault.envelope import DataKeys, key_version_of
from claude_wrapper.vault.keys import KEY_BYTES, MasterKey, RandomBytes, Wrapped, missing_key

_CHECK_TEXT: Final = b"claude-wrapper vault"
_CHECK_CONTEXT: Final = b"check"
MAX_CACHED: Final = 2_000
"""Organisations whose keys are kept unwrapped; one costs about 1 KB and a KMS call when it comes back."""


def key_context(org: str, version: int) -> bytes:
    """What a wrapped data key is bound to."""
    return f"org\0{org}\0{version}".encode()


# tenant-scope: master keys belong to the server
async def unseal(db: Database, master: MasterKey, clock: Clock) -> None:
    """Prove at start that the master key opens what is stored; raises VaultSealed, and the server must not start.

    The first start of all leaves a check record behind; so does the first start with a new primary key.
    """

    async def read(tx: AsyncConnection) -> tuple[dict[str, bytes], set[str]]:
        checks = await tx.execute(sa.select(vault_master_checks.c.master_key_id, vault_master_checks.c.wrapped))
        used = await tx.execute(sa.select(vault_org_keys.c.master_key_id).distinct())
        return {row.master_key_id: row.wrapped for row in checks}, set(used.scalars())

    checks, used = await db.query(read)
    for key_id in sorted(used - master.readable):
        raise missing_key(key_id)
    readable = checks.keys() & master.readable
    if checks and not readable:
        raise VaultSealed(
            f"the master key {master.primary} is not the one that this database was made with ({', '.join(sorted(checks))})"
        )
    for key_id in sorted(readable):
        if await master.unwrap(Wrapped(key_id, checks[key_id]), _CHECK_CONTEXT) != _CHECK_TEXT:
            raise VaultSealed(f"the master key {key_id} does not open the check record: it is wrong")
    if master.primary not in checks:
        await write_check(db, master, clock)


# tenant-scope: master keys belong to the server
async def write_check(db: Database, master: MasterKey, clock: Clock) -> None:
    """Leave the record by which the next start tells a wrong key."""
    wrapped = await master.wrap(_CHECK_TEXT, _CHECK_CONTEXT)

    async def write(tx: AsyncConnection) -> None:
        await tx.execute(
            insert_ignore(db.dialect, vault_master_checks, ["master_key_id"]).values(
                master_key_id=wrapped.key_id, wrapped=wrapped.blob, created_at=clock.now()
            )
        )

    await db.run(write, idempotent=True)


class OrgKeys:
    """The data keys of all organisations, by need."""

    def __init__(
        self, db: Database, master: MasterKey, clock: Clock, *, random: RandomBytes = secrets.token_bytes
    ) -> None:
        self._db = db
        self._master = master
        self._clock = clock
        self._random = random
        self._cached: OrderedDict[str, DataKeys] = OrderedDict()

    # tenant-scope: the callers name their principal's organisation; keys are useless without its records
    async def of(self, org: str, *, opening: bytes | None = None) -> DataKeys:
        """The keys of an organisation; the first one is made when there is none yet.

        `opening` is a sealed record that is about to be opened: if it names a version that another replica made
        meanwhile, the keys are read again. Raises VaultSealed.
        """
        return await self.present(org, opening=opening) or self._remembered(await self._add(org, 1))

    # tenant-scope: as above
    async def present(self, org: str, *, opening: bytes | None = None) -> DataKeys | None:
        """As `of`, and None where there is no key: what must not give one to an organisation that was erased."""
        found = self._cached.get(org)
        if found is not None and (opening is None or key_version_of(opening) in found.versions):
            self._cached.move_to_end(org)
            return found
        keys = await self._load(org)
        return None if keys is None else self._remembered(keys)

    def _remembered(self, keys: DataKeys) -> DataKeys:
        self._cached[keys.org] = keys
        self._cached.move_to_end(keys.org)
        while len(self._cached) > MAX_CACHED:
            self._cached.popitem(last=False)
        return keys

    # tenant-scope: as above
    async def renew(self, org: str) -> DataKeys:
        """A new data key for what is sealed from now on; what is already sealed stays readable."""
        present = await self.of(org)
        self.forget(org)
        keys = await self._add(org, present.newest + 1)
        self._cached[org] = keys
        return keys

    def forget(self, org: str) -> None:
        """Drop an organisation's keys from memory: it was erased, or its keys changed."""
        self._cached.pop(org, None)

    # tenant-scope: as above
    async def _load(self, org: str) -> DataKeys | None:
        async def read(tx: AsyncConnection) -> list[tuple[int, Wrapped]]:
            rows = await tx.execute(sa.select(vault_org_keys).where(vault_org_keys.c.org_id == org))
            return [(row.key_version, Wrapped(row.master_key_id, row.wrapped)) for row in rows]

        rows = await self._db.query(read)
        if not rows:
            return None
        plain = {version: await self._master.unwrap(wrapped, key_context(org, version)) for version, wrapped in rows}
        return DataKeys(org, plain, random=self._random)

    # tenant-scope: as above
    async def _add(self, org: str, version: int) -> DataKeys:
        # Wrapped outside of the transaction: a KMS may take a second, and SQLite's other writers would wait for it.
        wrapped = await self._master.wrap(self._random(KEY_BYTES), key_context(org, version))

        async def write(tx: AsyncConnection) -> None:
            await tx.execute(
                insert_ignore(self._db.dialect, vault_org_keys, ["org_id", "key_version"]).values(
                    org_id=org,
                    key_version=version,
                    master_key_id=wrapped.key_id,
                    wrapped=wrapped.blob,
                    created_at=self._clock.now(),
                )
            )

        await self._db.run(write, idempotent=True)
        # Whoever was first wins: what is read back is what everybody uses.
        keys = await self._load(org)
        if keys is None:
            raise VaultSealed(f"the data key of {org} could not be kept")
        return keys
