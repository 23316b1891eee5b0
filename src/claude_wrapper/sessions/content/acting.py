"""The server, doing something for a session: in its organisation, with the rights that mounting takes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.sessions.resources.means import ResourceMeans
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal

T = TypeVar("T")

SCOPES: Final = frozenset({"read:files", "write:files", "read:agents", "write:agents", "read:vaults", "write:vaults"})
"""Whoever made the session was allowed to mount these very things; see `sessions.mounts.check`."""


@dataclass(frozen=True, slots=True)
class Acting:
    """Whose session it is, and what to work with."""

    means: ResourceMeans
    principal: Principal
    """In the session's organisation and workspace, with `SCOPES`."""
    scribe: Scribe
    session: str

    async def read(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run a query."""
        return await self.means.db.query(work)
