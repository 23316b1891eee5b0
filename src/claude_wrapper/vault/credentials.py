"""Upstream credentials of organisations, workspaces and users: create, list, change, delete, find by OAuth token.

Secrets go in and are never given out here: only `vault.resolve` opens them, for the broker. A base URL cannot be
changed without giving the secret again, or whoever may edit a credential could have it sent to a server of their own.

Changes take the organisation's `DataKeys` (`await org_keys.of(principal.org)`), fetched before the transaction begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper import ids
from claude_wrapper.errors import InvalidRequest, NotFound, PermissionDenied
from claude_wrapper.storage.engine import announce
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.tenancy import org_members, workspaces
from claude_wrapper.storage.tables.vault import vault_credentials
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.locking import bump
from claude_wrapper.tenancy.principal import Principal, owned
from claude_wrapper.tenancy.values import clean_name
from claude_wrapper.vault.envelope import DataKeys
from claude_wrapper.vault.kinds import CredentialKind, UrlPolicy, clean_base_url, clean_config, clean_secret
from claude_wrapper.vault.records import (
    COLUMNS,
    TABLE,
    Credential,
    CredentialChange,
    CredentialSpec,
    Sealed,
    Status,
    audited,
    hint_of,
    main_secret,
    read_credential,
    read_sealed,
)

CHANNEL: Final = "vault.changed"
READ: Final = "read:credentials"
WRITE: Final = "write:credentials"
OWN: Final = "write:messages"
"""Who may run turns may keep a credential for themselves alone."""
MAX_RANK: Final = 1_000


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator allows."""

    allow_oauth: bool = False
    urls: UrlPolicy = field(default_factory=UrlPolicy)


async def create_credential(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, spec: CredentialSpec, *, keys: DataKeys, rules: Rules
) -> Credential:
    """Keep a credential. Needs `write:credentials`, or `write:messages` for one's own.

    Raises InvalidRequest (naming the field), PermissionDenied, NotFound (workspace or user).
    """
    _may_write(principal, spec.user)
    await _check_reach(tx, principal, spec.workspace, spec.user)
    if spec.kind is CredentialKind.OAUTH and not rules.allow_oauth:
        raise InvalidRequest("OAuth tokens are not accepted here; the operator can allow them", field="kind")
    return await insert_credential(tx, principal, scribe, spec, keys=keys, rules=rules)


async def insert_credential(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, spec: CredentialSpec, *, keys: DataKeys, rules: Rules
) -> Credential:
    """Keep a credential for somebody whose right to do so was checked."""
    config = clean_config(spec.kind, spec.config)
    secret = clean_secret(spec.kind, spec.secret)
    now, credential_id = scribe.now(), scribe.ids.new(ids.CREDENTIAL)
    values = {
        "id": credential_id,
        "org_id": principal.org,
        "workspace_id": spec.workspace,
        "user_id": spec.user,
        "kind": str(spec.kind),
        "name": clean_name(spec.name),
        "base_url": clean_base_url(spec.kind, spec.base_url, config, rules.urls),
        "config": config,
        "rank": _rank(spec.rank),
        "named_only": spec.named_only,
        "status": str(Status.ACTIVE),
        "problem": None,
        "expires_at": spec.expires_at,
        "created_at": now,
        "updated_at": now,
        "version": 1,
        **sealed_values(keys, principal, spec.kind, credential_id, secret),
    }
    await tx.execute(sa.insert(vault_credentials).values(**values))
    made = read_credential(SimpleNamespace(**values))
    await scribe.record(tx, principal, "credential.create", ("credential", made.id), after=audited(made))
    announce_change(tx, principal)
    return made


async def get_credential(tx: AsyncConnection, principal: Principal, credential_id: str) -> Credential:
    """What may be shown of one. Needs `read:credentials` unless it is one's own; raises NotFound."""
    return (await load_sealed(tx, principal, credential_id)).view


async def list_credentials(
    tx: AsyncConnection,
    principal: Principal,
    request: PageRequest,
    *,
    workspace_id: str | None = None,
    user_id: str | None = None,
) -> Page[Credential]:
    """What may be shown of all that the principal may see: one's own, or with `read:credentials` all."""
    statement = sa.select(*COLUMNS).where(_visible(principal))
    if workspace_id is not None:
        statement = statement.where(vault_credentials.c.workspace_id == workspace_id)
    if user_id is not None:
        statement = statement.where(vault_credentials.c.user_id == user_id)
    key = (vault_credentials.c.created_at, vault_credentials.c.id)
    return await fetch_page(tx, statement, key, request, read_credential)


async def update_credential(
    tx: AsyncConnection,
    principal: Principal,
    scribe: Scribe,
    credential_id: str,
    change: CredentialChange,
    *,
    keys: DataKeys,
    rules: Rules,
) -> Credential:
    """Change a credential; new secrets replace the old ones as a whole and make an invalid one active.

    Raises Conflict when `expected_version` is not the present one, InvalidRequest for a new base URL or new settings
    without the secret.
    """
    before = await get_credential(tx, principal, credential_id)
    _may_write(principal, before.user_id)
    values = _changed_values(before, change, rules)
    if change.secret is not None:
        secret = clean_secret(before.kind, change.secret)
        values |= sealed_values(keys, principal, before.kind, before.id, secret)
        values |= {"status": str(Status.ACTIVE), "problem": None, "expires_at": change.expires_at}
    if change.disabled is not None:
        # Enabling does not heal: one that was refused needs a new secret.
        healthy = before.status is Status.DISABLED or change.secret is not None
        if change.disabled or healthy:
            values["status"] = str(Status.DISABLED if change.disabled else Status.ACTIVE)
    if not values:
        return before
    where = (owned(principal, vault_credentials), vault_credentials.c.id == before.id)
    values["updated_at"] = scribe.now()
    version = change.expected_version or before.version
    await bump(tx, vault_credentials, where, values, version, what=f"credential {before.id!r}")
    after = await get_credential(tx, principal, credential_id)
    await scribe.record(
        tx, principal, "credential.update", ("credential", after.id), before=audited(before), after=audited(after)
    )
    announce_change(tx, principal)
    return after


async def delete_credential(tx: AsyncConnection, principal: Principal, scribe: Scribe, credential_id: str) -> None:
    """Delete one for good; the ciphertext is gone. Raises NotFound."""
    before = await get_credential(tx, principal, credential_id)
    _may_write(principal, before.user_id)
    await tx.execute(
        vault_credentials.delete().where(owned(principal, vault_credentials), vault_credentials.c.id == before.id)
    )
    await scribe.record(tx, principal, "credential.delete", ("credential", before.id), before=audited(before))
    announce_change(tx, principal)


async def load_sealed(tx: AsyncConnection, principal: Principal, credential_id: str) -> Sealed:
    """One credential with its ciphertext, for those who will open it. Raises NotFound."""
    statement = sa.select(vault_credentials).where(_visible(principal), vault_credentials.c.id == credential_id)
    row = (await tx.execute(statement)).first()
    if row is None:
        raise NotFound(f"there is no credential {credential_id!r}")
    return read_sealed(row)


def sealed_values(
    keys: DataKeys, principal: Principal, kind: CredentialKind, credential_id: str, secret: dict[str, str]
) -> dict[str, Any]:
    """The columns that change with the secret. Raises ValueError for another organisation's keys."""
    if keys.org != principal.org:
        raise ValueError("these data keys belong to another organisation")
    main = main_secret(kind, secret)
    return {
        "sealed": keys.seal_values(secret, table=TABLE, record=credential_id),
        "hint": hint_of(main),
        "fingerprint": keys.fingerprint(main),
    }


def announce_change(tx: AsyncConnection, principal: Principal) -> None:
    """Tell every replica, once this is committed, to read the organisation's credentials again."""
    announce(tx, CHANNEL, principal.org.encode())


def _changed_values(before: Credential, change: CredentialChange, rules: Rules) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if change.name is not None:
        values["name"] = clean_name(change.name)
    if change.rank is not None:
        values["rank"] = _rank(change.rank)
    if change.base_url is not None or change.config is not None:
        if change.secret is None:
            field = "base_url" if change.base_url is not None else "config"
            raise InvalidRequest("can only be changed together with the secret: give it again", field=field)
        config = clean_config(before.kind, before.config if change.config is None else change.config)
        values["config"] = config
        values["base_url"] = clean_base_url(before.kind, change.base_url, config, rules.urls)
    return values


def _rank(value: int) -> int:
    if not -MAX_RANK <= value <= MAX_RANK:
        raise InvalidRequest(f"must be from {-MAX_RANK} to {MAX_RANK}", field="rank")
    return value


def _may_write(principal: Principal, user: str | None) -> None:
    own = user is not None and user == principal.user_id and principal.may(OWN)
    if not own:
        principal.require(WRITE)


def _visible(principal: Principal) -> sa.ColumnElement[bool]:
    if principal.may(READ):
        return owned(principal, vault_credentials)
    if principal.user_id is None:
        principal.require(READ)
    return sa.and_(
        vault_credentials.c.org_id == principal.org,
        vault_credentials.c.user_id == principal.user_id,
    )


async def _check_reach(tx: AsyncConnection, principal: Principal, workspace: str | None, user: str | None) -> None:
    """The workspace and the user belong to this organisation, and a confined principal stays in its workspace."""
    if principal.workspace is not None and workspace != principal.workspace:
        raise PermissionDenied("this key is confined to its workspace: name it in `workspace`")
    if workspace is not None:
        known = sa.select(workspaces.c.id).where(owned(principal, workspaces), workspaces.c.id == workspace)
        if await tx.scalar(known) is None:
            raise NotFound(f"there is no workspace {workspace!r}")
    if user is not None:
        member = sa.select(org_members.c.user_id).where(owned(principal, org_members), org_members.c.user_id == user)
        if await tx.scalar(member) is None:
            raise NotFound(f"there is no user {user!r}")
