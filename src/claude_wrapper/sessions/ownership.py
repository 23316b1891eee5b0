"""Which replica holds a session: one row per replica that it renews, one holder and one fence per session.

A replica is alive while its row in `replicas` is younger than the lease, by the database's own clock: one statement every
few seconds, however many sessions it holds. It takes a session with one conditional UPDATE, which succeeds if nobody
holds the session, or nobody who is alive, and which makes the session's fence grow. Every write of a holder names the
fence it was given (`records.guard`, `EventLog.write`): a holder that was paused past its lease and wakes up can write
nothing once another has taken the session.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import HeldElsewhere, LeaseLost, NotFound, StorageUnavailable
from claude_wrapper.storage.dialects import now_ms, upsert
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.tables.replicas import replicas
from claude_wrapper.storage.tables.sessions import sessions
from claude_wrapper.tenancy.principal import Principal, owned

log = structlog.get_logger(__name__)

BEATS: Final = 3
"""Renewals within one lease."""
_BURY_SECONDS: Final = 3600.0
"""Rows of replicas that died are removed after this."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session is held."""

    replica: str
    address: str | None
    """The URL by which it is reached; None: it cannot be."""
    alive: bool


class Ownership:
    """The sessions that this replica holds."""

    def __init__(
        self, db: Database, clock: Clock, *, replica: str, address: str | None = None, lease_seconds: float = 15.0
    ) -> None:
        """`replica` is this process's own name, never used before; `address` is how other replicas reach it."""
        self.replica = replica
        self.address = address
        self.lease_seconds = lease_seconds
        self.on_lost: Callable[[str, int], None] = lambda _session, _fence: None
        """Called with a session that turned out to be held by another, and the fence that is worth nothing now."""
        self.on_free: Callable[[], Awaitable[None]] = _nothing
        """Called when everything was given back."""
        self._db = db
        self._clock = clock
        self._fences: dict[str, int] = {}
        self._taking: dict[str, asyncio.Task[int]] = {}
        self._releasing: dict[str, asyncio.Task[None]] = {}
        self._renewed = float("-inf")
        self.steps: Counter[str] = Counter()
        """What happened so far: `acquired`, `renewed` (of the replica, all sessions at once), `released`, `lost`."""

    def __len__(self) -> int:
        return len(self._fences)

    # This replica ------------------------------------------------------------------------------------------------------

    @property
    def certain(self) -> bool:
        """Nobody can have taken anything from this replica: its last renewal is younger than the lease."""
        return self._clock.monotonic() - self._renewed < self.lease_seconds

    async def keep(self) -> None:
        """Renew until cancelled. While the database is away nothing is lost: nobody else can take anything either."""
        while True:
            await self._clock.sleep(self.lease_seconds / BEATS)
            try:
                await self.renew()
            except StorageUnavailable as error:
                log.warning("replica.not_renewed", cause=error.message)

    # tenant-scope: replicas belong to the server
    async def renew(self) -> None:
        """Be alive for another lease. Raises StorageUnavailable."""
        asked = self._clock.monotonic()
        until = now_ms() + round(self.lease_seconds * 1000)
        async with self._db.transaction() as tx:
            mine = sa.and_(replicas.c.id == self.replica, replicas.c.expires_at > now_ms())
            late = not (await tx.execute(sa.update(replicas).where(mine).values(expires_at=until))).rowcount
            if late:
                row = {"id": self.replica, "address": self.address, "expires_at": until}
                changes = {"address": self.address, "expires_at": until}
                await tx.execute(upsert(tx.dialect.name, replicas, ("id",), changes).values(**row))
        first, self._renewed = self._renewed == float("-inf"), asked
        self.steps["renewed"] += 1
        if late and not first:
            log.warning("replica.was_late", lease_seconds=self.lease_seconds)
            await self._look()

    # tenant-scope: the server asks what it holds itself, of all organisations
    async def _look(self) -> None:
        """The lease had run out for a moment: what was taken meanwhile is lost."""
        async with self._db.read() as tx:
            query = sa.select(sessions.c.id, sessions.c.fence).where(sessions.c.holder == self.replica)
            held = {row.id: row.fence for row in (await tx.execute(query)).all()}
        for session, fence in list(self._fences.items()):
            if held.get(session) != fence:
                self.lose(session, fence)

    # tenant-scope: replicas belong to the server
    async def forget_replica(self, replica: str) -> None:
        """A replica that is known to be dead: its sessions are free at once."""
        async with self._db.transaction() as tx:
            await tx.execute(sa.delete(replicas).where(replicas.c.id == replica))

    # tenant-scope: replicas belong to the server
    async def bury(self) -> None:
        """Remove the rows of replicas that died long ago."""
        async with self._db.transaction() as tx:
            old = replicas.c.expires_at < now_ms() - round(_BURY_SECONDS * 1000)
            await tx.execute(sa.delete(replicas).where(old))

    # tenant-scope: replicas belong to the server
    async def close(self) -> None:
        """Give everything back, so that others need not wait for the lease. Never fails."""
        if self._releasing:
            await asyncio.wait(set(self._releasing.values()))
        self._fences.clear()
        self._renewed = float("-inf")
        with suppress(StorageUnavailable):
            async with self._db.transaction() as tx:
                await tx.execute(sa.update(sessions).where(sessions.c.holder == self.replica).values(holder=None))
                await tx.execute(sa.delete(replicas).where(replicas.c.id == self.replica))
            await self.on_free()

    # tenant-scope: replicas belong to the server
    async def living(self, replica: str) -> bool:
        """Whether a replica counts as alive. Raises StorageUnavailable."""
        async with self._db.read() as tx:
            return (await tx.execute(sa.select(_alive(sa.literal(replica))))).scalar_one()

    # Sessions ----------------------------------------------------------------------------------------------------------

    def holds(self, session: str) -> bool:
        """Whether this replica holds it, as far as it knows."""
        return session in self._fences

    @property
    def held(self) -> frozenset[str]:
        """What this replica holds, as far as it knows."""
        return frozenset(self._fences)

    def made(self, session: str, fence: int) -> None:
        """A session that this replica inserted as its holder."""
        self._fences[session] = fence

    async def take(self, principal: Principal, session: str) -> int:
        """Hold the session; its fence. Costs nothing while it is held here.

        Raises HeldElsewhere while another living replica holds it, NotFound, StorageUnavailable.
        """
        known = self._fences.get(session)
        if known is not None and self.certain:
            return known
        # Of several that want it at once one asks: a second grant would make the first one's fence worthless.
        task = self._taking.get(session)
        if task is None:
            task = self._taking[session] = asyncio.get_running_loop().create_task(self._take(principal, session))
            task.add_done_callback(lambda _: self._taking.pop(session, None))
        return await asyncio.shield(task)

    async def _take(self, principal: Principal, session: str) -> int:
        if (leaving := self._releasing.get(session)) is not None:
            await asyncio.wait({leaving})
        if not self.certain:
            await self.renew()
        known = self._fences.get(session)
        async with self._db.transaction() as tx:
            if known is not None:
                mine = sa.select(sessions.c.id).where(owned(principal, sessions), sessions.c.id == session)
                mine = mine.where(sessions.c.holder == self.replica, sessions.c.fence == known)
                if (await tx.execute(mine)).first() is not None:
                    return known
            fence = await _grant(tx, principal, session, self.replica)
            place = None if fence is not None else await where(tx, principal, session)
        if known is not None:
            self.lose(session, known)
        if fence is not None:
            self._fences[session] = fence
            self.steps["acquired"] += 1
            return fence
        if place is None or place.replica == self.replica:
            raise LeaseLost(
                f"session {session}: this replica lost its own lease; send the request again", retry_after=1
            )
        raise HeldElsewhere(
            f"session {session} is held by another replica; send the request again",
            holder=place.replica,
            address=place.address,
            retry_after=1,
        )

    def release(self, session: str, fence: int) -> asyncio.Task[None] | None:
        """Give the session back; the task ends when others can take it. None: it is not held here with this fence."""
        if self._fences.get(session) != fence:
            return None
        del self._fences[session]
        self.steps["released"] += 1
        task = self._releasing[session] = asyncio.get_running_loop().create_task(self._release(session, fence))
        task.add_done_callback(lambda _: self._releasing.pop(session, None))
        return task

    # tenant-scope: the server gives back what it holds itself
    async def _release(self, session: str, fence: int) -> None:
        try:
            async with self._db.transaction() as tx:
                mine = sa.and_(sessions.c.holder == self.replica, sessions.c.fence == fence)
                await tx.execute(sa.update(sessions).where(sessions.c.id == session, mine).values(holder=None))
        except StorageUnavailable as error:
            # It stays this replica's: whoever asks for it is sent here, and it is taken again.
            log.warning("session.not_released", session=session, cause=error.message)

    def lose(self, session: str, fence: int) -> None:
        """Somebody else has it: a write with this fence was refused."""
        if self._fences.get(session) == fence:
            del self._fences[session]
            self.steps["lost"] += 1
            log.warning("session.lost", session=session, fence=fence)
            self.on_lost(session, fence)


async def _nothing() -> None:
    """Nobody waits for it."""


async def _grant(tx: AsyncConnection, principal: Principal, session: str, replica: str) -> int | None:
    """The new fence, or None: another living replica has it, or this one does not count as alive, or there is none."""
    free = sa.or_(sessions.c.holder.is_(None), sessions.c.holder == replica, sa.not_(_alive(sessions.c.holder)))
    granted = await tx.execute(
        sa.update(sessions)
        .where(owned(principal, sessions), sessions.c.id == session, free, _alive(sa.literal(replica)))
        .values(holder=replica, fence=sessions.c.fence + 1)
        .returning(sessions.c.fence)
    )
    fence = granted.scalar()
    return None if fence is None else int(fence)


async def where(tx: AsyncConnection, principal: Principal, session: str) -> Place | None:
    """The holder of a session, or None. Raises NotFound."""
    query = (
        sa.select(sessions.c.holder, replicas.c.address, replicas.c.expires_at > now_ms())
        .outerjoin(replicas, replicas.c.id == sessions.c.holder)
        .where(owned(principal, sessions), sessions.c.id == session)
    )
    row = (await tx.execute(query)).first()
    if row is None:
        raise NotFound(f"there is no session {session}")
    return None if row[0] is None else Place(row[0], row[1], bool(row[2]))


# tenant-scope: replicas belong to the server
def _alive(replica: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    return sa.exists(sa.select(replicas.c.id).where(replicas.c.id == replica, replicas.c.expires_at > now_ms()))
