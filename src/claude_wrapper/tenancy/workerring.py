"""From a worker's credential to a `Principal`: environment keys and sessions tokens. Nothing is remembered, so that a
revocation, a stop and the end of a lease hold at once; it is one read by primary key."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from claude_wrapper.clock import Clock
from claude_wrapper.errors import AuthenticationFailed
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.tables.environments import environment_keys, environment_work
from claude_wrapper.storage.tables.sessions import sessions
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.tenancy import workertokens
from claude_wrapper.tenancy.keyformat import ENVIRONMENT_PREFIX, Pepper, parse_environment_key
from claude_wrapper.tenancy.principal import ActorKind, Principal, WorkerGrant
from claude_wrapper.tenancy.scopes import Role

_SERVED = frozenset({"starting", "active", "stopping"})


class WorkerRing:
    """Authenticates workers of self-hosted environments."""

    def __init__(self, db: Database, pepper: Pepper, clock: Clock) -> None:
        self._db = db
        self._pepper = pepper
        self._clock = clock

    @staticmethod
    def knows(presented: str) -> bool:
        """Whether it has the form of a worker's credential."""
        return presented.startswith((ENVIRONMENT_PREFIX, workertokens.PREFIX))

    async def authenticate(self, presented: str) -> Principal:
        """A principal without any scope, which says what it may ask for. Raises AuthenticationFailed."""
        if presented.startswith(workertokens.PREFIX):
            return await self._token(presented)
        return await self._key(presented)

    # tenant-scope: this is what finds out whose key it is
    async def _key(self, presented: str) -> Principal:
        key_id = parse_environment_key(presented)
        unknown = AuthenticationFailed("this environment key is not valid")
        if key_id is None:
            raise unknown
        joined = environment_keys.join(organizations, organizations.c.id == environment_keys.c.org_id)
        query = sa.select(environment_keys, organizations.c.is_staff, organizations.c.deleted_at.label("gone"))
        async with self._db.read() as tx:
            row = (await tx.execute(query.select_from(joined).where(environment_keys.c.id == key_id))).first()
        if row is None or not self._pepper.matches(presented, row.digest):
            raise unknown
        if row.gone is not None:
            raise AuthenticationFailed("the organisation of this environment key was deleted")
        if row.revoked_at is not None:
            raise AuthenticationFailed("this environment key was revoked")
        if row.expires_at is not None and row.expires_at <= self._clock.now():
            raise AuthenticationFailed("this environment key has expired")
        return _worker(row, WorkerGrant(row.environment_id), key_id=row.id)

    # tenant-scope: this is what finds out whose token it is
    async def _token(self, presented: str) -> Principal:
        named = workertokens.verified(presented, self._pepper)
        if named is None:
            raise AuthenticationFailed("this sessions token is not valid")
        work_id, generation = named
        joined = environment_work.join(sessions, sessions.c.id == environment_work.c.session_id).join(
            organizations, organizations.c.id == environment_work.c.org_id
        )
        query = sa.select(
            environment_work,
            sessions.c.workspace_id,
            sessions.c.key_id,
            sessions.c.user_id,
            organizations.c.is_staff,
            organizations.c.deleted_at.label("gone"),
        )
        async with self._db.read() as tx:
            row = (await tx.execute(query.select_from(joined).where(environment_work.c.id == work_id))).first()
        if row is None or row.gone is not None:
            raise AuthenticationFailed("the session of this sessions token is gone")
        live = good(row, generation, self._clock.now())
        grant = WorkerGrant(row.environment_id, row.id, row.session_id, generation, live)
        # What a session does through its worker, it does as whoever made it: the upstream credential is theirs.
        return _worker(row, grant, key_id=row.key_id, user_id=row.user_id, workspace=row.workspace_id)


def good(work: Any, generation: int, now: datetime) -> bool:
    """Whether a token of this generation still serves the item. Pure."""
    return (
        work.state in _SERVED
        and work.lease_expires_at is not None
        and now < work.lease_expires_at
        and holds(work, generation)
    )


def holds(work: Any, generation: int) -> bool:
    """Whether no other worker has taken the item since this generation was handed out. Pure."""
    return bool(work.floor < generation <= work.generation and work.holder in {None, generation})


def _worker(
    row: Any, grant: WorkerGrant, *, key_id: str | None, user_id: str | None = None, workspace: str | None = None
) -> Principal:
    return Principal(
        org=row.org_id,
        workspace=workspace,
        actor_kind=ActorKind.WORKER,
        key_id=key_id,
        user_id=user_id,
        role=Role.VIEWER,
        scopes=frozenset(),
        is_staff=row.is_staff,
        worker=grant,
    )
