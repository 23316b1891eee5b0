"""The event log and its streams, against a scripted writer: nothing is lost, nothing comes twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.sessions import eventlog, records
from claude_wrapper.sessions.eventlog import EventLog, InFlight, Opened, Preview, SlowReader, Stored, answering
from claude_wrapper.sessions.sessionfields import NewSession
from claude_wrapper.storage.state import SharedState
from claude_wrapper.wire.managed import Delta
from tenants import CountingIds, World, hand_clock, world

__all__ = ["hand_clock", "world"]
pytestmark = pytest.mark.anyio

SESSION = "sesn_test"


@pytest.fixture
async def log(world: World, shared_state: SharedState) -> EventLog:
    """A log with one session, on SQLite and Postgres, over memory and Redis."""
    row = NewSession(agent={"name": "a", "model": {"id": "m"}}).row(world.ours, SESSION, "sthr_1", world.clock.now())
    async with world.db.transaction() as tx:
        await records.insert_session(tx, row)
    return EventLog(world.db, shared_state, world.clock, CountingIds())


def event(number: int, kind: str = "agent.thinking", **fields: Any) -> dict[str, Any]:
    return {"type": kind, "number": number, **fields}


async def take(stream: AsyncIterator[Any], count: int) -> list[Any]:
    async with asyncio.timeout(20):
        return [await anext(stream) for _ in range(count)]


async def test_numbers_have_no_gaps_whoever_writes(log: EventLog, world: World) -> None:
    async with asyncio.timeout(30):
        await asyncio.gather(*(log.append(world.ours, SESSION, [event(at), event(at)]) for at in range(20)))
    assert [one.seq for one in await log.read(world.ours, SESSION)] == list(range(1, 41))


async def test_a_batch_that_fails_leaves_no_number_behind(log: EventLog, world: World) -> None:
    await log.append(world.ours, SESSION, [event(1)])

    async def fail() -> None:
        async with world.db.transaction() as tx:
            await log.write(tx, world.ours, SESSION, [event(2)])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    await log.append(world.ours, SESSION, [event(3)])
    assert [(one.seq, one.json()["number"]) for one in await log.read(world.ours, SESSION)] == [(1, 1), (2, 3)]


async def test_others_neither_read_nor_write_nor_follow(log: EventLog, world: World) -> None:
    await log.append(world.ours, SESSION, [event(1)])
    assert await log.read(world.theirs, SESSION) == []
    with pytest.raises(NotFound):
        await log.append(world.theirs, SESSION, [event(2)])
    with pytest.raises(NotFound):
        await anext(log.stream(world.theirs, SESSION))


async def test_a_stream_replays_then_follows_without_a_seam(log: EventLog, world: World) -> None:
    await log.append(world.ours, SESSION, [event(at) for at in range(5)])
    stream = log.stream(world.ours, SESSION, after=2)
    assert await anext(stream) == Opened(5)
    writing = asyncio.gather(*(log.append(world.ours, SESSION, [event(at)]) for at in range(10)))
    items = await take(stream, 13)
    await writing
    assert [one.seq for one in items] == list(range(3, 16))
    await stream.aclose()


async def test_a_stream_without_a_place_begins_with_what_happens_next(log: EventLog, world: World) -> None:
    await log.append(world.ours, SESSION, [event(1)])
    stream = log.stream(world.ours, SESSION)
    assert await anext(stream) == Opened(1)
    await log.append(world.ours, SESSION, [event(2)])
    assert [one.seq for one in await take(stream, 1)] == [2]
    await stream.aclose()


async def test_a_place_in_the_future_is_refused(log: EventLog, world: World) -> None:
    with pytest.raises(InvalidRequest, match="newest event is 0"):
        await anext(log.stream(world.ours, SESSION, after=1))


async def test_a_lost_message_is_made_up_for_by_the_next(log: EventLog, world: World) -> None:
    stream = log.stream(world.ours, SESSION)
    await anext(stream)
    async with world.db.transaction() as tx:
        await log.write(tx, world.ours, SESSION, [event(1)])  # never published
    await log.append(world.ours, SESSION, [event(2)])
    assert [one.seq for one in await take(stream, 2)] == [1, 2]
    await stream.aclose()


async def test_a_lost_last_message_is_found_after_a_silence(
    log: EventLog, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eventlog, "SILENCE_SECONDS", 0.05)
    stream = log.stream(world.ours, SESSION)
    await anext(stream)
    async with world.db.transaction() as tx:
        await log.write(tx, world.ours, SESSION, [event(1)])
    assert [one.seq for one in await take(stream, 1)] == [1]
    await stream.aclose()


async def test_batches_too_large_for_the_channel_arrive_whole(log: EventLog, world: World) -> None:
    stream = log.stream(world.ours, SESSION)
    await anext(stream)
    text = "x" * (eventlog.INLINE_BYTES + 1)
    await log.append(world.ours, SESSION, [event(1, text=text), event(2)])
    items = await take(stream, 2)
    assert [len(one.json().get("text", "")) for one in items] == [len(text), 0]
    await stream.aclose()


async def test_a_reader_that_is_too_slow_is_cut_off_and_comes_back_without_loss(
    log: EventLog, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eventlog, "BUFFER", 5)
    stream = log.stream(world.ours, SESSION)
    await anext(stream)
    for at in range(10):
        await log.append(world.ours, SESSION, [event(at)])
    await asyncio.sleep(0.1)  # let Redis deliver to a buffer that nobody reads
    seen = []

    async def read() -> None:
        async for item in stream:
            seen.append(item.seq)

    with pytest.raises(SlowReader):
        await asyncio.wait_for(read(), 20)
    back = log.stream(world.ours, SESSION, after=seen[-1] if seen else 0)
    await anext(back)
    seen += [one.seq for one in await take(back, 10 - len(seen))]
    assert seen == list(range(1, 11))
    await back.aclose()


async def test_a_late_joiner_gets_what_was_shown_of_the_message_in_flight(
    log: EventLog, world: World, shared_state: SharedState
) -> None:
    inflight = InFlight(log, SESSION)
    async with answering(shared_state, inflight, SESSION):
        await inflight.show([Delta("sevt_m", "agent.message", start=True), Delta("sevt_m", "agent.message", "one ")])
        stream = log.stream(world.ours, SESSION, previews=True)
        await anext(stream)
        first = await take(stream, 2)
        await inflight.show([Delta("sevt_m", "agent.message", "two", 4)])
        second = await take(stream, 1)
    assert first[0].delta.start
    assert [item.delta.text for item in (*first[1:], *second)] == ["one ", "two"]
    await stream.aclose()


async def test_the_end_of_a_session_ends_its_streams(log: EventLog, world: World) -> None:
    stream = log.stream(world.ours, SESSION)
    await anext(stream)
    await log.append(world.ours, SESSION, [event(1, "session.deleted")])
    async with asyncio.timeout(20):
        assert [item.type async for item in stream] == ["session.deleted"]


async def test_a_client_cut_off_a_hundred_times_ends_with_exactly_what_was_written(
    log: EventLog, world: World, shared_state: SharedState
) -> None:
    """A writer streams messages; a reader is cut off at random places, also within a message, and resumes."""
    chance = random.Random(20261120)
    inflight = InFlight(log, SESSION)
    texts: dict[str, str] = {}
    goal = 120

    async def write() -> None:
        for number in range(goal):
            message = f"sevt_m{number}"
            words = [f"{number}.{at} " for at in range(chance.randint(1, 6))]
            texts[message] = "".join(words)
            await inflight.show([Delta(message, "agent.message", start=True)])
            at = 0
            for word in words:
                await inflight.show([Delta(message, "agent.message", word, at)])
                at += len(word)
                await asyncio.sleep(0.001)
            content = [{"type": "text", "text": texts[message]}]
            stored = await log.append(
                world.ours, SESSION, [{"type": "agent.message", "id": message, "content": content}]
            )
            inflight.done(one.id for one in stored)
            await log.append(world.ours, SESSION, [event(number)])

    seen: list[Stored] = []
    joined: dict[str, str] = {}

    def note(item: Opened | Stored | Preview) -> None:
        match item:
            case Stored():
                seen.append(item)
            case Preview(_, delta):
                joined[delta.event_id] = delta.text if delta.start else joined[delta.event_id] + delta.text
            case _:
                pass

    async def read_a_while(pieces: int) -> None:
        stream = log.stream(world.ours, SESSION, after=seen[-1].seq if seen else 0, previews=True)
        async for item in stream:
            note(item)
            pieces -= 1
            if pieces <= 0 or len(seen) == 2 * goal:
                break
        await stream.aclose()

    async with asyncio.timeout(240), answering(shared_state, inflight, SESSION):
        writing = asyncio.ensure_future(write())
        cuts = 0
        while len(seen) < 2 * goal:
            await read_a_while(chance.randint(1, 4))
            cuts += 1
        await writing
    assert cuts >= 100
    assert [one.seq for one in seen] == list(range(1, 2 * goal + 1))
    assert len({one.id for one in seen}) == len(seen)
    assert joined == texts
