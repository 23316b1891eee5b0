"""Answers that another organisation was given: which may be, and what the one that asks is told and billed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.test_caching import Everybody, caching
from broker.world import Process, World, binding, credential, request_body, turn
from claude_wrapper.broker.calls import CacheTerms, CacheUse, CredentialKind
from claude_wrapper.broker.keeping import Ways, may_be_shared
from claude_wrapper.storage.cache import Bounds, MemoryStore
from claude_wrapper.testing.clock import ManualClock

pytestmark = pytest.mark.anyio

SHARING = CacheTerms(Ways.ASKED, 60, share=True)
TOOL = {"name": "t", "input_schema": {"type": "object"}}


@pytest.fixture
async def sharing_world(tmp_path: Path) -> AsyncIterator[World]:
    async with World(tmp_path) as world:
        made = caching(MemoryStore(ManualClock(), Bounds()), world.clock, Everybody())
        world.broker._means = dataclasses.replace(world.broker._means, caching=made)
        yield world


async def _process(
    world: World,
    org: str,
    terms: CacheTerms = SHARING,
    *,
    use: CacheUse | None = CacheUse.USE,
    **changes: Any,
) -> Process:
    process = await world.process(bound=False)
    process.endpoint.bind(binding(world.upstream.url, org=org, cache=terms, **changes))
    process.endpoint.begin(turn(cache=use))
    return process


async def _ask(process: Process, **fields: Any) -> int:
    async with process.post(request_body("[[say hi]]", **fields)) as answer:
        await answer.read()
        return int(answer.status)


async def test_a_partners_answer_costs_the_asker_nothing_and_is_a_hit(sharing_world: World) -> None:
    world = sharing_world
    theirs = await _process(world, "org_2", id="cred_theirs", secret="sk-ant-theirs")
    ours = await _process(world, "org_1")
    noted = ours.endpoint._turn
    assert (await _ask(theirs), await _ask(ours)) == (200, 200)
    assert world.upstream.count == 1
    (paid,), (hit,) = await theirs.endpoint.end(), await ours.endpoint.end()
    assert (hit.org, hit.credential_id, hit.cache_hit, hit.attempts, hit.saved) == (
        "org_1", "cred_1", True, 0, paid.usage,
    )  # fmt: skip
    assert hit.usage.output_tokens == 0
    assert noted is not None
    assert noted.notes == {"cw-cache": "hit"}
    assert [call.org for call in world.books.recorded] == ["org_2", "org_1"]
    assert len(world.books.reserved) == 1


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {"base_url": "{url}/"}),  # the same upstream in another spelling
        ({"id": "other", "secret": "sk-other"}, {}),
    ],
)
async def test_any_key_of_the_same_upstream_will_do(
    sharing_world: World, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    ours = {name: value.format(url=sharing_world.upstream.url) for name, value in ours.items()}
    await _ask(await _bound(sharing_world, "org_2", theirs))
    await _ask(await _bound(sharing_world, "org_1", ours))
    assert sharing_world.upstream.count == 1


async def _bound(world: World, org: str, changes: dict[str, Any]) -> Process:
    """As `_process`, with any field of the credential."""
    process = await world.process(bound=False)
    bound = binding(world.upstream.url, org=org, cache=SHARING)
    changed = dataclasses.replace(bound.credential, **changes)
    process.endpoint.bind(dataclasses.replace(bound, credential=changed))
    process.endpoint.begin(turn(cache=CacheUse.USE))
    return process


_OTHERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"provider": "foundry"}, {}),
    ({}, {"provider": "foundry"}),
    ({"kind": CredentialKind.OAUTH}, {}),  # what a subscription answered is its owner's
    ({}, {"kind": CredentialKind.OAUTH}),
    ({"cache": CacheTerms(Ways.ASKED, 60)}, {}),  # it named nobody when it asked
    ({}, {"cache": CacheTerms(Ways.ASKED, 60)}),
]


@pytest.mark.parametrize(("theirs", "ours"), _OTHERS)
async def test_another_way_of_asking_gives_an_answer_of_its_own(
    sharing_world: World, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    await _ask(await _bound(sharing_world, "org_2", theirs))
    await _ask(await _bound(sharing_world, "org_1", ours))
    assert sharing_world.upstream.count == 2


async def test_another_upstream_gives_an_answer_of_its_own(sharing_world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    async with World(other) as elsewhere:
        await _ask(await _bound(sharing_world, "org_2", {"base_url": elsewhere.upstream.url}))
        await _ask(await _bound(sharing_world, "org_1", {}))
        assert (elsewhere.upstream.count, sharing_world.upstream.count) == (1, 1)


async def test_a_model_that_is_not_the_turns_is_refused_before_any_cache(sharing_world: World) -> None:
    """A key's models bound those of its turns; a process cannot get another one's answer out of a partner's cache."""
    await _ask(await _process(sharing_world, "org_2"))
    narrow = await _process(sharing_world, "org_1")
    await narrow.endpoint.end()
    narrow.endpoint.begin(turn(cache=CacheUse.USE, model="claude-haiku-4-5"))
    assert await _ask(narrow) == 403


@pytest.mark.parametrize("use", [None, CacheUse.BYPASS, CacheUse.REFRESH])
async def test_who_does_not_ask_for_a_kept_answer_is_given_none(sharing_world: World, use: CacheUse | None) -> None:
    await _ask(await _process(sharing_world, "org_2"))
    await _ask(await _process(sharing_world, "org_1", use=use))
    assert sharing_world.upstream.count == 2


async def test_token_counts_and_model_lists_stay_with_their_organisation(sharing_world: World) -> None:
    world = sharing_world
    for org in ("org_2", "org_1"):
        process = await _process(world, org)
        async with process.post(request_body(stream=False), "/v1/messages/count_tokens?beta=true") as answer:
            assert answer.status == 200
        async with process.get("/v1/models") as answer:
            assert answer.status == 200
    assert len(world.upstream.requests) == 4


# Which questions say all that their answer is made from --------------------------------------------------------------------


def _shared(raw: bytes | None = None, **fields: Any) -> bool:
    body = json.dumps(request_body(**fields)).encode() if raw is None else raw
    return may_be_shared(credential("http://u"), body)


def _content(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]


_FILE = {"type": "document", "source": {"type": "file", "file_id": "file_1"}}


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        ({}, True),
        ({"tools": [TOOL]}, True),
        ({"tools": [{**TOOL, "type": "custom"}]}, True),
        ({"system": [{"type": "text", "text": 'say "file_id": 1'}], "metadata": {"user_id": "x"}}, True),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, False),
        ({"tools": [{"type": "code_execution_20250825", "name": "code_execution"}]}, False),
        ({"tools": "no list"}, False),
        ({"tools": ["no tool"]}, False),
        ({"container": "container_1"}, False),
        ({"mcp_servers": [{"type": "url", "url": "https://m", "name": "m", "authorization_token": "secret"}]}, False),
        ({"a_field_of_tomorrow": 1}, False),
        ({"messages": _content(_FILE)}, False),
        ({"messages": _content({"type": "container_upload", "file_id": "file_1"})}, False),
        ({"messages": _content({"type": "tool_result", "tool_use_id": "t", "content": [_FILE]})}, False),
        ({"system": [_FILE]}, False),
    ],
)
def test_a_question_that_names_what_lies_at_an_account_is_not_shared(fields: dict[str, Any], may: bool) -> None:
    assert _shared(**fields) is may


@given(st.binary(max_size=40) | st.sampled_from([b"[]", b"null", b'{"tools":{"a":1}}', b'{"messages":3,"system":4}']))
def test_whatever_a_process_sends_is_decided_without_an_error(raw: bytes) -> None:
    assert _shared(raw) in (True, False)


def test_a_file_cannot_be_named_in_disguise() -> None:
    escaped = json.dumps(request_body(messages=_content(_FILE))).replace("file_id", "\\u0066ile_id").encode()
    assert b"file_id" not in escaped
    assert not _shared(escaped)
