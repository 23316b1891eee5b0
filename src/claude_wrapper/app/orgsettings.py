"""What organisations set for themselves and turns need to know: their row's `settings`, kept for some seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import sqlalchemy as sa
import structlog

from claude_wrapper.broker.egresslists import EGRESS_HOSTS
from claude_wrapper.clock import Clock
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.sandbox.security import SETTING, Egress, SecurityLevel, SecurityLevels, SecurityPolicy
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.tables.tenancy import organizations

KEPT_SECONDS: Final = 10.0
"""A change is in force this much later at the latest, on every replica."""
_MOST: Final = 10_000

log = structlog.get_logger(__name__)


class OrgSettings:
    """Reads an organisation's settings at most once in some seconds."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._known: dict[str, tuple[float, Mapping[str, Any]]] = {}

    async def of(self, org: str) -> Mapping[str, Any]:
        """The settings; the last ones known while the database is away. Raises StorageUnavailable if there are none."""
        now = self._clock.monotonic()
        known = self._known.get(org)
        if known is not None and now - known[0] < KEPT_SECONDS:
            return known[1]
        try:
            async with self._database.read() as tx:
                found = await tx.scalar(sa.select(organizations.c.settings).where(organizations.c.id == org))
        except StorageUnavailable:
            if known is None:
                raise
            return known[1]
        settings: Mapping[str, Any] = found or {}
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[org] = (now, settings)
        return settings

    async def egress_hosts(self, org: str) -> Iterable[str]:
        """Its patterns as they were written; what is no pattern is sorted out by the reader."""
        value = (await self.of(org)).get(EGRESS_HOSTS)
        return tuple(one for one in value if isinstance(one, str)) if isinstance(value, list) else ()


class OrgSecurity:
    """The security level of each organisation, within the operator's bound."""

    def __init__(self, levels: SecurityLevels, settings: OrgSettings) -> None:
        self.levels = levels
        self._settings = settings
        self._policies = {level: levels.policy(level) for level in SecurityLevel}

    async def policy(self, org: str) -> SecurityPolicy:
        """What the organisation's agents may do. The strictest level when the database is away and nothing is known."""
        try:
            asked = (await self._settings.of(org)).get(SETTING)
        except StorageUnavailable as error:
            log.warning("security.level_unknown", org=org, used=SecurityLevel.STRICT.value, cause=error.message)
            return self._policies[SecurityLevel.STRICT]
        return self._policies[self.levels.level_of(asked)]

    async def egress(self, org: str) -> Egress:
        """What network its agents may have."""
        return (await self.policy(org)).egress
