"""Policies in the database: read and changed by administrators, and remembered for those who act by them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import InvalidRequest, StorageUnavailable
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.tenancy.announcements import read_change
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.orgs import OrganizationChange, get_organization, update_organization
from claude_wrapper.tenancy.policies import DEFAULT, SETTING, Policies, parse, read
from claude_wrapper.tenancy.principal import Principal

log = structlog.get_logger(__name__)

KEPT_SECONDS: Final = 10.0
"""A change is in force this much later at the latest, also where an announcement was lost."""
_MOST_ORGS: Final = 10_000


async def get_policies(tx: AsyncConnection, principal: Principal) -> Policies:
    """The organisation's policies. Needs `read:organization`."""
    return read((await get_organization(tx, principal)).settings, principal.org)


async def set_policies(
    tx: AsyncConnection, principal: Principal, scribe: Scribe, changes: Mapping[str, Any]
) -> Policies:
    """Change those that are named; None puts one back to its default. Needs `write:organization`, and a principal of
    the whole organisation. Raises InvalidRequest naming the field."""
    before = await get_policies(tx, principal)
    after = parse({**before.to_json(), **changes})
    if principal.org in after.cache_share_with:
        raise InvalidRequest("an organisation does not name itself", field="cache_share_with")
    change = OrganizationChange(settings={SETTING: None if after == DEFAULT else after.to_json()})
    await update_organization(tx, principal, scribe, change)
    return after


class PolicyBook:
    """The policies in force, remembered for some seconds."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._known: OrderedDict[str, tuple[Policies, float]] = OrderedDict()

    async def of(self, principal: Principal) -> Policies:
        """An organisation's policies. While the database is away the last known ones hold; none are known: the defaults."""
        return await self.of_organization(principal.org)

    # tenant-scope: the callers name their principal's organisation
    async def of_organization(self, org: str) -> Policies:
        """As `of`."""
        known = self._known.get(org)
        now = self._clock.monotonic()
        if known is not None and now < known[1]:
            return known[0]
        try:
            async with self._database.read() as tx:
                found = await tx.scalar(sa.select(organizations.c.settings).where(organizations.c.id == org))
            policies = read(found, org)
        except StorageUnavailable:
            log.warning("policies.not_read", org=org, effect="the last known ones, or none, are in force")
            policies = known[0] if known is not None else DEFAULT
        if known is not None and known[0] == policies:
            policies = known[0]
        self._known[org] = (policies, now + KEPT_SECONDS)
        self._known.move_to_end(org)
        while len(self._known) > _MOST_ORGS:
            self._known.popitem(last=False)
        return policies

    def heard(self, payload: bytes | None) -> None:
        """Something of an organisation changed; None: something may have."""
        org = None if payload is None else read_change(payload).org
        for name in [name for name in self._known if org is None or name == org]:
            self._known[name] = (self._known[name][0], float("-inf"))
