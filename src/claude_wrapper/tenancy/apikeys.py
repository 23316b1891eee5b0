"""API keys: create, list, change, rotate with overlap, revoke.

A key belongs to an organisation, optionally to one workspace and optionally to one user; it can do no more than its
role, its own scopes and (if it acts for a user) that user can. The secret is returned once, by `create` and `rotate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper import ids
from claude_wrapper.errors import Conflict, InvalidRequest, NotFound, PermissionDenied
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.tenancy import api_keys, org_members, workspaces
from claude_wrapper.tenancy.announcements import announce_change
from claude_wrapper.tenancy.audit import Scribe, changes
from claude_wrapper.tenancy.keyformat import MintedKey, Pepper, mint
from claude_wrapper.tenancy.keyrecords import (
    ApiKey,
    KeyChange,
    KeySpec,
    KeyStatus,
    NewApiKey,
    audited_key,
    effective_scopes,
    read_key,
)
from claude_wrapper.tenancy.locking import bump
from claude_wrapper.tenancy.principal import Principal, owned, require_grantable, require_operator
from claude_wrapper.tenancy.scopes import Role, parse_scopes, scopes_of
from claude_wrapper.tenancy.values import clean_limits, clean_models, clean_name

MAX_OVERLAP = timedelta(days=30)


async def create_api_key(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, pepper: Pepper, spec: KeySpec
) -> NewApiKey:
    """A new key. Needs `write:api_keys`; raises PermissionDenied for more than the principal holds."""
    principal.require("write:api_keys")
    spec = await _checked(tx, principal, scribe, spec)
    minted = mint(scribe.ids.new(ids.API_KEY), pepper)
    key = await _insert(tx, principal, scribe, minted, spec)
    await scribe.record(tx, principal, "api_key.create", ("api_key", key.id), after=audited_key(key))
    return NewApiKey(key, minted.secret)


async def get_api_key(tx: AsyncConnection, principal: Principal, key_id: str, *, now: datetime) -> ApiKey:
    """One key. Needs `read:api_keys`; raises NotFound."""
    principal.require("read:api_keys")
    return read_key(await _row(tx, principal, key_id), now)


async def list_api_keys(
    tx: AsyncConnection,
    principal: Principal,
    request: PageRequest,
    *,
    now: datetime,
    status: KeyStatus | None = None,
    workspace_id: str | None = None,
    created_by_user_id: str | None = None,
) -> Page[ApiKey]:
    """The organisation's keys (or the workspace's), newest first. Needs `read:api_keys`."""
    principal.require("read:api_keys")
    statement = sa.select(api_keys).where(owned(principal, api_keys))
    if workspace_id is not None:
        statement = statement.where(api_keys.c.workspace_id == workspace_id)
    if created_by_user_id is not None:
        statement = statement.where(
            api_keys.c.created_by_kind == "user", api_keys.c.created_by_id == created_by_user_id
        )
    expired = sa.and_(api_keys.c.expires_at.is_not(None), api_keys.c.expires_at <= now)
    if status is KeyStatus.EXPIRED:
        statement = statement.where(api_keys.c.status == KeyStatus.ACTIVE, expired)
    elif status is KeyStatus.ACTIVE:
        statement = statement.where(api_keys.c.status == status, sa.not_(expired))
    elif status is not None:
        statement = statement.where(api_keys.c.status == status)
    return await fetch_page(
        tx, statement, (api_keys.c.created_at, api_keys.c.id), request, lambda row: read_key(row, now)
    )


async def update_api_key(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, key_id: str, change: KeyChange
) -> ApiKey:
    """Change a key. `archived` revokes it for good; an archived key cannot be changed. Needs `write:api_keys`."""
    principal.require("write:api_keys")
    before = await _changeable(tx, principal, scribe, key_id)
    values: dict[str, Any] = {}
    if change.name is not None:
        values["name"] = clean_name(change.name)
    if change.scopes is not None:
        scopes = parse_scopes(change.scopes)
        require_grantable(principal, scopes & scopes_of(before.role), what="this key these scopes")
        values["scopes"] = sorted(scopes)
    if change.allowed_models is not None:
        values["allowed_models"] = _models(principal, change.allowed_models)
    if change.limits is not None:
        values["limits"] = clean_limits(change.limits)
    if change.expires_at is not None:
        values["expires_at"] = change.expires_at
    if change.status is not None:
        values |= _status_values(change.status, scribe.now())
    if not values:
        return before
    return await _change(
        tx,
        principal,
        scribe,
        before,
        values=values,
        expected_version=change.expected_version,
        action="api_key.update",
    )


async def revoke_api_key(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, key_id: str, *, expected_version: int | None = None
) -> ApiKey:
    """Revoke a key for good. Doing it twice is no error. Needs `write:api_keys`."""
    principal.require("write:api_keys")
    before = read_key(await _row(tx, principal, key_id), scribe.now())
    if before.status is KeyStatus.ARCHIVED:
        return before
    _require_master(principal, before)
    values = _status_values(KeyStatus.ARCHIVED, scribe.now())
    return await _change(
        tx, principal, scribe, before, values=values, expected_version=expected_version, action="api_key.revoke"
    )


async def rotate_api_key(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, pepper: Pepper, key_id: str, *, overlap: timedelta
) -> NewApiKey:
    """A new key that can do what the old one could; the old one stays good for `overlap` (at most 30 days)."""
    principal.require("write:api_keys")
    if not timedelta(0) <= overlap <= MAX_OVERLAP:
        raise InvalidRequest(f"must be from 0 to {MAX_OVERLAP.days} days", field="overlap")
    before = await _changeable(tx, principal, scribe, key_id)
    require_grantable(principal, effective_scopes(before.role, before.scopes), what="a key like this one")
    minted = mint(scribe.ids.new(ids.API_KEY), pepper)
    spec = KeySpec(
        name=before.name,
        role=before.role,
        workspace_id=before.workspace_id,
        user_id=before.user_id,
        scopes=before.scopes,
        allowed_models=before.allowed_models,
        limits=before.limits,
        expires_at=before.expires_at,
    )
    key = await _insert(tx, principal, scribe, minted, spec, replaces=before.id, is_operator=before.is_operator)
    ends = scribe.now() + overlap
    if before.expires_at is not None:
        ends = min(ends, before.expires_at)
    changed = api_keys.update().where(owned(principal, api_keys), api_keys.c.id == before.id)
    await tx.execute(changed.values(expires_at=ends, version=before.version + 1))
    announce_change(tx, org=before.org_id, key=before.id)
    await scribe.record(
        tx,
        principal,
        "api_key.rotate",
        ("api_key", before.id),
        before={"expires_at": before.expires_at},
        after={"expires_at": ends, "replaced_by": key.id},
    )
    return NewApiKey(key, minted.secret)


async def create_operator_key(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, pepper: Pepper, *, name: str
) -> NewApiKey:
    """A key of the operator, in the organisation that the operator acts in."""
    require_operator(principal)
    minted = mint(scribe.ids.new(ids.API_KEY), pepper)
    key = await _insert(tx, principal, scribe, minted, KeySpec(name, Role.OWNER), is_operator=True)
    await scribe.record(tx, principal, "api_key.create", ("api_key", key.id), after=audited_key(key))
    return NewApiKey(key, minted.secret)


# inside ----------------------------------------------------------------------------------------------------------------


async def _checked(tx: AsyncConnection, principal: Principal, scribe: Scribe, spec: KeySpec) -> KeySpec:
    scopes = None if spec.scopes is None else sorted(parse_scopes(spec.scopes))
    require_grantable(principal, effective_scopes(spec.role, scopes), what=f"a key with the role {spec.role}")
    workspace = spec.workspace_id or principal.workspace
    if workspace is not None:
        found = sa.select(workspaces.c.archived_at).where(owned(principal, workspaces), workspaces.c.id == workspace)
        row = (await tx.execute(found)).first()
        if row is None:
            raise NotFound(f"there is no workspace {workspace!r}")
        if row.archived_at is not None:
            raise Conflict(f"workspace {workspace!r} is archived")
    if spec.user_id is not None:
        if spec.user_id != principal.user_id:
            # Such a key uses that person's own credential and budget.
            principal.require("write:members")
        member = sa.select(org_members.c.user_id).where(
            owned(principal, org_members), org_members.c.user_id == spec.user_id
        )
        if (await tx.execute(member)).first() is None:
            raise NotFound(f"there is no user {spec.user_id!r} in this organisation")
    if spec.expires_at is not None and spec.expires_at <= scribe.now():
        raise InvalidRequest("must be in the future", field="expires_at")
    return KeySpec(
        name=clean_name(spec.name),
        role=spec.role,
        workspace_id=workspace,
        user_id=spec.user_id,
        scopes=scopes,
        allowed_models=_models(principal, spec.allowed_models),
        limits=clean_limits(spec.limits),
        expires_at=spec.expires_at,
    )


def _models(principal: Principal, wanted: Sequence[str] | None) -> list[str] | None:
    """The models of a key that this principal gives out: never more than its own."""
    if principal.allowed_models is None:
        return None if wanted is None else clean_models(wanted)
    if wanted is None:
        return sorted(principal.allowed_models)
    models = clean_models(wanted)
    for model in models:
        if not principal.may_use(model):  # a prefix, too, must lie within one of the principal's own
            raise PermissionDenied(f"you cannot give the model {model!r}: your own key may not use it")
    return models


async def _insert(
    tx: AsyncConnection,
    principal: Principal,
    scribe: Scribe,
    minted: MintedKey,
    spec: KeySpec,
    *,
    replaces: str | None = None,
    is_operator: bool = False,
) -> ApiKey:
    await tx.execute(
        sa.insert(api_keys).values(
            id=minted.id,
            org_id=principal.org,
            workspace_id=spec.workspace_id,
            user_id=spec.user_id,
            name=spec.name,
            digest=minted.digest,
            hint=minted.hint,
            role=str(spec.role),
            scopes=None if spec.scopes is None else list(spec.scopes),
            allowed_models=None if spec.allowed_models is None else list(spec.allowed_models),
            limits=dict(spec.limits) or None,
            status=str(KeyStatus.ACTIVE),
            is_operator=is_operator,
            created_by_kind=str(principal.actor_kind),
            created_by_id=principal.actor_id,
            replaces=replaces,
            created_at=scribe.now(),
            expires_at=spec.expires_at,
        )
    )
    announce_change(tx, org=principal.org, key=minted.id)  # a replica may remember that this key did not exist
    return read_key(await _row(tx, principal, minted.id), scribe.now())


async def _row(tx: AsyncConnection, principal: Principal, key_id: str) -> Any:
    found = sa.select(api_keys).where(owned(principal, api_keys), api_keys.c.id == key_id)
    row = (await tx.execute(found)).first()
    if row is None:
        raise NotFound(f"there is no API key {key_id!r}")
    return row


async def _changeable(tx: AsyncConnection, principal: Principal, scribe: Scribe, key_id: str) -> ApiKey:
    key = read_key(await _row(tx, principal, key_id), scribe.now())
    if key.status is KeyStatus.ARCHIVED:
        raise Conflict(f"API key {key_id!r} is archived and cannot be changed; create a new one")
    _require_master(principal, key)
    return key


def _require_master(principal: Principal, key: ApiKey) -> None:
    """Nobody changes a key that can do more than they can."""
    if key.is_operator:
        require_operator(principal)
    require_grantable(principal, effective_scopes(key.role, key.scopes), what="changes to this key")


async def _change(
    tx: AsyncConnection,
    principal: Principal,
    scribe: Scribe,
    before: ApiKey,
    *,
    values: dict[str, Any],
    expected_version: int | None,
    action: str,
) -> ApiKey:
    where = (owned(principal, api_keys), api_keys.c.id == before.id)
    await bump(tx, api_keys, where, values, expected_version or before.version, what=f"API key {before.id!r}")
    after = read_key(await _row(tx, principal, before.id), scribe.now())
    announce_change(tx, org=before.org_id, key=before.id)
    old, new = changes(before, after, "name", "status", "scopes", "allowed_models", "limits", "expires_at")
    await scribe.record(tx, principal, action, ("api_key", before.id), before=old, after=new)
    return after


def _status_values(status: KeyStatus, now: datetime) -> dict[str, Any]:
    if status is KeyStatus.EXPIRED:
        raise InvalidRequest("a key expires by its expires_at; use inactive or archived", field="status")
    values: dict[str, Any] = {"status": str(status)}
    if status is KeyStatus.ARCHIVED:
        values["revoked_at"] = now
    return values
