"""From a presented API key to a `Principal`, in microseconds.

What the database says of a key is kept for a short time in a bounded cache, and dropped at once when a commit anywhere
announces a change. The digest is compared at every call; a wrong secret never profits from the cache. Keys that do not
exist are remembered too, apart from the good ones, so that a flood of invented keys cannot push those out.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import AuthenticationFailed, StorageUnavailable
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.tables.tenancy import (
    api_keys,
    org_members,
    organizations,
    users,
    workspace_members,
    workspaces,
)
from claude_wrapper.tenancy.announcements import Changed, read_change
from claude_wrapper.tenancy.keyformat import Pepper, parse
from claude_wrapper.tenancy.keyrecords import KeyStatus, effective_scopes
from claude_wrapper.tenancy.principal import ActorKind, Principal
from claude_wrapper.tenancy.scopes import ALL_SCOPES, Role, scopes_of

_UNKNOWN = "this API key is not valid"


@dataclass(frozen=True, slots=True)
class KeyRingSettings:
    """How long facts about keys are trusted."""

    ttl: float = 30.0
    """Seconds before a key is read again: how late a replica that missed an announcement learns of a revocation."""
    grace: float = 60.0
    """Seconds beyond `ttl` for which known keys stay good while the database is away."""
    size: int = 20_000
    """Keys remembered; about 370 bytes each (measured)."""
    misses: int = 10_000
    """Unknown keys remembered."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What the database said of a key."""

    digest: bytes = field(repr=False)
    principal: Principal | None
    refusal: str | None
    expires_at: datetime | None
    read_at: float


class KeyRing:
    """Authenticates API keys. One per replica."""

    def __init__(self, db: Database, pepper: Pepper, clock: Clock, settings: KeyRingSettings | None = None) -> None:
        self._db = db
        self._pepper = pepper
        self._clock = clock
        self._settings = settings or KeyRingSettings()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._missing: OrderedDict[str, float] = OrderedDict()
        self._loading: dict[str, asyncio.Task[_Known | None]] = {}
        self._changes = 0
        self._used: dict[str, datetime] = {}

    async def authenticate(self, presented: str | None) -> Principal:
        """The principal of this key; raises AuthenticationFailed, or StorageUnavailable if nothing is known of it."""
        key_id = parse(presented) if presented else None
        if presented is None or key_id is None:
            raise AuthenticationFailed("an API key is needed (x-api-key: sk-cw-…)" if not presented else _UNKNOWN)
        known = self._fresh(key_id)
        if known is None:
            known = await self._read(key_id)
        return self._admit(key_id, presented, known)

    def heard(self, payload: bytes | None) -> None:
        """A change was committed somewhere; None: announcements may have been missed, so forget everything."""
        self._changes += 1
        if payload is None:
            self._known.clear()
            self._missing.clear()
            return
        change = read_change(payload)
        if change.key is not None:
            self._known.pop(change.key, None)
            self._missing.pop(change.key, None)
            return
        for key_id in [key_id for key_id, known in self._known.items() if _concerns(change, known.principal)]:
            del self._known[key_id]

    # tenant-scope: keys that authenticated themselves
    async def save_last_used(self) -> int:
        """Write when keys were last used since the last call; how many. Call it about twice a minute and at the end."""
        used, self._used = self._used, {}
        if not used:
            return 0
        statement = (
            api_keys.update()
            .where(
                api_keys.c.id == sa.bindparam("key_id"),
                sa.or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at < sa.bindparam("used_at")),
            )
            .values(last_used_at=sa.bindparam("used_at"))
        )
        rows = [{"key_id": key_id, "used_at": at} for key_id, at in sorted(used.items())]
        try:
            async with self._db.transaction() as tx:
                await tx.execute(statement, rows)
        except StorageUnavailable:
            self._used = {**used, **self._used}
            raise
        return len(rows)

    # inside ------------------------------------------------------------------------------------------------------------

    def _fresh(self, key_id: str) -> _Known | None:
        known = self._known.get(key_id)
        if known is not None and self._clock.monotonic() - known.read_at < self._settings.ttl:
            self._known.move_to_end(key_id)
            return known
        missed_at = self._missing.get(key_id)
        if missed_at is not None:
            if self._clock.monotonic() - missed_at < self._settings.ttl:
                raise AuthenticationFailed(_UNKNOWN)
            del self._missing[key_id]
        return None

    async def _read(self, key_id: str) -> _Known:
        task = self._loading.get(key_id)
        if task is None:
            # One query however many requests wait; shielded, so that one that hangs up takes none of the others along.
            task = asyncio.create_task(self._load(key_id), name=f"load {key_id}")
            self._loading[key_id] = task
            task.add_done_callback(lambda done: self._loaded(key_id, done))
        try:
            known = await asyncio.shield(task)
        except StorageUnavailable:
            stale = self._known.get(key_id)
            limit = self._settings.ttl + self._settings.grace
            if stale is None or self._clock.monotonic() - stale.read_at > limit:
                raise
            return stale
        if known is None:
            raise AuthenticationFailed(_UNKNOWN)
        return known

    def _loaded(self, key_id: str, task: asyncio.Task[_Known | None]) -> None:
        if self._loading.get(key_id) is task:
            del self._loading[key_id]
        if not task.cancelled():
            task.exception()  # a failure is raised to whoever waits; if all hung up, nobody needs it

    async def _load(self, key_id: str) -> _Known | None:
        changes, now = self._changes, self._clock.monotonic()
        async with self._db.read() as tx:
            known = await _find(tx, key_id, now)
        if changes != self._changes:  # something changed while we read: good for this request, not for the next
            return known
        if known is None:
            _remember(self._missing, key_id, now, self._settings.misses)
        else:
            _remember(self._known, key_id, known, self._settings.size)
        return known

    def _admit(self, key_id: str, presented: str, known: _Known) -> Principal:
        if not self._pepper.matches(presented, known.digest):
            raise AuthenticationFailed(_UNKNOWN)
        # Whoever holds the right secret may know why it is refused.
        if known.principal is None:
            raise AuthenticationFailed(known.refusal)
        now = self._clock.now()
        if known.expires_at is not None and known.expires_at <= now:
            raise AuthenticationFailed("this API key has expired")
        self._used[key_id] = now
        return known.principal


def _remember(cache: OrderedDict[str, Any], key_id: str, value: object, size: int) -> None:
    cache[key_id] = value
    cache.move_to_end(key_id)
    while len(cache) > size:
        cache.popitem(last=False)


def _concerns(change: Changed, principal: Principal | None) -> bool:
    if principal is None:  # refused ones are few; they are simply read again
        return True
    if change.user is not None:
        return principal.user_id == change.user
    if change.workspace is not None:
        return principal.workspace == change.workspace
    return change.org is None or principal.org == change.org


# tenant-scope: this is what finds out whose key it is
def _lookup() -> sa.Select[Any]:
    joined = (
        api_keys.join(organizations, organizations.c.id == api_keys.c.org_id)
        .outerjoin(workspaces, workspaces.c.id == api_keys.c.workspace_id)
        .outerjoin(users, users.c.id == api_keys.c.user_id)
        .outerjoin(
            org_members,
            sa.and_(org_members.c.org_id == api_keys.c.org_id, org_members.c.user_id == api_keys.c.user_id),
        )
        .outerjoin(
            workspace_members,
            sa.and_(
                workspace_members.c.workspace_id == api_keys.c.workspace_id,
                workspace_members.c.user_id == api_keys.c.user_id,
            ),
        )
    )
    return (
        sa.select(
            api_keys,
            organizations.c.deleted_at.label("org_deleted_at"),
            organizations.c.is_staff,
            workspaces.c.archived_at.label("workspace_archived_at"),
            users.c.disabled_at.label("user_disabled_at"),
            org_members.c.role.label("member_role"),
            workspace_members.c.role.label("workspace_role"),
        )
        .select_from(joined)
        .where(api_keys.c.id == sa.bindparam("key_id"))
    )


_LOOKUP = _lookup()  # building it takes longer than asking


async def _find(tx: AsyncConnection, key_id: str, now: float) -> _Known | None:
    row = (await tx.execute(_LOOKUP, {"key_id": key_id})).first()
    if row is None:
        return None
    refusal = _refusal(row)
    principal = None if refusal else _principal(row)
    return _Known(row.digest, principal, refusal, row.expires_at, now)


def _refusal(row: Any) -> str | None:
    if row.status == KeyStatus.ARCHIVED:
        return "this API key was revoked"
    if row.status != KeyStatus.ACTIVE:
        return "this API key is inactive"
    if row.org_deleted_at is not None:
        return "the organisation of this API key was deleted"
    if row.workspace_archived_at is not None:
        return "the workspace of this API key is archived"
    if row.user_id is not None and (row.member_role is None or row.user_disabled_at is not None):
        return "the user of this API key has left the organisation"
    return None


def _principal(row: Any) -> Principal:
    role = Role(row.role)
    scopes = ALL_SCOPES if row.is_operator else effective_scopes(role, row.scopes)
    if row.user_id is not None:
        scopes &= member_scopes(row.member_role, row.workspace_role)
    return Principal(
        org=row.org_id,
        workspace=row.workspace_id,
        actor_kind=ActorKind.OPERATOR if row.is_operator else ActorKind.API_KEY,
        key_id=row.id,
        user_id=row.user_id,
        role=role,
        scopes=scopes,
        allowed_models=None if row.allowed_models is None else frozenset(row.allowed_models),
        is_operator=row.is_operator,
        is_staff=row.is_staff,
        limits=row.limits or {},
    )


def member_scopes(org_role: str, workspace_role: str | None) -> frozenset[str]:
    """What a person may do in a workspace: what either of their roles allows."""
    roles: Sequence[str] = (org_role,) if workspace_role is None else (org_role, workspace_role)
    return frozenset[str]().union(*(scopes_of(Role(role)) for role in roles))
