"""The audit log: who changed what, from where, and how it was before and after.

Every change in this package takes a `Scribe` and writes exactly one entry in the same transaction as the change: there
is no change without an entry and no entry without a change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.ids import Ids
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.tenancy import audit_log
from claude_wrapper.tenancy.principal import Principal, owned

AUDIT = "audit"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request came from."""

    address: str | None = None
    user_agent: str | None = None
    request_id: str | None = None


HERE = Origin()
"""The server itself, or its command line."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change."""

    id: str
    org_id: str
    created_at: datetime
    actor_kind: str
    actor_id: str | None
    action: str
    target_kind: str
    target_id: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    origin: Origin


@dataclass(frozen=True, slots=True)
class Scribe:
    """What a change needs besides the data: the time, new identifiers, and where it came from."""

    clock: Clock
    ids: Ids
    origin: Origin = HERE

    def now(self) -> datetime:
        """The time of the change."""
        return self.clock.now()

    async def record(
        self,
        tx: AsyncConnection,
        principal: Principal,
        action: str,
        target: tuple[str, str],
        *,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one entry. `action` is `noun.verb`; `target` is (kind, id). Never pass a secret."""
        await tx.execute(
            sa.insert(audit_log).values(
                id=self.ids.new(AUDIT),
                org_id=principal.org,
                created_at=self.now(),
                actor_kind=str(principal.actor_kind),
                actor_id=principal.actor_id,
                action=action,
                target_kind=target[0],
                target_id=target[1],
                before=_plain(before),
                after=_plain(after),
                address=_cut(self.origin.address, 64),
                user_agent=_cut(self.origin.user_agent, 256),
                request_id=_cut(self.origin.request_id, 128),
            )
        )


def _plain(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}


def _cut(value: str | None, length: int) -> str | None:
    return value[:length] if value else None


def changes(before: Any, after: Any, *fields: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The named fields that differ between two records, as (before, after)."""
    names = [name for name in fields if getattr(before, name) != getattr(after, name)]
    return {name: getattr(before, name) for name in names}, {name: getattr(after, name) for name in names}


async def list_audit_entries(
    tx: AsyncConnection,
    principal: Principal,
    request: PageRequest,
    *,
    action: str | None = None,
    target_id: str | None = None,
    actor_id: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Page[AuditEntry]:
    """The organisation's entries, newest first. Needs `read:audit`."""
    principal.require("read:audit")
    statement = sa.select(audit_log).where(owned(principal, audit_log))
    for column, value in (("action", action), ("target_id", target_id), ("actor_id", actor_id)):
        if value is not None:
            statement = statement.where(audit_log.c[column] == value)
    if since is not None:
        statement = statement.where(audit_log.c.created_at >= since)
    if until is not None:
        statement = statement.where(audit_log.c.created_at < until)
    return await fetch_page(tx, statement, (audit_log.c.created_at, audit_log.c.id), request, _entry)


def _entry(row: Any) -> AuditEntry:
    return AuditEntry(
        id=row.id,
        org_id=row.org_id,
        created_at=row.created_at,
        actor_kind=row.actor_kind,
        actor_id=row.actor_id,
        action=row.action,
        target_kind=row.target_kind,
        target_id=row.target_id,
        before=row.before,
        after=row.after,
        origin=Origin(row.address, row.user_agent, row.request_id),
    )
