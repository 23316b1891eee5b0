"""Two replicas, real processes: whoever is asked, one of them holds the session; one dies, the other goes on."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import pytest

from claude_wrapper.storage import Database, migrations
from claude_wrapper.testing.upstream import ScriptedUpstream
from managed.driving import history, message, new_session, say, texts, turn, until_idle
from replicas import Replica, ready, replica

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]
MODEL = "claude-sonnet-5-5"


@dataclass
class World:
    """Two replicas and what they share."""

    replicas: list[Replica]
    upstream: ScriptedUpstream
    stack: AsyncExitStack
    directory: Path
    shared: dict[str, Any]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    async def another(self) -> Replica:
        """One more replica."""
        directory = self.directory / f"replica{next(self.numbers)}"
        one = await self.stack.enter_async_context(replica(directory, self.upstream, **self.shared))
        self.replicas.append(one)
        return one


@pytest.fixture
async def world(empty_postgres_url: str, redis_url: str, reachable_tmp_path: Path) -> AsyncIterator[World]:
    db = Database(empty_postgres_url)
    await migrations.migrate(db)
    await db.close()
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(ScriptedUpstream())
        shared = {"database_url": empty_postgres_url, "redis_url": redis_url}
        made = World([], upstream, stack, reachable_tmp_path, shared)
        await asyncio.gather(made.another(), made.another())
        yield made


@dataclass
class Answered:
    """A turn's answer."""

    headers: Mapping[str, str]
    text: str


async def say_named(client: anthropic.AsyncAnthropic, text: str, name: str = "chat", **headers: str) -> Answered:
    """One turn of a named conversation."""
    raw = await client.messages.with_raw_response.create(
        model=MODEL,
        max_tokens=100,
        messages=[{"role": "user", "content": text}],
        extra_body={"session_id": name},
        extra_headers=headers,
    )
    said = await raw.parse()
    return Answered(raw.headers, "".join(block.text for block in said.content))


async def test_one_of_two_that_race_holds_the_session_and_the_other_forwards(world: World) -> None:
    async with world.replicas[0].sdk() as one, world.replicas[1].sdk() as other:
        # Both start on an empty database at once, and are asked for the same new name at once.
        answers = await asyncio.gather(*(say_named(client, f"number {n}") for n in range(3) for client in (one, other)))
        assert len({answer.headers["cw-session-id"] for answer in answers}) == 1
        assert len({answer.headers["cw-process-pid"] for answer in answers}) == 1
        forwarded = [answer for answer in answers if "cw-forwarded" in answer.headers]
        assert len(forwarded) == 3, "one replica holds it, the other forwards all of its own"
        there = other if "cw-forwarded" in answers[1].headers else one
        text = (await say_named(there, "[[recall]]")).text
        assert all(text.count(f'"number {n}"') == 2 for n in range(3)), text
        # Streams pass piece by piece, and a caller that hangs up is hung up on at the holder.
        async with there.messages.stream(
            model=MODEL,
            max_tokens=100,
            messages=[{"role": "user", "content": "[[hang 2]]"}],
            extra_body={"session_id": "chat"},
        ) as stream:
            async for _ in stream.text_stream:
                break
        async with asyncio.timeout(20):
            hung = next(call for call in world.upstream.calls if call.text == "[[hang 2]]")
            await hung.wait_done()
        assert hung.cancelled
        assert "number 1" in (await say_named(one, "[[recall]]")).text
        forged = {"cw-forwarded": "1.00"}
        assert (await say_named(there, "hi", **forged)).text, "who cannot sign is a caller like any other"


async def test_a_killed_holders_turns_go_on_and_are_said_once(world: World) -> None:
    old, new = world.replicas
    async with old.sdk() as before, new.sdk() as after:
        session = (await new_session(before)).id
        await turn(before, session, message("remember the plum"))
        await say_named(before, "remember the fig")
        seen: list[Any] = []
        named = asyncio.ensure_future(
            say_named(after, "[[recall]] [[hang 1]] [[once]] named")
        )  # forwarded to the old one
        async with await before.beta.sessions.events.stream(session) as stream:
            await say(before, session, "[[recall]] [[hang 1]] [[once]]")
            await world.upstream.wait_for(4)
            async for event in stream:
                seen.append(event)
                if event.type == "span.model_request_start":
                    old.signal(signal.SIGKILL)
                    break
        cursor = len(await history(after, session))
        async with await after.beta.sessions.events.stream(
            session, extra_headers={"last-event-id": str(cursor)}
        ) as stream:
            rest = await until_idle(stream, 60)
        log = await history(after, session)
        assert [one.id for one in log[:cursor]] + [one.id for one in rest] == [one.id for one in log]
        assert len({one.id for one in log}) == len(log)
        said = [text for text in texts(log) if "[[" not in text and "remember the plum" in text]
        assert len(said) == 2, "the first turn's answer, and the second's, each once"
        assert [one.type for one in log].count("session.status_rescheduled") == 1
        assert [one.type for one in log].count("user.message") == 2
        assert not [one for one in log if one.type == "session.error"]
        assert "remember the fig" in (await named).text
        asked = [call for call in world.upstream.calls if "[[once]]" in call.text]
        assert len(asked) <= 4, "each asked twice at most: before its server died, and after"


async def test_a_holder_that_was_paused_past_its_lease_writes_nothing(world: World) -> None:
    old, new = world.replicas
    # One that was paused takes its lateness for overload at first and says 529: the SDK tries again.
    async with old.sdk(max_retries=8) as before, new.sdk() as after:
        session = (await new_session(before)).id
        async with await before.beta.sessions.events.stream(session) as stream:
            await say(before, session, "[[delay 100]] [[tokens 30]]")
            async for event in stream:
                if event.type == "span.model_request_start":
                    old.signal(signal.SIGSTOP)
                    break
        cursor = len(await history(after, session))
        async with await after.beta.sessions.events.stream(
            session, extra_headers={"last-event-id": str(cursor)}
        ) as stream:
            await until_idle(stream, 60)
        log = [one.id for one in await history(after, session)]
        old.signal(signal.SIGCONT)
        # The old holder finds out: asked for the session, it sends the request to the new one.
        async with asyncio.timeout(30):
            await before.beta.sessions.retrieve(session)
            events = await turn(before, session, message("[[recall]]"))
        assert "tokens 30" in texts(events)[0]
        after_all = await history(after, session)
        assert [one.id for one in after_all[: len(log)]] == log
        assert len(texts(after_all)) == 2
        assert "session.error" not in [one.type for one in after_all]


async def test_a_caller_of_a_holder_that_was_paused_past_its_lease_is_answered_by_the_new_one(world: World) -> None:
    old, new = world.replicas
    async with old.sdk() as before, new.sdk() as after:
        await say_named(before, "remember the fig")
        waiting = asyncio.ensure_future(say_named(before, "[[delay 300]] [[tokens 30]]"))
        await world.upstream.wait_for(2)
        old.signal(signal.SIGSTOP)
        assert (await say_named(after, "[[say meanwhile]]")).text == "meanwhile", "taken when the lease is over"
        old.signal(signal.SIGCONT)
        async with asyncio.timeout(40):
            assert (await waiting).text, "not cut short: it was said again where the session is now"
        told = (await say_named(after, "[[recall]]")).text
        assert [told.count(one) for one in ("remember the fig", "meanwhile", "tokens 30")] == [1, 1, 1]


async def test_a_rolling_restart_under_load_fails_no_request(world: World) -> None:
    done: list[int] = []
    stop = asyncio.Event()

    async def ask(worker: int, number: int) -> None:
        """As a client behind a load balancer that heeds /readyz, with the SDK's own retries."""
        for _ in range(20):
            for one in world.replicas[worker % 2 :] + world.replicas[: worker % 2]:
                if not await ready(one.url):
                    continue
                async with one.sdk(max_retries=0) as client:
                    try:
                        answer = await say_named(client, f"turn {number}", f"chat-{worker}")
                    except anthropic.APIConnectionError:
                        continue
                    except anthropic.APIStatusError as error:
                        if error.status_code != 503:
                            raise
                        continue
                    assert f"turn {number}" in answer.text
                    done.append(number)
                    return
            await asyncio.sleep(0.1)
        raise AssertionError("no replica answered")

    async def work(worker: int) -> None:
        number = 0
        while not stop.is_set():
            await ask(worker, number)
            number += 1

    workers = [asyncio.ensure_future(work(n)) for n in range(4)]
    for at in range(2):
        old = world.replicas[at]
        await world.another()
        before = len(done)
        old.signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await old.gone() == 0
            while len(done) < before + 4:
                await asyncio.wait(workers, timeout=0.1)
                assert not [one for one in workers if one.done()]
    stop.set()
    await asyncio.gather(*workers)
    async with world.replicas[2].sdk() as client:
        text = (await say_named(client, "[[recall]]", "chat-0")).text
        assert text.count("turn ") == len({part for part in text.split('"') if part.startswith("turn ")}), "none twice"
