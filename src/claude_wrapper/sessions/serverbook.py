"""The remote MCP servers that an organisation knows, and how each was found last.

A server is known by its URL within a workspace: agents and sessions name it, connections tell how it is. This is for
people to look at; nothing is decided by it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.broker.bridge import Outcome
from claude_wrapper.clock import Clock
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.sessions.mcpservers import RemoteSpec
from claude_wrapper.sessions.resources.toolauth import plain_url
from claude_wrapper.sessions.resources.values import wire_time
from claude_wrapper.sessions.spec import Owner
from claude_wrapper.storage.dialects import insert_ignore, upsert
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.pagination import Page, PageRequest, fetch_page
from claude_wrapper.storage.tables.mcp import mcp_servers as table
from claude_wrapper.tenancy.principal import Principal, owned

log = structlog.get_logger(__name__)

UNKNOWN: Final = "unknown"
CONNECTED: Final = "connected"
NEEDS_AUTH: Final = "needs_auth"
FAILED: Final = "failed"
READ: Final = "read:agents"
_AGAIN_SECONDS: Final = 60.0
"""The same news about a server is written once in this time."""
_REMEMBERED: Final = 10_000
_MAX_PROBLEM: Final = 512


def server_id(org: str, workspace: str | None, url: str) -> str:
    """The id of a server's row."""
    parts = "\0".join((org, workspace or "", plain_url(url)))
    return f"mcps_{hashlib.sha256(parts.encode()).hexdigest()[:40]}"


async def know(tx: AsyncConnection, principal: Principal, servers: Sequence[Mapping[str, Any]], now: datetime) -> None:
    """Servers that an agent or a session of this principal has named."""
    for one in servers:
        values = {
            "id": server_id(principal.org, principal.workspace, one["url"]),
            "org_id": principal.org,
            "workspace_id": principal.workspace,
            "name": one["name"],
            "url": one["url"],
            "status": UNKNOWN,
            "created_at": now,
        }
        await tx.execute(insert_ignore(tx.dialect.name, table, ["id"]).values(**values))


async def list_servers(tx: AsyncConnection, principal: Principal, page: PageRequest) -> Page[dict[str, Any]]:
    """The servers that the principal may see, as the API shows them. Needs `read:agents`."""
    principal.require(READ)
    return await fetch_page(
        tx, sa.select(table).where(owned(principal, table)), (table.c.created_at, table.c.id), page, _shown
    )


class ServerBook:
    """Writes down how servers are found (`remotes.Seen`)."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self._written: OrderedDict[str, tuple[Any, float]] = OrderedDict()

    async def connected(self, owner: Owner, spec: RemoteSpec, facts: Mapping[str, Any]) -> None:
        """A server gave its tools."""
        news = {
            "status": CONNECTED,
            "problem": None,
            "protocol_version": (facts["protocol"] or "")[:32] or None,
            "server_info": dict(facts["server"]),
            "tools": list(facts["tools"]),
            "tools_left_out": dict(facts["dropped"]),
        }
        await self._write(owner, spec, news)

    async def failed(self, owner: Owner, spec: RemoteSpec, outcome: Outcome, problem: str) -> None:
        """A server cannot be used."""
        status = NEEDS_AUTH if outcome is Outcome.AUTHENTICATION else FAILED
        await self._write(owner, spec, {"status": status, "problem": problem[:_MAX_PROBLEM]})

    async def _write(self, owner: Owner, spec: RemoteSpec, news: dict[str, Any]) -> None:
        if not spec.known:
            return  # of a single request: its URL may be a secret of its caller
        found, now = server_id(owner.org, owner.workspace, spec.url), self._clock.monotonic()
        before = self._written.get(found)
        if before is not None and before[0] == news and now - before[1] < _AGAIN_SECONDS:
            return
        values = {**news, "name": spec.name, "checked_at": self._clock.now()}

        async def write(tx: AsyncConnection) -> None:
            place = {"id": found, "org_id": owner.org, "workspace_id": owner.workspace, "url": spec.url}
            statement = upsert(tx.dialect.name, table, ("id",), values)
            await tx.execute(statement.values(**place, **values, created_at=self._clock.now()))

        try:
            await self._db.run(write, idempotent=True)
        except StorageUnavailable as error:
            log.warning("mcp.status_not_written", reason=error.message)
            return
        self._written[found] = (news, now)
        self._written.move_to_end(found)
        while len(self._written) > _REMEMBERED:
            self._written.popitem(last=False)


def _shown(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "type": "mcp_server",
        "name": row.name,
        "url": row.url,
        "workspace_id": row.workspace_id,
        "status": row.status,
        "problem": row.problem,
        "protocol_version": row.protocol_version,
        "server_info": row.server_info,
        "tools": row.tools,
        "tools_left_out": row.tools_left_out,
        "created_at": wire_time(row.created_at),
        "checked_at": wire_time(row.checked_at),
    }
