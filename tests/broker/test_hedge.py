"""A slow read is asked twice: the faster answer counts, the other is let go, and nothing is asked more often than allowed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from broker.world import World, request_body
from claude_wrapper.broker import BrokerSettings
from claude_wrapper.broker.hedge import first_of
from claude_wrapper.testing.clock import ManualClock

pytestmark = pytest.mark.anyio


class Asked:
    """Questions that a test answers in any order."""

    def __init__(self) -> None:
        self.questions: list[asyncio.Future[str]] = []
        self.discarded: list[str] = []
        self.clock = ManualClock()

    async def ask(self) -> str:
        self.questions.append(asyncio.get_running_loop().create_future())
        return await self.questions[-1]

    def begin(self, *, allowed: bool = True) -> asyncio.Task[str]:
        return asyncio.create_task(
            first_of(
                self.ask,
                after=1.0,
                clock=self.clock,
                good=lambda answer: answer != "bad",
                allowed=lambda: allowed,
                discard=self.discarded.append,
            )
        )


async def test_a_quick_answer_is_the_only_question_and_a_slow_one_is_asked_again() -> None:
    asked = Asked()
    quick = asked.begin()
    await asked.clock.wait_for_sleepers()
    asked.questions[0].set_result("quick")
    assert (await quick, len(asked.questions)) == ("quick", 1)
    slow = asked.begin()
    await asked.clock.wait_for_sleepers()
    await asked.clock.advance(1.0)
    assert len(asked.questions) == 3
    asked.questions[2].set_result("second")
    assert await slow == "second"
    assert asked.questions[1].cancelled()


async def test_a_bad_answer_waits_for_the_other_and_errors_come_out_only_if_both_fail() -> None:
    asked = Asked()
    one, two = asked.begin(), asked.begin()
    await asked.clock.wait_for_sleepers(2)
    await asked.clock.advance(1.0)
    first, other, third, fourth = asked.questions
    first.set_result("bad")
    for _ in range(5):
        await asyncio.sleep(0)
    assert not one.done()
    third.set_result("good")
    assert (await one, asked.discarded) == ("good", ["bad"])
    other.set_exception(ValueError("first"))
    fourth.set_exception(ValueError("second"))
    with pytest.raises(ValueError, match="first"):
        await two
    never = asked.begin(allowed=False)
    await asked.clock.wait_for_sleepers()
    await asked.clock.advance(5.0)
    assert len(asked.questions) == 5
    never.cancel()
    await asyncio.wait({never})
    assert asked.questions[4].cancelled()


async def test_a_token_count_is_hedged_and_a_message_never(tmp_path: Path) -> None:
    settings = BrokerSettings(hedge_seconds=0.01, finish_seconds=1.0, retry_budget_ratio=0.0, retry_budget_reserve=1)
    async with asyncio.timeout(60), World(tmp_path, settings) as world:
        process = await world.process()
        body = request_body("[[first 100]] [[say slow]]")
        async with process.post(body) as answer:
            assert answer.status == 200
            await answer.read()
        assert world.upstream.count == 1
        world.upstream.slow_reads = 0.2
        for sent in (2, 3):  # the second time no retry is left
            async with process.post(body, "/v1/messages/count_tokens?beta=true") as answer:
                assert answer.status == 200
                await answer.read()
            assert len(world.upstream.requests) == 1 + sent
        calls = await process.endpoint.end()
        assert [call.attempts for call in calls] == [1, 2, 1]
