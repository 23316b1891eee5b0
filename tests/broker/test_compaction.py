"""The CLI's own request for a summary, when it compacts a conversation: what the broker takes it for."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from broker.test_caching import DETERMINISTIC, caching
from broker.test_real_cli import FIRST, Cli, cli
from broker.world import MODEL, Process, World, binding, request_body, turn
from claude_wrapper.broker import SYSTEM_PLACEHOLDER
from claude_wrapper.broker.bodies import read, rewrite
from claude_wrapper.broker.calls import CredentialKind, UpstreamCall
from claude_wrapper.storage.cache import Bounds, MemoryStore
from claude_wrapper.testing.clock import ManualClock

WORDS = "word " * 9000
SOON = {"CLAUDE_CODE_AUTO_COMPACT_WINDOW": "20000", "CLAUDE_AUTOCOMPACT_PCT_OVERRIDE": "10"}
"""With these the CLI compacts a conversation of some ten thousand tokens by itself."""
ASKS = "Your task is to create a detailed summary of the conversation so far, paying close attention"


async def _primed(agent: Cli, process: Process, world: World) -> None:
    await agent.control(subtype="initialize", systemPrompt=[SYSTEM_PLACEHOLDER], hooks=None)
    with process.endpoint.prime():
        await agent.ask("prime", FIRST)
    await agent.control(subtype="rewind_conversation", target_message_uuid=FIRST)
    bound = binding(world.upstream.url)
    process.endpoint.bind(
        dataclasses.replace(bound, credential=dataclasses.replace(bound.credential, cache=DETERMINISTIC))
    )


async def _turn(agent: Cli, process: Process, text: str) -> tuple[UpstreamCall, ...]:
    blocks = [{"type": "text", "text": "You are a parrot."}]
    process.endpoint.begin(turn(system=blocks, overrides={"max_tokens": 77}, placeholder=True))
    assert not (await agent.ask(text))["is_error"]
    return await process.endpoint.end()


@pytest.mark.anyio
@pytest.mark.real_cli
@pytest.mark.parametrize("tools", ["", "default"])
@pytest.mark.parametrize("by_itself", [False, True])
async def test_a_compaction_is_known_for_what_it_is_and_its_summary_is_kept(
    world: World, real_cli: Path, tmp_path: Path, by_itself: bool, tools: str
) -> None:
    store = MemoryStore(ManualClock(), Bounds())
    world.broker._means = dataclasses.replace(world.broker._means, caching=caching(store, world.clock))
    hits = []
    for _ in range(2):  # the same conversation twice: the second time its summary is not paid for
        world.upstream.forget()
        process = await world.process(bound=False)
        env = SOON if by_itself else {}
        async with asyncio.timeout(60), cli(real_cli, tmp_path, process, tools=tools, env=env) as agent:
            await _primed(agent, process, world)
            calls: list[UpstreamCall] = []
            for text in ("[[say one]] " + WORDS, "[[say two]] " + WORDS, "[[say three]]" if by_itself else "/compact"):
                calls += await _turn(agent, process, text)
        side = [call for call in calls if not call.main]
        assert [call.status for call in side] == [200]
        assert all(call.status == 200 and not call.cache_hit for call in calls if call.main)
        assert len(calls) == (4 if by_itself else 3)
        hits.append(side[0].cache_hit)
        (summary,) = [one for one in world.upstream.calls if ASKS in json.dumps(one.body["messages"][-1])] or [None]
        assert (summary is None) == side[0].cache_hit
        if summary is not None:
            assert summary.body["model"] == MODEL
            assert summary.body["max_tokens"] != 77  # what the caller wants of its answer is not about the summary
            assert summary.body["system"][-1]["text"] == "You are a parrot."
            assert SYSTEM_PLACEHOLDER not in json.dumps(summary.body)
    assert hits == [False, True]
    assert world.noted.faults == []


@pytest.mark.parametrize(
    ("last", "main"),
    [
        ({"role": "user", "content": f"CRITICAL: Respond with TEXT ONLY.\n\n{ASKS}"}, False),
        ({"role": "user", "content": [{"type": "text", "text": ASKS}]}, True),  # said by the caller
        ({"role": "user", "content": "go on"}, True),
    ],
)
def test_only_the_clis_own_request_is_one_whatever_stands_before_it(last: dict[str, Any], main: bool) -> None:
    earlier = [{"role": "user", "content": ASKS}, {"role": "assistant", "content": "no"}]
    tools = [{"name": "t", "description": "x" * 50_000, "input_schema": {}}]
    body = json.dumps(request_body(messages=[*earlier, last], tools=tools)).encode()
    assert rewrite(read(body), turn(), CredentialKind.API_KEY).main is main
