"""A client on a bad line: cut off at random points, it comes back with `Last-Event-ID` and loses and doubles nothing."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from anthropic import AsyncAnthropic

from managed.driving import history, message, new_session
from running_server import Running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

CUTS = 100
TURNS = 24


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server(shared_server: Running) -> Running:
    return shared_server


@dataclass
class Reader:
    """What a client has of a session."""

    events: list[dict[str, Any]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    last: str | None = None

    def take(self, number: str | None, event: dict[str, Any]) -> None:
        """One event of the stream."""
        match event["type"]:
            case "event_start":
                self.texts[event["event"]["id"]] = ""
            case "event_delta":
                self.texts[event["event_id"]] += event["delta"]["content"]["text"]
            case _:
                self.events.append(event)
                self.last = number


async def _frames(server: Running, session: str, last: str | None) -> AsyncIterator[tuple[str | None, dict[str, Any]]]:
    headers = {} if last is None else {"last-event-id": last}
    path = f"/v1/sessions/{session}/events/stream?event_deltas[]=agent.message" + ("&after=0" if last is None else "")
    async with server.http.get(path, headers=headers) as response:
        assert response.status == 200, await response.text()
        fields: dict[str, str] = {}
        async for line in response.content:
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name:
                fields[name] = value
            elif fields:
                yield fields.get("id"), json.loads(fields["data"])
                fields = {}


async def test_a_client_cut_off_a_hundred_times_has_every_event_once_and_every_text_whole(
    server: Running, client: AsyncAnthropic
) -> None:
    chance = random.Random(20261127)
    session = (await new_session(client)).id
    said = [message(f"[[tokens {chance.randint(5, 40)}]]") for _ in range(TURNS)]
    await client.beta.sessions.events.send(session, events=said)
    reader, cuts = Reader(), 0

    def over() -> bool:
        asked = sum(one["type"] == "user.message" for one in reader.events)
        return asked == TURNS and reader.events[-1]["type"] == "session.status_idle"

    async with asyncio.timeout(240):
        while not over():
            left = chance.randint(1, 2) if cuts < CUTS else -1
            frames = _frames(server, session, reader.last)
            async for number, event in frames:
                reader.take(number, event)
                left -= 1
                if left == 0 or over():
                    break
            await frames.aclose()  # type: ignore[attr-defined]
            cuts += 1
    assert cuts >= CUTS
    written = [json.loads(one.to_json()) for one in await history(client, session)]
    assert [one["id"] for one in reader.events] == [one["id"] for one in written]
    whole = {one["id"]: one["content"][0]["text"] for one in written if one["type"] == "agent.message"}
    assert len(whole) == TURNS
    assert reader.texts == whole
