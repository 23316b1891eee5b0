"""Keeping OAuth access tokens fresh: before they end, once, whichever of many requests and replicas asks first.

Inside a process all requests wait for the same refresh. Between replicas a lease in shared state picks who refreshes;
the others wait and read what it wrote. A refresh that upstream granted is never thrown away: refresh tokens rotate, and
the old one is spent. So the caller's cancellation does not reach it, and if the database is away the new tokens stay in
memory and are written at the next use.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import CredentialMissing, StorageUnavailable, UpstreamUnavailable
from claude_wrapper.ids import Ids
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.state.ports import Leases
from claude_wrapper.storage.tables.vault import vault_credentials
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.vault.credentials import announce_change, sealed_values
from claude_wrapper.vault.orgkeys import OrgKeys
from claude_wrapper.vault.records import TABLE, Sealed, Status, read_sealed
from claude_wrapper.vault.tokens import Grant, Refused, TokenEndpoint, TokenRequest

_log = structlog.get_logger("claude_wrapper.vault")


@dataclass(frozen=True, slots=True)
class OAuthSettings:
    """How tokens are refreshed."""

    client_id: str | None
    """The client that the tokens were issued to; a credential's own `client_id` setting goes before it."""
    margin: float = 300.0
    """Seconds before its end at which an access token is refreshed: longer than most turns' upstream calls."""
    lease: float = 30.0
    """Seconds that one replica may take; the token endpoint's time limit must be shorter."""
    wait: float = 40.0
    """Seconds that a request waits for another replica's refresh."""
    poll: float = 0.25
    """Seconds between two looks while waiting."""


class OAuthRefresher:
    """Refreshes access tokens. `close` waits for what is under way."""

    def __init__(
        self,
        db: Database,
        keys: OrgKeys,
        leases: Leases,
        endpoint: TokenEndpoint,
        *,
        clock: Clock,
        ids: Ids,
        settings: OAuthSettings,
    ) -> None:
        self._db = db
        self._keys = keys
        self._leases = leases
        self._endpoint = endpoint
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._running: dict[str, asyncio.Task[Sealed]] = {}
        self._unwritten: dict[str, Sealed] = {}
        """Grants that the database does not have yet."""

    async def fresh(self, principal: Principal, stored: Sealed) -> Sealed:
        """`stored` itself while its access token is good for longer than the margin, else a refreshed one.

        Raises CredentialMissing when the token endpoint refuses (the owner must sign in again), UpstreamUnavailable
        when it cannot be reached and the present token has ended, StorageUnavailable when nobody may refresh now.
        """
        credential_id = stored.view.id
        if credential_id not in self._unwritten and not self._due(stored):
            return stored
        running = self._running.get(credential_id)
        if running is None:
            running = asyncio.create_task(self._refresh(principal, stored), name=f"oauth refresh {credential_id}")
            self._running[credential_id] = running
            running.add_done_callback(lambda done: self._ended(credential_id, done))
        try:
            return await asyncio.shield(running)
        except (UpstreamUnavailable, StorageUnavailable):
            if self._still_good(stored):
                return stored  # the present token lasts until the next try
            raise

    async def close(self, grace: float = 25.0) -> None:
        """Wait for refreshes under way, at most `grace` seconds: their tokens would be lost."""
        if self._running:
            await asyncio.wait(tuple(self._running.values()), timeout=grace)

    def _ended(self, credential_id: str, done: asyncio.Task[Sealed]) -> None:
        self._running.pop(credential_id, None)
        if not done.cancelled():
            done.exception()  # every waiter may be gone: then nobody else takes note of it

    def _due(self, stored: Sealed) -> bool:
        ends = stored.view.expires_at
        return ends is not None and ends - self._clock.now() <= timedelta(seconds=self._settings.margin)

    def _still_good(self, stored: Sealed) -> bool:
        ends = stored.view.expires_at
        return ends is not None and ends > self._clock.now() and stored.view.status is Status.ACTIVE

    async def _refresh(self, principal: Principal, stored: Sealed) -> Sealed:
        pending = self._unwritten.get(stored.view.id)
        if pending is not None:
            return await self._write(principal, pending)
        name, holder = f"vault.oauth.{stored.view.id}", self._ids.new("refresh")
        deadline = self._clock.monotonic() + self._settings.wait
        while (lease := await self._leases.acquire(name, holder, ttl=self._settings.lease)) is None:
            if self._clock.monotonic() >= deadline:
                raise StorageUnavailable(f"another replica refreshes {stored.view.id} and does not end; try again")
            await self._clock.sleep(self._settings.poll)
            stored = await self._present(principal, stored)
            if not self._due(stored):
                return stored
        try:
            stored = await self._present(principal, stored)  # the holder before us may have just written
            return await self._granted(principal, stored) if self._due(stored) else stored
        finally:
            await self._release(lease)

    async def _release(self, lease: Any) -> None:
        try:
            await self._leases.release(lease)
        except StorageUnavailable:
            _log.warning("oauth.lease_not_released", lease=lease.name)  # it ends by itself

    async def _present(self, principal: Principal, stored: Sealed) -> Sealed:
        async def read(tx: AsyncConnection) -> Any:
            return (await tx.execute(sa.select(vault_credentials).where(*_same(principal, stored)))).first()

        row = await self._db.query(read)
        if row is None:
            raise CredentialMissing(f"the credential {stored.view.id} was deleted meanwhile")
        present = read_sealed(row)
        if present.view.status is not Status.ACTIVE:
            raise CredentialMissing(f"the credential {stored.view.id} is {present.view.status}: {present.view.problem}")
        return present

    async def _granted(self, principal: Principal, stored: Sealed) -> Sealed:
        keys = await self._keys.of(principal.org, opening=stored.sealed)
        secret: dict[str, str] = keys.open_values(stored.sealed, table=TABLE, record=stored.view.id)
        client = stored.view.config.get("client_id", self._settings.client_id)
        if "refresh_token" not in secret or client is None:
            if self._still_good(stored):
                return stored
            why = (
                "it is not known to which client it was issued: give `config.client_id`, or set CLAUDE_WRAPPER_OAUTH_CLIENT_ID"
                if "refresh_token" in secret
                else "there is no refresh token"
            )
            raise CredentialMissing(f"the access token of {stored.view.id} has ended and {why}")
        request = TokenRequest(secret["refresh_token"], client)
        try:
            grant = await self._endpoint.refresh(request)
        except Refused as refused:
            _log.warning("oauth.refused", credential_id=stored.view.id, reason=refused.reason)
            await self._mark_invalid(principal, stored, refused.reason)
            raise CredentialMissing(
                f"the credential {stored.view.id} can no longer be refreshed ({refused.reason}): sign in again",
                details={"credential_id": stored.view.id, "reason": refused.reason},
            ) from refused
        _log.info("oauth.refreshed", credential_id=stored.view.id)
        renewed = {**secret, "access_token": grant.access_token}
        if grant.refresh_token:
            renewed["refresh_token"] = grant.refresh_token
        pending = await self._renewed(principal, stored, renewed, self._ends(grant))
        self._unwritten[stored.view.id] = pending
        return await self._write(principal, pending)

    def _ends(self, grant: Grant) -> datetime | None:
        return None if grant.expires_in is None else self._clock.now() + timedelta(seconds=grant.expires_in)

    async def _renewed(
        self, principal: Principal, stored: Sealed, secret: dict[str, str], ends: datetime | None
    ) -> Sealed:
        keys = await self._keys.of(principal.org)
        view = stored.view
        values = sealed_values(keys, principal, view.kind, view.id, secret)
        sealed = values.pop("sealed")
        renewed = replace(
            view, **values, expires_at=ends, updated_at=self._clock.now(), status=Status.ACTIVE, problem=None,
            version=view.version + 1,
        )  # fmt: skip
        return Sealed(renewed, sealed)

    async def _write(self, principal: Principal, pending: Sealed) -> Sealed:
        """Write a grant; while the database is away it stays in memory and serves from there."""
        try:
            written = await self._db.run(lambda tx: _store(tx, principal, pending), idempotent=True)
        except StorageUnavailable:
            _log.error("oauth.not_written", credential_id=pending.view.id)
            return pending
        self._unwritten.pop(pending.view.id, None)
        # Somebody gave the credential new secrets meanwhile: theirs count.
        return pending if written else await self._present(principal, pending)

    async def _mark_invalid(self, principal: Principal, stored: Sealed, reason: str) -> None:
        async def write(tx: AsyncConnection) -> None:
            table = vault_credentials
            await tx.execute(
                table.update()
                .where(*_same(principal, stored), table.c.version == stored.view.version)
                .values(
                    status=str(Status.INVALID),
                    problem=reason[:200],
                    updated_at=self._clock.now(),
                    version=stored.view.version + 1,
                )
            )
            announce_change(tx, principal)

        await self._db.run(write, idempotent=True)


def _same(principal: Principal, stored: Sealed) -> tuple[sa.ColumnElement[bool], ...]:
    # Not `owned`: a principal that is confined to a workspace may be served by the organisation's credential.
    return (vault_credentials.c.org_id == principal.org, vault_credentials.c.id == stored.view.id)


async def _store(tx: AsyncConnection, principal: Principal, pending: Sealed) -> bool:
    table, view = vault_credentials, pending.view
    before = view.version - 1
    done = await tx.execute(
        table.update()
        .where(*_same(principal, pending), table.c.version == before)
        .values(
            sealed=pending.sealed,
            hint=view.hint,
            fingerprint=view.fingerprint,
            expires_at=view.expires_at,
            updated_at=view.updated_at,
            status=str(Status.ACTIVE),
            problem=None,
            version=view.version,
        )
    )
    if not done.rowcount:
        # Either our own earlier try did arrive, or somebody changed the credential.
        present = await tx.scalar(sa.select(table.c.fingerprint).where(*_same(principal, pending)))
        return bool(present == view.fingerprint)
    announce_change(tx, principal)
    return True
