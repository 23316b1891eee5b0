"""Who holds a session: one of many that race, nobody's while its holder is dead, never a write by who lost it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from claude_wrapper.errors import HeldElsewhere, LeaseLost, NotFound
from claude_wrapper.ids import RandomIds
from claude_wrapper.sessions import records
from claude_wrapper.sessions.eventlog import EventLog
from claude_wrapper.sessions.ownership import Ownership
from claude_wrapper.sessions.sessionfields import NewSession
from claude_wrapper.storage import Database
from claude_wrapper.storage.state import MemoryState
from claude_wrapper.storage.tables.replicas import replicas
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.orgs import create_organization
from claude_wrapper.tenancy.principal import Principal, operator, user_principal
from claude_wrapper.tenancy.scopes import Role
from claude_wrapper.testing.clock import ManualClock

pytestmark = pytest.mark.anyio


async def a_session(db: Database, clock: Any) -> tuple[Principal, str]:
    ids = RandomIds()
    async with db.transaction() as tx:
        org = await create_organization(tx, operator(user_id="u"), Scribe(clock, ids), "Acme")
        principal = user_principal(org.id, "u", Role.OWNER)
        row = NewSession(agent={"name": "a", "model": {"id": "m"}}).row(principal, "sesn_1", "sthr_1", clock.now())
        await records.insert_session(tx, row)
    return principal, "sesn_1"


async def die(db: Database, replica: str) -> None:
    """Its row is as old as its lease."""
    async with db.transaction() as tx:
        await tx.execute(sa.update(replicas).where(replicas.c.id == replica).values(expires_at=1))


async def test_of_many_that_take_a_session_at_once_one_gets_it(database: Database) -> None:
    clock = ManualClock()
    principal, session = await a_session(database, clock)
    many = [Ownership(database, clock, replica=f"r{n}", address=f"http://r{n}") for n in range(6)]
    found = await asyncio.gather(*(one.take(principal, session) for one in many * 2), return_exceptions=True)
    fences = [one for one in found if isinstance(one, int)]
    refused = [one for one in found if isinstance(one, HeldElsewhere)]
    assert fences == [1, 1], "one replica, asked twice at once, has one fence"
    assert len(refused) == 10
    winner = next(one for one in many if one.holds(session))
    assert {(one.holder, one.address) for one in refused} == {(winner.replica, winner.address)}


async def test_a_dead_holders_session_is_taken_and_its_late_writes_are_refused(database: Database) -> None:
    clock = ManualClock()
    principal, session = await a_session(database, clock)
    log = EventLog(database, MemoryState(clock), clock, RandomIds())
    old, new = (Ownership(database, clock, replica=name) for name in ("old", "new"))
    lost: list[tuple[str, int]] = []
    old.on_lost = lambda one, fence: lost.append((one, fence))
    before = await old.take(principal, session)
    with pytest.raises(HeldElsewhere):
        await new.take(principal, session)
    await die(database, "old")
    after = await new.take(principal, session)
    assert after > before
    event = {"type": "session.error"}
    for write in (
        lambda tx: log.write(tx, principal, session, [event], fence=before),
        lambda tx: records.guard(tx, principal, session, before),
        lambda tx: records.get_held(tx, principal, session, before),
    ):
        with pytest.raises(LeaseLost):
            async with database.transaction() as tx:
                await write(tx)
    async with database.transaction() as tx:
        await log.write(tx, principal, session, [event], fence=after)
        await records.guard(tx, principal, session, after)
    assert await log.last_seq(principal, session) == 1
    # It was paused, wakes up, and learns of its loss at its next renewal; being alive again gives nothing back.
    await old.renew()
    assert lost == [(session, before)]
    assert not old.holds(session)
    with pytest.raises(HeldElsewhere):
        await old.take(principal, session)


async def test_what_is_given_back_is_free_at_once_and_only_then(database: Database) -> None:
    clock = ManualClock()
    principal, session = await a_session(database, clock)
    one, other = (Ownership(database, clock, replica=name) for name in ("one", "other"))
    fence = await one.take(principal, session)
    assert one.release(session, fence - 1) is None
    leaving = one.release(session, fence)
    assert leaving is not None
    again = await one.take(principal, session)  # waits for what is under way
    assert again == fence + 1
    await one.close()
    assert await other.take(principal, session) == fence + 2
    await other.forget_replica("other")  # its data directory is locked by somebody else: it is dead
    assert await one.take(principal, session) == fence + 3
    with pytest.raises(NotFound):
        await one.take(principal, "sesn_none")


async def test_a_holder_that_was_late_but_lost_nothing_goes_on(database: Database) -> None:
    clock = ManualClock()
    principal, session = await a_session(database, clock)
    own = Ownership(database, clock, replica="own", lease_seconds=10)
    lost: list[str] = []
    own.on_lost = lambda one, _fence: lost.append(one)
    fence = await own.take(principal, session)
    await die(database, "own")
    await own.renew()
    assert lost == []
    assert own.certain
    assert await own.take(principal, session) == fence
