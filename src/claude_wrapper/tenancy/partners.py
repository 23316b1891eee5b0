"""Who shares kept answers with whom: organisations that have named each other (policy `cache_share_with`)."""

from __future__ import annotations

import sqlalchemy as sa
import structlog

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.tenancy.policies import CacheAnswers, read
from claude_wrapper.tenancy.policybook import PolicyBook

log = structlog.get_logger(__name__)


class Partners:
    """The partners of each organisation."""

    def __init__(self, database: Database, policies: PolicyBook) -> None:
        self._database, self._policies = database, policies

    async def named(self, org: str) -> tuple[str, ...]:
        """Whom `org` names, as the policy book remembers it: enough to know that there is nobody to ask."""
        return (await self._policies.of_organization(org)).cache_share_with

    # tenant-scope: both sides of a consent; the caller names its principal's organisation, and learns ids that it named itself
    async def mutual(self, org: str) -> tuple[str, ...]:
        """Whom `org` names and who names it, in its order, read from the database now.

        A withdrawal therefore holds on every replica from the next look-up on. Nobody is left where the database cannot
        be read. An organisation that is deleted, or whose `cache_answers` is off, shares nothing.
        """
        named = await self.named(org)
        if not named:
            return ()
        statement = sa.select(organizations.c.id, organizations.c.settings).where(
            organizations.c.id.in_((org, *named)), organizations.c.deleted_at.is_(None)
        )
        try:
            async with self._database.read() as tx:
                rows = (await tx.execute(statement)).all()
        except StorageUnavailable:
            log.warning("cache.partners_not_read", org=org, effect="nothing is shared")
            return ()
        policies = {row.id: read(row.settings, row.id) for row in rows}
        sharing = {one: kept for one, kept in policies.items() if kept.cache_answers is not CacheAnswers.OFF}
        if org not in sharing:
            return ()
        return tuple(
            one
            for one in sharing[org].cache_share_with
            if one != org and one in sharing and org in sharing[one].cache_share_with
        )
