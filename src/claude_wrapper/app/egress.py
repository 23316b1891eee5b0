"""The hosts that an organisation added to the allow-list: its setting `egress_hosts`, a list of patterns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import sqlalchemy as sa

from claude_wrapper.clock import Clock
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.tables.tenancy import organizations

SETTING: Final = "egress_hosts"
KEPT_SECONDS: Final = 10.0
"""A change is in force this much later at the latest, on every replica."""
_MOST: Final = 10_000


class OrgHosts:
    """Reads the setting when a turn begins, at most once in some seconds for each organisation."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._known: dict[str, tuple[float, tuple[str, ...]]] = {}

    async def __call__(self, org: str) -> Iterable[str]:
        """Its patterns as they were written; what is no pattern is sorted out by the reader."""
        now = self._clock.monotonic()
        known = self._known.get(org)
        if known is not None and now - known[0] < KEPT_SECONDS:
            return known[1]
        async with self._database.read() as tx:
            found = await tx.scalar(sa.select(organizations.c.settings).where(organizations.c.id == org))
        patterns = _patterns((found or {}).get(SETTING))
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[org] = (now, patterns)
        return patterns


def _patterns(value: Any) -> tuple[str, ...]:
    return tuple(one for one in value if isinstance(one, str)) if isinstance(value, list) else ()
