"""The queue of a self-hosted environment's work, as its workers and its operators ask for it.

Workers' credentials are confined by the routes before they come here; API keys come with their scopes. Nothing is
decided here (that is `work`), nothing is polled: a poll that blocks waits for the announcement of new work.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.clock import Clock
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.sessions.resources.environments import get_environment
from claude_wrapper.sessions.resources.values import Fields, merged_metadata, wire_time
from claude_wrapper.sessions.selfhosted import work as states
from claude_wrapper.sessions.selfhosted import workrows
from claude_wrapper.sessions.selfhosted.demand import needed_again, queue_channel
from claude_wrapper.sessions.selfhosted.work import Beat, Work
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.pagination import Page, PageRequest
from claude_wrapper.storage.state import SharedState, Subscription
from claude_wrapper.tenancy.keyformat import Pepper
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.tenancy.workertokens import mint_token

log = structlog.get_logger(__name__)

READ: Final = "read:agents"
WRITE: Final = "write:agents"
_POLLING_SECONDS: Final = 30.0
_NOTED_SECONDS: Final = 5.0
_MOST_WORKERS: Final = 1000


@dataclass(frozen=True, slots=True)
class Claimed:
    """An item that a poll handed out, with its secret."""

    work: Work
    secret: str

    def to_wire(self) -> dict[str, Any]:
        """The API's object."""
        return self.work.to_wire(self.secret)


class WorkQueue:
    """All environments' work, through the eyes of one principal at a time."""

    def __init__(
        self,
        db: Database,
        state: SharedState,
        clock: Clock,
        pepper: Pepper,
        *,
        lease_seconds: int,
        new_id: Callable[[str], str],
    ) -> None:
        """`lease_seconds`: how long a worker may be silent when it names no time itself."""
        self._db = db
        self._state = state
        self._clock = clock
        self._pepper = pepper
        self._lease = lease_seconds
        self._new_id = new_id

    # Workers ----------------------------------------------------------------------------------------------------------

    async def poll(
        self, principal: Principal, environment: str, *, block: float, reclaim_ms: int, worker: str | None
    ) -> Claimed | None:
        """The oldest item that nobody serves, or None after at most `block` seconds."""
        await self._note_worker(environment, worker)
        deadline = asyncio.get_running_loop().time() + block
        async with contextlib.AsyncExitStack() as stack:
            calls: Subscription | None = None
            if block > 0:
                calls = await stack.enter_async_context(self._state.subscribe(queue_channel(environment)))
            while True:
                found = await self._claim(principal, environment, reclaim_ms)
                if found is not None or calls is None:
                    return found
                # An unacknowledged item or a lease may become due meanwhile, which announces nothing: after the wait,
                # and when the link of the announcements broke, it is looked once more.
                if not await _called(calls, deadline):
                    calls = None

    async def _claim(self, principal: Principal, environment: str, reclaim_ms: int) -> Claimed | None:
        now = self._clock.now()
        async with self._db.read() as tx:
            if not await workrows.waiting(tx, principal, environment, now, reclaim_ms):
                return None

        async def work(tx: AsyncConnection) -> Work | None:
            await workrows.settle(tx, principal, environment, now)
            for found in await workrows.waiting(tx, principal, environment, now, reclaim_ms):
                taken = states.handed_out(found, now)
                if states.claimable(found, now, reclaim_ms) and await workrows.write(tx, principal, found, taken):
                    return taken
            return None

        taken = await self._db.run(work)
        if taken is None:
            return None
        token = mint_token(taken.id, taken.generation, self._pepper)
        secret = base64.urlsafe_b64encode(msgspec.json.encode({"sessions_token": token})).decode()
        log.info("work.handed_out", work=taken.id, session=taken.session_id, generation=taken.generation)
        return Claimed(taken, secret)

    async def ack(self, principal: Principal, environment: str, work_id: str) -> Work:
        """A worker takes an item. Raises NotFound, Conflict."""
        now = self._clock.now()
        return await self._changed(
            principal, environment, work_id, lambda one: states.acknowledged(states.settled(one, now), now, self._lease)
        )

    async def heartbeat(
        self,
        principal: Principal,
        environment: str,
        work_id: str,
        *,
        expected: str | None,
        desired_ttl: int | None,
    ) -> Beat:
        """A worker is still there. Raises NotFound, Conflict, PreconditionFailed."""
        now, ttl = self._clock.now(), states.ttl_of(desired_ttl, self._lease)
        generation = principal.worker.generation if principal.worker is not None else None

        def decide(one: Work) -> tuple[Work, Beat]:
            beat = states.beaten(states.settled(one, now), now, ttl, expected=expected, generation=generation)
            return beat.work, beat

        async def work(tx: AsyncConnection) -> Beat:
            return (await workrows.change(tx, principal, environment, work_id, decide))[2]

        return await self._db.run(work)

    async def stop(self, principal: Principal, environment: str, work_id: str, *, force: bool) -> Work:
        """Ask for the end of an item, or end it. An API key needs `write:agents`. Raises NotFound, Conflict.

        A worker that leaves while its session still needs one leaves an item for the next.
        """
        worker = principal.worker
        now = self._clock.now()
        generation = worker.generation if worker is not None else None

        def decide(one: Work) -> tuple[Work, None]:
            return states.stop_asked(states.settled(one, now), now, force=force, generation=generation), None

        async def work(tx: AsyncConnection) -> tuple[Work, bool]:
            if worker is None:
                principal.require(WRITE)
                await get_environment(tx, principal, environment)
            before, after, _ = await workrows.change(tx, principal, environment, work_id, decide)
            again = False
            if worker is not None:
                again = await needed_again(tx, principal, before, now=now, new_id=self._new_id)
            return after, again

        stopped, again = await self._db.run(work)
        if again:
            await self._state.publish(queue_channel(environment), b"")
        return stopped

    async def page(self, principal: Principal, environment: str, page: PageRequest) -> Page[Work]:
        """Items, newest first."""
        now = self._clock.now()

        async def work(tx: AsyncConnection) -> Page[Work]:
            await workrows.settle(tx, principal, environment, now)
            return await workrows.page_of(tx, principal, environment, page)

        return await self._db.run(work)

    # Operators --------------------------------------------------------------------------------------------------------

    async def get(self, principal: Principal, environment: str, work_id: str) -> Work:
        """Needs `read:agents`; raises NotFound."""
        async with self._db.read() as tx:
            await get_environment(tx, principal, environment)
            return states.settled(await workrows.get(tx, principal, environment, work_id), self._clock.now())

    async def update(self, principal: Principal, environment: str, work_id: str, patch: Fields) -> Work:
        """Merge metadata. Needs `write:agents`; raises NotFound, InvalidRequest."""
        principal.require(WRITE)

        def decide(one: Work) -> tuple[Work, None]:
            return replace(one, metadata=merged_metadata(one.metadata, patch)), None

        async def work(tx: AsyncConnection) -> Work:
            await get_environment(tx, principal, environment)
            return (await workrows.change(tx, principal, environment, work_id, decide))[1]

        return await self._db.run(work)

    async def stats(self, principal: Principal, environment: str) -> dict[str, Any]:
        """How much waits, for how long, and how many workers polled within 30 seconds. Needs `read:agents`."""
        now = self._clock.now()

        async def work(tx: AsyncConnection) -> tuple[int, int, datetime | None]:
            await get_environment(tx, principal, environment)
            await workrows.settle(tx, principal, environment, now)
            return await workrows.counts(tx, principal, environment)

        depth, pending, oldest = await self._db.run(work)
        polling = _recent(await self._state.get(_workers_key(environment)), now)
        return {
            "type": "work_queue_stats",
            "depth": depth,
            "pending": pending,
            "oldest_queued_at": wire_time(oldest),
            "workers_polling": len(polling),
        }

    # Inside -----------------------------------------------------------------------------------------------------------

    async def _changed(
        self, principal: Principal, environment: str, work_id: str, decide: Callable[[Work], Work]
    ) -> Work:
        async def work(tx: AsyncConnection) -> Work:
            return (await workrows.change(tx, principal, environment, work_id, lambda one: (decide(one), None)))[1]

        return await self._db.run(work)

    async def _note_worker(self, environment: str, worker: str | None) -> None:
        """Count it among the workers that poll; a poll is answered without that, too."""
        if worker is None:
            return
        key, now = _workers_key(environment), self._clock.now()
        with contextlib.suppress(StorageUnavailable):
            for _ in range(3):
                present = await self._state.get(key)
                workers = _recent(present, now)
                if now.timestamp() - workers.get(worker, 0.0) < _NOTED_SECONDS or len(workers) >= _MOST_WORKERS:
                    return
                value = msgspec.json.encode({**workers, worker: now.timestamp()})
                if await self._state.compare_and_set(key, present, value, ttl=_POLLING_SECONDS):
                    return


def _workers_key(environment: str) -> str:
    return f"environment/{environment}/workers"


def _recent(value: bytes | None, now: datetime) -> dict[str, float]:
    known = msgspec.json.decode(value, type=dict[str, float]) if value else {}
    return {worker: at for worker, at in known.items() if now.timestamp() - at < _POLLING_SECONDS}


async def _called(calls: Subscription, deadline: float) -> bool:
    """Wait for an announcement; False when the time is over or there will be none."""
    try:
        async with asyncio.timeout_at(deadline):
            await anext(calls)
    except (TimeoutError, StopAsyncIteration):
        return False
    return True
