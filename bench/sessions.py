"""The event log: appended and fanned out, replayed, listed. `python -m bench.sessions [--quick] [--events N] …`.

SQLite in a temporary directory and shared state in memory, in this process: what the log itself costs, without HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from typing import Any

import sqlalchemy as sa

from claude_wrapper.clock import SystemClock
from claude_wrapper.ids import RandomIds
from claude_wrapper.sessions import records
from claude_wrapper.sessions.eventlog import EventLog, InFlight
from claude_wrapper.sessions.sessionfields import NewSession
from claude_wrapper.storage import Database, migrations
from claude_wrapper.storage.pagination import PageRequest
from claude_wrapper.storage.state import MemoryState
from claude_wrapper.storage.tables.sessions import session_events, sessions
from claude_wrapper.tenancy import orgs
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.principal import Principal, operator, user_principal
from claude_wrapper.tenancy.scopes import Role
from claude_wrapper.wire.managed import Delta


def _message(number: int) -> dict[str, Any]:
    return {"type": "agent.message", "content": [{"type": "text", "text": f"message {number} " + "x" * 200}]}


async def _session(db: Database, principal: Principal, name: str) -> None:
    row = NewSession(agent={"name": "bench", "model": {"id": "m"}}).row(principal, name, "sthr", SystemClock().now())
    async with db.transaction() as tx:
        await records.insert_session(tx, row)


async def _fan_out(log: EventLog, principal: Principal, events: int, streams: int) -> dict[str, float]:
    """One writer, many streams: events written per second, and events delivered per second."""

    async def follow(ready: asyncio.Event) -> None:
        stream = log.stream(principal, "sesn_fan")
        await anext(stream)
        ready.set()
        for _ in range(events):
            await anext(stream)
        await stream.aclose()

    readies = [asyncio.Event() for _ in range(streams)]
    followers = [asyncio.ensure_future(follow(ready)) for ready in readies]
    await asyncio.gather(*(ready.wait() for ready in readies))
    began = time.perf_counter()
    for number in range(events):
        await log.append(principal, "sesn_fan", [_message(number)])
    written = time.perf_counter() - began
    await asyncio.gather(*followers)
    delivered = time.perf_counter() - began
    return {
        "appended_per_second": events / written,
        "delivered_per_second": events * streams / delivered,
        "streams": streams,
    }


async def _deltas(log: EventLog, principal: Principal, count: int, streams: int) -> dict[str, float]:
    """What a delta costs, to publish and to deliver to each stream."""

    async def follow(ready: asyncio.Event) -> None:
        stream = log.stream(principal, "sesn_fan", previews=True)
        await anext(stream)
        ready.set()
        for _ in range(count + 1):
            await anext(stream)
        await stream.aclose()

    readies = [asyncio.Event() for _ in range(streams)]
    followers = [asyncio.ensure_future(follow(ready)) for ready in readies]
    await asyncio.gather(*(ready.wait() for ready in readies))
    await asyncio.sleep(0)
    inflight = InFlight(log, "sesn_fan")
    began = time.perf_counter()
    await inflight.show([Delta("sevt_x", "agent.message", start=True)])
    for at in range(count):
        await inflight.show([Delta("sevt_x", "agent.message", "word ", at * 5)])
        if at % 50 == 0:
            await asyncio.sleep(0)
    await asyncio.gather(*followers)
    seconds = time.perf_counter() - began
    return {"microseconds_per_delta_and_stream": seconds * 1e6 / count / streams}


async def _replay(log: EventLog, principal: Principal, events: int) -> dict[str, float]:
    for at in range(0, events, 500):
        await log.append(principal, "sesn_replay", [_message(at + number) for number in range(500)])
    began = time.perf_counter()
    stream = log.stream(principal, "sesn_replay", after=0)
    await anext(stream)
    for _ in range(events):
        await anext(stream)
    await stream.aclose()
    return {"events": events, "replay_seconds": time.perf_counter() - began}


async def _fill(db: Database, principal: Principal, events: int, *, per_session: int = 500, name: str = "old") -> None:
    """Store so many events of other sessions, in bulk."""
    now = SystemClock().now()
    body = json.dumps(_message(0)).encode()
    made = -(-events // per_session)
    for first in range(0, made, 50):
        names = [f"sesn_{name}{number:06}" for number in range(first, min(first + 50, made))]
        new = NewSession(agent={"name": "bench", "model": {"id": "m"}})
        rows = [
            {
                "session_id": one,
                "seq": seq,
                "org_id": principal.org,
                "id": f"sevt_{one}_{seq}",
                "type": "agent.message",
                "body": body,
                "written_at": now,
                "processed_at": now,
            }
            for one in names
            for seq in range(1, per_session + 1)
        ]
        async with db.transaction() as tx:
            sessions_rows = [{**new.row(principal, one, "sthr", now), "last_seq": per_session} for one in names]
            await tx.execute(sa.insert(sessions), sessions_rows)
            await tx.execute(sa.insert(session_events), rows)


async def _lists(db: Database, log: EventLog, principal: Principal) -> dict[str, float]:
    async def timed(work: Any) -> float:
        took = []
        for _ in range(20):
            began = time.perf_counter()
            await work()
            took.append(time.perf_counter() - began)
        return statistics.median(took) * 1000

    async def page() -> None:
        async with db.read() as tx:
            await records.list_sessions(tx, principal, records.Filter(), PageRequest(20))

    return {
        "list_sessions_ms": await timed(page),
        "list_events_ms": await timed(lambda: log.read(principal, "sesn_replay", after=5000, limit=100)),
    }


async def measure(events: int, streams: int, replayed: int, stored: int) -> dict[str, dict[str, float]]:
    """All figures; `stored`: events of other sessions before the lists are read for the second time."""
    clock, ids = SystemClock(), RandomIds()
    with tempfile.TemporaryDirectory() as directory:
        db = Database(f"sqlite:///{directory}/bench.db")
        await migrations.migrate(db)
        async with db.transaction() as tx:
            made = await orgs.create_organization(tx, operator(user_id="user_bench"), Scribe(clock, ids), "Bench")
        principal = user_principal(made.id, "user_bench", Role.OWNER)
        log = EventLog(db, MemoryState(clock), clock, ids)
        for name in ("sesn_fan", "sesn_replay"):
            await _session(db, principal, name)
        try:
            found = {
                "fan_out": await _fan_out(log, principal, events, streams),
                "deltas": await _deltas(log, principal, events, streams),
                "replay": await _replay(log, principal, replayed),
            }
            # The same number of sessions on a page both times; only how much lies around them differs.
            await _fill(db, principal, 20 * 50, per_session=50, name="few")
            small = await _lists(db, log, principal)
            await _fill(db, principal, stored)
            return {**found, "lists_of_little": small, f"lists_with_{stored}_events": await _lists(db, log, principal)}
        finally:
            await db.close()


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--replayed", type=int, default=10_000)
    parser.add_argument("--stored", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="fewer of everything")
    asked = parser.parse_args()
    if asked.quick:
        asked.events, asked.replayed, asked.stored = 200, 10_000, 50_000
    found = asyncio.run(measure(asked.events, asked.streams, asked.replayed, asked.stored))
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
