"""The queue among replicas, on SQLite and Postgres: each item to one worker; credentials end with their leases."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa

from claude_wrapper.errors import AuthenticationFailed, Conflict, InvalidRequest, PreconditionFailed
from claude_wrapper.ids import RandomIds
from claude_wrapper.sessions import records
from claude_wrapper.sessions.selfhosted.demand import enqueue, queue_channel
from claude_wrapper.sessions.selfhosted.queue import Claimed, WorkQueue
from claude_wrapper.sessions.selfhosted.work import ACTIVE, NO_HEARTBEAT, QUEUED
from claude_wrapper.sessions.sessionfields import NewSession
from claude_wrapper.storage import Database
from claude_wrapper.storage.state import MemoryState
from claude_wrapper.storage.tables.resources import environments
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.environmentkeys import create_environment_key, revoke_environment_key
from claude_wrapper.tenancy.keyformat import Pepper
from claude_wrapper.tenancy.principal import ActorKind, Principal
from claude_wrapper.tenancy.scopes import Role, scopes_of
from claude_wrapper.tenancy.workerring import WorkerRing
from claude_wrapper.testing.clock import ManualClock

pytestmark = pytest.mark.anyio

BOSS = Principal("org_one", None, ActorKind.API_KEY, "apikey_one", None, Role.ADMIN, scopes_of(Role.ADMIN))
PEPPER = Pepper(b"p" * 32)


@dataclass
class World:
    db: Database
    clock: ManualClock
    state: MemoryState
    scribe: Scribe
    ring: WorkerRing
    queues: list[WorkQueue]
    key: str = ""
    key_id: str = ""

    async def session(self) -> str:
        """A new one, queued."""
        new = NewSession(
            {"id": "agent_one", "name": "one"}, environment_id="env_one", environment={"type": "self_hosted"}
        )
        session, now, ids = RandomIds().new("sesn"), self.clock.now(), RandomIds()
        async with self.db.transaction() as tx:
            await records.insert_session(tx, new.row(BOSS, session, ids.new("sthr"), now))
            found = await records.get_session(tx, BOSS, session)
            assert await enqueue(tx, BOSS, found, now=now, new_id=ids.new)
            assert not await enqueue(tx, BOSS, found, now=now, new_id=ids.new), "it waits already"
        await self.state.publish(queue_channel("env_one"), b"")
        return session

    async def poll(self, queue: int = 0, *, block: float = 0.0, worker: str | None = None) -> Claimed | None:
        asker = await self.ring.authenticate(self.key)
        return await self.queues[queue].poll(asker, "env_one", block=block, reclaim_ms=5000, worker=worker)


def token_of(claimed: Claimed | None) -> str:
    assert claimed is not None
    return str(json.loads(base64.urlsafe_b64decode(claimed.secret))["sessions_token"])


def _other_at(text: str, place: int) -> str:
    return text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]


@pytest.fixture
async def world(database: Database) -> World:
    clock, ids = ManualClock(), RandomIds()
    state = MemoryState(clock)
    scribe, now = Scribe(clock, ids), clock.now()
    queues = [WorkQueue(database, state, clock, PEPPER, lease_seconds=60, new_id=ids.new) for _ in range(2)]
    one = World(database, clock, state, scribe, WorkerRing(database, PEPPER, clock), queues)
    async with database.transaction() as tx:
        await tx.execute(sa.insert(organizations).values(id="org_one", name="one", created_at=now))
        for name, kind in (("env_one", "self_hosted"), ("env_cloud", "cloud")):
            row = {"id": name, "org_id": "org_one", "name": name, "config": {"type": kind}, "metadata": {}}
            await tx.execute(sa.insert(environments).values(**row, created_at=now, updated_at=now))
        with pytest.raises(InvalidRequest):
            await create_environment_key(tx, BOSS, scribe, PEPPER, "env_cloud", name="x")
        made = await create_environment_key(tx, BOSS, scribe, PEPPER, "env_one", name="x")
    one.key, one.key_id = made.secret, made.key.id
    return one


async def test_polls_of_two_replicas_at_once_hand_out_each_item_once(world: World) -> None:
    sessions = {await world.session() for _ in range(6)}
    found = await asyncio.gather(*(world.poll(at % 2) for at in range(10)))
    handed = [one.work.session_id for one in found if one is not None]
    assert sorted(handed) == sorted(set(handed)), "none twice"
    while (more := await world.poll()) is not None:
        handed.append(more.work.session_id)
    assert sorted(handed) == sorted(sessions)
    stats = await world.queues[1].stats(BOSS, "env_one")
    assert (stats["depth"], stats["pending"]) == (0, 6)
    await world.clock.advance(5)
    again = await world.poll(1)
    assert again is not None
    assert again.work.generation == 2, "nobody acknowledged it"


async def test_a_poll_waits_for_work_without_looking_again_and_again(world: World) -> None:
    waiting = asyncio.ensure_future(world.poll(block=20.0, worker="host-1"))
    while not (await world.queues[0].stats(BOSS, "env_one"))["workers_polling"]:
        await asyncio.sleep(0)
    session = await world.session()
    found = await waiting
    assert found is not None
    assert found.work.session_id == session
    assert await world.poll(block=0.01) is None
    await world.clock.advance(31)
    assert (await world.queues[0].stats(BOSS, "env_one"))["workers_polling"] == 0


async def test_one_of_two_acknowledges_and_a_lease_that_ends_gives_the_session_to_another(world: World) -> None:
    await world.session()
    first = await world.poll()
    key = await world.ring.authenticate(world.key)
    assert first is not None
    acks = await asyncio.gather(
        *(queue.ack(key, "env_one", first.work.id) for queue in world.queues), return_exceptions=True
    )
    assert sorted(type(one).__name__ for one in acks) == ["Conflict", "Work"]
    holder = await world.ring.authenticate(token_of(first))
    assert holder.scopes == frozenset()
    assert holder.worker is not None
    assert holder.worker.live

    async def beat(asker: Principal, expected: str, queue: int = 0) -> Any:
        return await world.queues[queue].heartbeat(asker, "env_one", first.work.id, expected=expected, desired_ttl=None)

    beats = await asyncio.gather(beat(holder, NO_HEARTBEAT), beat(holder, NO_HEARTBEAT, 1), return_exceptions=True)
    assert sum(isinstance(one, PreconditionFailed) for one in beats) == 1
    active = next(one for one in beats if not isinstance(one, BaseException))
    assert (active.work.state, active.to_wire()["ttl_seconds"]) == (ACTIVE, 60)
    await world.clock.advance(61)
    assert not (await world.ring.authenticate(token_of(first))).worker.live  # type: ignore[union-attr]
    second = await world.poll(1)
    assert second is not None
    assert (second.work.id, second.work.state) == (first.work.id, QUEUED)
    with pytest.raises(PreconditionFailed):
        await beat(holder, str(active.work.last_heartbeat))
    with pytest.raises(Conflict):
        await world.queues[0].stop(holder, "env_one", first.work.id, force=True)
    await world.queues[1].ack(key, "env_one", first.work.id)
    other = await world.ring.authenticate(token_of(second))
    assert other.worker is not None
    assert other.worker.live
    assert (await beat(other, NO_HEARTBEAT)).extended
    await world.queues[0].stop(other, "env_one", first.work.id, force=True)
    assert not (await world.ring.authenticate(token_of(second))).worker.live  # type: ignore[union-attr]
    assert not (await beat(other, NO_HEARTBEAT)).extended, "it is told that the item is stopped"


async def test_invented_changed_and_revoked_credentials_open_nothing(world: World) -> None:
    await world.session()
    token = token_of(await world.poll())
    wrong = [_other_at(token, -9), token.replace("-1-", "-2-"), "sk-work-x-1-" + "A" * 43]
    wrong += [_other_at(world.key, -9), "sk-env-", "sk-env-1-" + "A" * 43]
    for one in wrong:
        with pytest.raises(AuthenticationFailed):
            await world.ring.authenticate(one)
    other_pepper = WorkerRing(world.db, Pepper(b"q" * 32), world.clock)
    for one in (token, world.key):
        with pytest.raises(AuthenticationFailed):
            await other_pepper.authenticate(one)
    async with world.db.transaction() as tx:
        await revoke_environment_key(tx, BOSS, world.scribe, world.key_id)
    with pytest.raises(AuthenticationFailed, match="revoked"):
        await world.ring.authenticate(world.key)
    async with world.db.transaction() as tx:
        soon = world.clock.now().replace(microsecond=0).replace(year=world.clock.now().year + 1)
        made = await create_environment_key(tx, BOSS, world.scribe, PEPPER, "env_one", name="x", expires_at=soon)
    assert (await world.ring.authenticate(made.secret)).worker is not None
    world.clock.jump((soon - world.clock.now()).total_seconds())
    with pytest.raises(AuthenticationFailed, match="expired"):
        await world.ring.authenticate(made.secret)
