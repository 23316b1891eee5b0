"""Turns in order, never crossed, whoever leaves when: on a scripted process in memory."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.scripted import ScriptedTransport
from claude_wrapper.agent.connection import Agent
from claude_wrapper.agent.lifecycle import State
from claude_wrapper.agent.settings import AgentSettings
from claude_wrapper.clock import SystemClock
from claude_wrapper.errors import AgentCrashed, Conflict, InvalidRequest
from claude_wrapper.ids import RandomIds
from claude_wrapper.wire.control import ControlRefused
from claude_wrapper.wire.streamjson import Frame
from claude_wrapper.wire.turn import TurnState

SMALL = AgentSettings(inbox_frames=3, drain_seconds=5, control_seconds=5, waiting_turns=16)


def run(
    work: Callable[[Agent, ScriptedTransport], Awaitable[None]], *, chunk: int = 1 << 20, limits: AgentSettings = SMALL
) -> None:
    async def main() -> None:
        transport = ScriptedTransport(chunk)
        agent = Agent(transport, clock=SystemClock(), ids=RandomIds(), settings=limits)
        try:
            async with asyncio.timeout(20):
                await work(agent, transport)
        finally:
            await agent.stop(grace=0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, "stop leaves no task"

    asyncio.run(main())


def question(frames: int = 2, **script: Any) -> str:
    return json.dumps({"frames": frames, **script})


def check_own(uuid: str, frames: list[Frame], count: int | None = None) -> None:
    """All frames are this turn's, none is missing, and the last is its result."""
    *deltas, result = frames
    assert result.json()["result"] == uuid
    assert [delta.json()["event"] for delta in deltas] == [{"uuid": uuid, "index": n} for n in range(len(deltas))]
    assert count is None or len(deltas) == count


@pytest.mark.parametrize("callers", [2, 8])
def test_several_turns_at_once_are_answered_in_order_and_never_crossed(callers: int) -> None:
    async def work(agent: Agent, transport: ScriptedTransport) -> None:
        ended: list[str] = []

        async def ask(n: int) -> None:
            async with agent.turn(question(n), uuid=f"u{n}") as turn:
                check_own(f"u{n}", [frame async for frame in turn], n)
            ended.append(f"u{n}")

        await asyncio.gather(*(ask(n) for n in range(callers)))
        assert ended == [f"u{n}" for n in range(callers)]
        assert [line["uuid"] for line in transport.lines] == ended

    run(work)


LEAVINGS = ["read", "leave", "cancel", "drop", "interrupt", "never_begun", "abandon_unread", "slow"]
PLANS = st.lists(
    st.tuples(st.sampled_from(LEAVINGS), st.integers(0, 12), st.integers(0, 6), st.booleans(), st.integers(0, 5)),
    min_size=1,
    max_size=7,
)


async def carry_out(agent: Agent, uuid: str, plan: tuple[str, int, int, bool, int]) -> None:
    how, frames, taken, stray, pause = plan
    for _ in range(pause):
        await asyncio.sleep(0)
    turn = agent.turn(question(frames, stray=stray), uuid=uuid)
    if how == "never_begun":
        return
    if how == "cancel":
        task = asyncio.create_task(read_all(turn))
        for _ in range(taken * 3):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        return
    if how == "drop":  # a caller that forgets its turn without closing it
        for _ in range(min(taken, frames) + 1):
            await anext(turn)
        del turn
        gc.collect(0)
        return
    async with turn:
        if how == "abandon_unread":
            await turn.abandon()
            assert turn.state is TurnState.DONE
            return
        seen = []
        async for frame in turn:
            seen.append(frame)
            if how == "slow":
                for _ in range(taken):
                    await asyncio.sleep(0)
            if len(seen) > taken and how == "leave":
                return
            if len(seen) == taken and how == "interrupt":
                await turn.interrupt()
        check_own(uuid, seen, None if how == "interrupt" else frames)


async def read_all(turn: Any) -> list[Frame]:
    async with turn:
        return [frame async for frame in turn]


@settings(max_examples=120, deadline=None)
@given(PLANS, st.sampled_from([7, 64, 1 << 20]))
def test_whoever_leaves_when_every_other_turn_gets_its_own_answer(
    plans: list[tuple[str, int, int, bool, int]], chunk: int
) -> None:
    async def work(agent: Agent, _transport: ScriptedTransport) -> None:
        await asyncio.gather(*(carry_out(agent, f"u{n}", plan) for n, plan in enumerate(plans)))
        async with agent.turn(question(5), uuid="last") as turn:
            check_own("last", [frame async for frame in turn], 5)
        assert agent.state is State.READY

    run(work, chunk=chunk)


def test_frames_of_a_run_that_nobody_asked_for_go_to_nobody() -> None:
    async def work(agent: Agent, _transport: ScriptedTransport) -> None:
        strays: list[Frame] = []
        agent.on_stray = strays.append
        check_own("a", await read_all(agent.turn(question(2, stray=True), uuid="a")), 2)
        assert [frame.type for frame in strays] == ["stream_event", "result", "result"]

    run(work)


def test_a_consumer_that_does_not_read_stops_the_reader_and_nothing_is_lost() -> None:
    async def work(agent: Agent, _transport: ScriptedTransport) -> None:
        async with agent.turn(question(50), uuid="u") as turn:
            for _ in range(300):
                await asyncio.sleep(0)
                assert len(turn._record.inbox) <= SMALL.inbox_frames
            check_own("u", [frame async for frame in turn], 50)

    run(work)


def test_a_loss_of_the_process_reaches_the_running_turn_and_those_that_wait() -> None:
    async def work(agent: Agent, transport: ScriptedTransport) -> None:
        tasks = [asyncio.create_task(read_all(agent.turn(question(10_000)))) for _ in range(3)]
        await asyncio.sleep(0.01)
        transport.die(7)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [AgentCrashed] * 3
        with pytest.raises(AgentCrashed):
            await read_all(agent.turn(question()))

    run(work)


def test_more_turns_than_may_wait_are_refused() -> None:
    async def work(agent: Agent, _transport: ScriptedTransport) -> None:
        tasks = [asyncio.create_task(read_all(agent.turn(question(1)))) for _ in range(SMALL.waiting_turns + 3)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [result for result in results if isinstance(result, BaseException)]
        assert [type(error) for error in refused] == [Conflict] * 2
        assert len(results) - len(refused) == SMALL.waiting_turns + 1

    run(work)


def test_a_turn_given_up_while_it_waits_is_never_sent() -> None:
    async def work(agent: Agent, transport: ScriptedTransport) -> None:
        async with agent.turn(question(20), uuid="first") as first:
            waiting = asyncio.create_task(read_all(agent.turn(question(), uuid="second")))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
            check_own("first", [frame async for frame in first], 20)
        check_own("third", await read_all(agent.turn(question(), uuid="third")), 2)
        assert [line["uuid"] for line in transport.lines if line["type"] == "user"] == ["first", "third"]

    run(work)


def test_a_history_is_checked_before_anything_is_sent() -> None:
    async def work(agent: Agent, transport: ScriptedTransport) -> None:
        for bad, field in [
            ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "messages[0].role"),
            ([{"role": "user", "content": "a"}], "messages"),
            ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "messages[1].role"),
            ([{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}], "messages[0].content"),
        ]:
            with pytest.raises(InvalidRequest) as caught:
                await agent.inject(bad, model="m")
            assert caught.value.field == field
        assert transport.lines == []

    run(work)


def test_a_rewind_to_the_start_names_first_and_last_user_line_and_needs_none_before_the_first() -> None:
    async def work(agent: Agent, transport: ScriptedTransport) -> None:
        await agent.rewind()
        assert transport.lines == []
        for uuid in ("a", "b", "c"):
            await read_all(agent.turn(question(1), uuid=uuid))
        await agent.rewind()
        assert transport.lines[-1]["request"] == {
            "subtype": "rewind_conversation",
            "target_message_uuid": "a",
            "last_seen_user_message_uuid": "c",
        }
        told = len(transport.lines)
        await agent.rewind()
        assert len(transport.lines) == told

    run(work)


def test_a_process_with_traces_of_a_tool_is_not_rewound_for_another_conversation() -> None:
    async def work(agent: Agent, transport: ScriptedTransport) -> None:
        await read_all(agent.turn(question(1), uuid="a"))
        agent.residue.add("Bash")
        with pytest.raises(ControlRefused, match="Bash"):
            await agent.rewind()
        await agent.rewind("a")
        assert transport.lines[-1]["request"]["subtype"] == "rewind_conversation"

    run(work)
