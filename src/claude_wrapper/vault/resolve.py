"""Which credential a request uses, and its plain text for a short while.

The order: the one that the request names; the user's; the workspace's; the organisation's; the operator's, if the
organisation is the operator's own staff. The choice is a pure function. The most specific reach decides: if what is kept
there cannot be used, the request fails and says why, instead of silently spending somebody else's money.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Protocol

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import CredentialMissing, NotFound
from claude_wrapper.storage.engine import Announcement, Database
from claude_wrapper.storage.tables.vault import vault_credentials
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.vault.credentials import CHANNEL, load_sealed
from claude_wrapper.vault.kinds import ANTHROPIC_URL, CredentialKind
from claude_wrapper.vault.orgkeys import OrgKeys
from claude_wrapper.vault.records import TABLE, Credential, Sealed, Status, main_secret, read_sealed

OPERATOR_CREDENTIAL: Final = "cred_operator"
MAX_CACHED: Final = 10_000
"""Askers whose credentials are remembered, as ciphertext: about 1 KB each."""
CACHE_SECONDS: Final = 30.0
"""How long a change made by another replica may go unseen if its announcement is lost."""


@dataclass(frozen=True, slots=True)
class Leased:
    """A credential in plain text, for the broker alone and for a short while. Its representation hides the secret."""

    id: str
    org: str
    kind: CredentialKind
    provider: str
    base_url: str
    config: Mapping[str, str]
    secret: str = field(repr=False)
    """What is presented upstream: the key or the access token."""
    further: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The other secret fields (Bedrock's access key id and session token)."""
    expires_at: datetime | None = None
    version: int = 0

    @property
    def bearer(self) -> bool:
        """Whether it is presented as `Authorization: Bearer` rather than `x-api-key`."""
        if self.kind is CredentialKind.CUSTOM:
            return self.config.get("auth") == "bearer"
        return self.kind in (CredentialKind.OAUTH, CredentialKind.VERTEX, CredentialKind.BEDROCK)


@dataclass(frozen=True, slots=True)
class OperatorCredential:
    """The operator's own API key, for the operator's own people."""

    secret: str = field(repr=False)
    base_url: str = ANTHROPIC_URL


@dataclass(frozen=True, slots=True)
class Choice:
    """What a request uses: `candidates` in order of preference (the first one; the rest as fall-backs), or the operator's."""

    candidates: tuple[Credential, ...] = ()
    operator: bool = False


def choose(
    asker: Principal, known: Iterable[Credential], *, named: str | None, operator: bool, now: datetime
) -> Choice:
    """Pure. `known` may hold others' credentials: they are left out.

    Raises NotFound for a named one that the asker may not use, CredentialMissing when there is nothing to use.
    """
    usable_by_asker = [one for one in known if _serves(one, asker)]
    if named is not None:
        reach = [one for one in usable_by_asker if one.id == named]
        if not reach:
            raise NotFound(f"there is no credential {named!r}")
        return _usable(reach, now)
    for level in (3, 2, 1):
        reach = [one for one in usable_by_asker if _specificity(one) == level and not one.named_only]
        if reach:
            return _usable(sorted(reach, key=_preference), now)
    if operator and asker.is_staff:
        return Choice(operator=True)
    raise CredentialMissing(
        "no upstream credential is configured for this organisation; add one under /v1/organizations/credentials"
    )


def _serves(one: Credential, asker: Principal) -> bool:
    return (
        one.org_id == asker.org
        and one.workspace_id in (None, asker.workspace)
        and (one.user_id is None or (asker.user_id is not None and one.user_id == asker.user_id))
    )


def _specificity(one: Credential) -> int:
    if one.user_id is not None:
        return 3
    return 2 if one.workspace_id is not None else 1


def _preference(one: Credential) -> tuple[int, int, float, str]:
    in_workspace = 0 if one.workspace_id is not None else 1
    return (in_workspace, -one.rank, -one.created_at.timestamp(), one.id)


def _usable(reach: Sequence[Credential], now: datetime) -> Choice:
    usable = tuple(one for one in reach if unusable_because(one, now) is None)
    if usable:
        return Choice(usable)
    first = reach[0]
    raise CredentialMissing(
        f"the credential {first.id} ({first.name}) cannot be used: {unusable_because(first, now)}",
        details={"credential_id": first.id, "status": str(first.status)},
    )


def unusable_because(one: Credential, now: datetime) -> str | None:
    """Why a credential cannot be used, or None. An OAuth token past its end may still be refreshed."""
    if one.status is Status.DISABLED:
        return "it is disabled"
    if one.status is Status.INVALID:
        return f"it was refused ({one.problem or 'invalid'}); give a new secret"
    if one.expires_at is not None and one.expires_at <= now and one.kind is not CredentialKind.OAUTH:
        return "it has expired"
    return None


class Refresher(Protocol):
    """Keeps OAuth tokens fresh; `vault.oauth.OAuthRefresher`."""

    async def fresh(self, principal: Principal, stored: Sealed) -> Sealed:
        """The same credential with an access token that is good for a while."""
        ...


@dataclass(slots=True)
class _Known:
    rows: tuple[Sealed, ...]
    until: float


class Resolver:
    """Chooses and opens credentials. Remembers ciphertext only."""

    def __init__(
        self,
        db: Database,
        keys: OrgKeys,
        clock: Clock,
        *,
        refresher: Refresher | None = None,
        operator: OperatorCredential | None = None,
    ) -> None:
        self._db = db
        self._keys = keys
        self._clock = clock
        self._refresher = refresher
        self._operator = operator
        self._changes = 0
        self._known: OrderedDict[tuple[str, str | None, str | None], _Known] = OrderedDict()

    async def lease(self, principal: Principal, *, named: str | None = None) -> Leased:
        """The credential of a request. Raises CredentialMissing, NotFound, VaultSealed, StorageUnavailable."""
        return (await self.lease_all(principal, named=named, limit=1))[0]

    async def lease_all(self, principal: Principal, *, named: str | None = None, limit: int = 3) -> tuple[Leased, ...]:
        """The credential of a request and its fall-backs of the same reach, best first; at least one."""
        rows = await self._rows(principal)
        views = [one.view for one in rows]
        choice = choose(principal, views, named=named, operator=self._operator is not None, now=self._clock.now())
        if choice.operator and self._operator is not None:
            return (self._operators(principal, self._operator),)
        by_id = {one.view.id: one for one in rows}
        return tuple([await self._open(principal, by_id[one.id]) for one in choice.candidates[:limit]])

    async def lease_for_test(self, principal: Principal, credential_id: str) -> Leased:
        """A credential that the principal may manage, whoever it serves and whatever its state, to try it out.

        Needs `write:credentials`; raises NotFound, VaultSealed, StorageUnavailable, CredentialMissing (OAuth).
        """
        principal.require("write:credentials")
        stored = await self._db.query(lambda tx: load_sealed(tx, principal, credential_id))
        return await self._open(principal, stored)

    def forget(self, org: str) -> None:
        """Read an organisation's credentials again at the next request."""
        self._changes += 1
        for key in [key for key in self._known if key[0] == org]:
            del self._known[key]

    def heard(self, announcements: Iterable[Announcement]) -> None:
        """Take note of committed changes, of this replica or another."""
        for one in announcements:
            if one.channel == CHANNEL:
                self.forget(one.payload.decode())

    async def _rows(self, principal: Principal) -> tuple[Sealed, ...]:
        key = (principal.org, principal.workspace, principal.user_id)
        known = self._known.get(key)
        if known is not None and self._clock.monotonic() < known.until:
            self._known.move_to_end(key)
            return known.rows
        before = self._changes
        rows = await self._db.query(lambda tx: _load(tx, principal))
        if before != self._changes:
            return rows  # a change was announced meanwhile: these may be from before it
        self._known[key] = _Known(rows, self._clock.monotonic() + CACHE_SECONDS)
        self._known.move_to_end(key)
        while len(self._known) > MAX_CACHED:
            self._known.popitem(last=False)
        return rows

    async def _open(self, principal: Principal, stored: Sealed) -> Leased:
        if stored.view.kind is CredentialKind.OAUTH and self._refresher is not None:
            fresh = await self._refresher.fresh(principal, stored)
            if fresh is not stored:
                self.forget(principal.org)
            stored = fresh
        keys = await self._keys.of(principal.org, opening=stored.sealed)
        view = stored.view
        secret: dict[str, Any] = keys.open_values(stored.sealed, table=TABLE, record=view.id)
        main = main_secret(view.kind, secret)
        secret.pop("refresh_token", None)  # nobody outside of the vault ever needs it
        return Leased(
            id=view.id,
            org=view.org_id,
            kind=view.kind,
            provider=view.provider,
            base_url=view.base_url,
            config=view.config,
            secret=main,
            further={name: value for name, value in secret.items() if value != main},
            expires_at=view.expires_at,
            version=view.version,
        )

    def _operators(self, principal: Principal, own: OperatorCredential) -> Leased:
        return Leased(
            id=OPERATOR_CREDENTIAL,
            org=principal.org,
            kind=CredentialKind.API_KEY,
            provider="anthropic",
            base_url=own.base_url,
            config={},
            secret=own.secret,
        )


async def _load(tx: AsyncConnection, principal: Principal) -> tuple[Sealed, ...]:
    """What could serve this principal. No scope is asked for: whoever may run a turn may use what was set up for it."""
    table = vault_credentials
    statement = sa.select(table).where(
        table.c.org_id == principal.org,
        sa.or_(table.c.workspace_id.is_(None), table.c.workspace_id == principal.workspace),
        sa.or_(table.c.user_id.is_(None), table.c.user_id == principal.user_id),
    )
    return tuple(read_sealed(row) for row in await tx.execute(statement))
