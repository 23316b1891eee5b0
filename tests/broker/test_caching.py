"""Answers that are given again: which, to whom, under which key, as what, and what the books say of them."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.world import Process, World, binding, credential, request_body, turn
from claude_wrapper.broker.calls import CacheTerms, CacheUse, Standby
from claude_wrapper.broker.keeping import Caching, Ways, answer_may_be_kept, canonical_body, key_of
from claude_wrapper.broker.policy import Kind, Route
from claude_wrapper.storage.cache import Bounds, Cache, MemoryStore
from claude_wrapper.testing.clock import ManualClock
from claude_wrapper.vault.envelope import DataKeys
from claude_wrapper.vault.sealedcache import Partners, SealedCache

ROUTE = Route(Kind.MESSAGES, "/v1/messages", "beta=true")
ASKED, DETERMINISTIC = CacheTerms(Ways.ASKED, 60), CacheTerms(Ways.DETERMINISTIC, 60)


class Keys:
    """Data keys made of the organisation's name."""

    async def of(self, org: str, *, opening: bytes | None = None) -> DataKeys:
        return DataKeys(org, {1: hashlib.sha256(org.encode()).digest()})

    present = of


class Everybody:
    """`org_1`, `org_2` and `org_3` share with each other."""

    async def mutual(self, org: str) -> tuple[str, ...]:
        return tuple(f"org_{number}" for number in (1, 2, 3) if org != f"org_{number}")

    named = mutual


def caching(store: MemoryStore, clock: Any, partners: Partners | None = None) -> Caching:
    def named(name: str) -> SealedCache:
        return SealedCache(Cache(name, store, clock), Keys(), clock, partners)  # type: ignore[arg-type]

    return Caching(named("upstream"), named("token_count"), named("models"), 60, 60)


# Which ----------------------------------------------------------------------------------------------------------------


def kept(body: dict[str, Any], terms: CacheTerms, use: CacheUse | None = None, *, main: bool = True) -> bool:
    return answer_may_be_kept(terms, json.dumps(body).encode(), use=use, main=main)


def test_only_what_is_the_same_each_time_or_was_asked_for_is_kept() -> None:
    cold, tool = request_body(temperature=0), {"name": "t", "input_schema": {}}
    summary = "Your task is to create a detailed summary of the conversation so far."
    assert not kept(cold, ASKED)
    assert kept(cold, ASKED, CacheUse.USE)
    assert not kept(cold, ASKED, CacheUse.USE, main=False)  # the turn's word is not about what the CLI asks beside it
    assert not kept(cold, CacheTerms(Ways.OFF, 60), CacheUse.USE)
    assert kept(cold, DETERMINISTIC)
    assert not kept(request_body(), DETERMINISTIC)
    assert not kept(request_body(temperature=0.1), DETERMINISTIC)
    assert not kept(cold | {"tools": [tool]}, DETERMINISTIC)
    assert kept(request_body(summary, tools=[tool]), DETERMINISTIC, main=False)
    assert not kept(request_body(summary), DETERMINISTIC)  # said by the caller: an ordinary request


# Under which key ------------------------------------------------------------------------------------------------------

_TEXT = st.text(max_size=5)
_MARK = st.sampled_from([{}, {"cache_control": {"type": "ephemeral"}}])
_BLOCKS = st.lists(st.tuples(_TEXT, _MARK).map(lambda both: {"type": "text", "text": both[0], **both[1]}), max_size=3)
_BODIES = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["m1", "m2"]),
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": _TEXT | _BLOCKS}),
            max_size=3,
        ),
        "max_tokens": st.integers(1, 3),
    },
    optional={
        "temperature": st.sampled_from([0, 1]),
        "system": _BLOCKS,
        "metadata": st.fixed_dictionaries({"user_id": _TEXT}),
        "tools": st.just([]) | st.just([{"name": "t", "input_schema": {"cache_control": 1}}]),
        "stream": st.booleans(),
    },
)


def _key(body: dict[str, Any], url: str = "http://u", **headers: str) -> str | None:
    return key_of(credential(url), ROUTE, list(headers.items()), json.dumps(body).encode())


def _meaning(body: dict[str, Any]) -> Any:
    """What a body says, told independently of the code under test: marks out of text blocks, no metadata."""
    said = json.loads(json.dumps(body))
    said.pop("metadata", None)
    if not said.get("tools"):
        said.pop("tools", None)
    for blocks in [said.get("system"), *(message["content"] for message in said["messages"])]:
        for block in blocks if isinstance(blocks, list) else ():
            block.pop("cache_control", None)
    return said


@given(_BODIES, _BODIES)
def test_two_requests_have_one_key_exactly_if_they_say_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (_key(one) == _key(other)) == (_meaning(one) == _meaning(other))
    assert _key(dict(reversed(one.items()))) == _key(one)
    assert _key(one) != _key(one, "http://elsewhere")
    assert _key(one) != _key(one, **{"anthropic-beta": "other-behaviour"})
    assert _key(one) == _key(one, **{"x-claude-code-session-id": "1", "user-agent": "x"})


def test_who_asks_and_the_clis_billing_line_are_no_part_of_the_key_and_tool_inputs_are() -> None:
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=1;"}
    body = request_body(system=[{"type": "text", "text": "be nice"}])
    assert _key(body) == _key({**body, "system": [billing, *body["system"]], "metadata": {"user_id": "session 7"}})

    def used(argument: dict[str, Any]) -> dict[str, Any]:
        return request_body(
            messages=[{"role": "assistant", "content": [{"type": "tool_use", "name": "t", "input": argument}]}]
        )

    assert _key(used({"cache_control": 1})) != _key(used({"cache_control": 2}))
    assert canonical_body(body)["system"] == body["system"]


# To whom, and as what -------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.anyio


@pytest.fixture
async def caching_world(tmp_path: Path) -> AsyncIterator[tuple[World, MemoryStore]]:
    async with asyncio.timeout(60), World(tmp_path) as world:
        store = MemoryStore(ManualClock(), Bounds())
        made = caching(store, world.clock)
        world.broker._means = dataclasses.replace(world.broker._means, caching=made)
        yield world, store


async def _process(world: World, org: str = "org_1", use: CacheUse | None = CacheUse.USE) -> Process:
    process = await world.process(bound=False)
    bound = binding(world.upstream.url, org=org)
    process.endpoint.bind(dataclasses.replace(bound, credential=dataclasses.replace(bound.credential, cache=ASKED)))
    process.endpoint.begin(turn(cache=use))
    return process


async def _ask(process: Process, text: str = "[[say hi]]", **fields: Any) -> str:
    async with process.post(request_body(text, **fields)) as answer:
        assert answer.status == 200
        return str(await answer.text())


def _events(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


async def test_a_hit_is_a_whole_stream_under_an_id_of_its_own_that_costs_nothing(
    caching_world: tuple[World, MemoryStore],
) -> None:
    world, _ = caching_world
    first, second = await _process(world), await _process(world)
    (noted, again) = (process.endpoint._turn for process in (first, second))
    asked, given_again = _events(await _ask(first)), _events(await _ask(second))
    assert world.upstream.count == 1
    ids = [events[0]["message"].pop("id") for events in (asked, given_again)]
    assert ids[0] != ids[1]
    assert asked == given_again
    (miss,), (hit,) = await first.endpoint.end(), await second.endpoint.end()
    assert (miss.cache_hit, hit.cache_hit, hit.status, hit.attempts, hit.stream_complete) == (False, True, 200, 0, True)
    assert (hit.usage.output_tokens, hit.saved) == (0, miss.usage)
    assert hit.stop_reason == miss.stop_reason == "end_turn"
    assert len(world.books.reserved) == 1
    assert world.books.balanced
    assert [call.cache_hit for call in world.books.recorded] == [False, True]
    assert noted is not None
    assert again is not None
    assert (noted.notes, again.notes) == ({"cw-cache": "miss"}, {"cw-cache": "hit"})


async def test_no_organisation_is_given_what_another_was_answered(caching_world: tuple[World, MemoryStore]) -> None:
    world, store = caching_world
    ours, theirs = await _process(world), await _process(world, org="org_2")
    await _ask(ours)
    await _ask(theirs)
    assert world.upstream.count == 2
    # Nor where the store itself puts one's value in the other's place.
    places = list(store._entries)
    await store.put(places[1], store._entries[places[0]][0], ttl=60)
    await _ask(theirs)
    assert world.upstream.count == 3


async def test_those_who_ask_the_same_at_once_are_one_call(caching_world: tuple[World, MemoryStore]) -> None:
    world, _ = caching_world
    processes = [await _process(world) for _ in range(4)]
    texts = await asyncio.gather(*(_ask(process, "[[first 200]] [[say together]]") for process in processes))
    assert world.upstream.count == 1
    assert len({text.count("text_delta") for text in texts}) == 1
    assert world.books.balanced
    await asyncio.gather(*(process.endpoint.end() for process in processes))
    assert sorted(call.cache_hit for call in world.books.recorded) == [False, True, True, True]


async def test_broken_and_failed_answers_are_not_kept_and_not_shared(caching_world: tuple[World, MemoryStore]) -> None:
    world, store = caching_world
    one, two = await _process(world), await _process(world)

    async def status(process: Process) -> int:
        async with process.post(request_body("[[error 400]]")) as answer:
            await answer.read()
            return int(answer.status)

    assert await asyncio.gather(status(one), status(two)) == [400, 400]
    async with one.post(request_body("[[cut 1]]")) as answer:
        assert answer.status == 200
        with pytest.raises(Exception, match=r"payload|Connection|Response"):
            await answer.read()
    assert await store.size() == 0


async def test_what_a_stand_in_answers_is_not_kept_in_the_place_of_whom_it_stood_in_for(
    caching_world: tuple[World, MemoryStore],
) -> None:
    # Somebody's own credential may lead to a server of theirs, whose answers must not become those of the first upstream.
    world, store = caching_world
    world.upstream.api_keys = {"sk-second"}
    second = credential(world.upstream.url + "/", id="cred_2", secret="sk-second")
    process = await _process(world)
    bound = process.endpoint.binding
    assert bound is not None
    first = dataclasses.replace(bound.credential, standby=Standby(credentials=(second,)))
    await process.endpoint.end()
    process.endpoint.bind(dataclasses.replace(bound, credential=first))
    process.endpoint.begin(turn(cache=CacheUse.REFRESH))
    await _ask(process)
    assert world.upstream.count == 2
    assert await store.size() == 0


async def test_a_request_may_pass_by_the_cache_or_renew_it(caching_world: tuple[World, MemoryStore]) -> None:
    world, _ = caching_world
    for use, count in [(CacheUse.USE, 1), (None, 2), (CacheUse.BYPASS, 3), (CacheUse.REFRESH, 4), (CacheUse.USE, 4)]:
        await _ask(await _process(world, use=use))
        assert world.upstream.count == count, use


async def test_token_counts_are_asked_once_for_the_same_text(caching_world: tuple[World, MemoryStore]) -> None:
    world, _ = caching_world
    process = await _process(world, use=None)
    body = request_body("count me", stream=False)
    found = []
    for messages in (body["messages"], body["messages"], [{"role": "user", "content": "something else"}]):
        async with process.post(body | {"messages": messages}, "/v1/messages/count_tokens?beta=true") as answer:
            found.append(msgspec.json.decode(await answer.read()))
    assert found[0] == found[1]
    assert sum(one.path.endswith("count_tokens") for one in world.upstream.requests) == 2
