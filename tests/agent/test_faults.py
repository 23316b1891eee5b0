"""What processes do wrong, each with a real one."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from agent.bare import BareSandbox, slot_dirs
from agent.conftest import FAST, Double, double_launch, eventually
from claude_wrapper.agent.connection import Agent
from claude_wrapper.agent.lifecycle import State
from claude_wrapper.agent.transport import Ending
from claude_wrapper.agent.turns import Turn
from claude_wrapper.clock import SystemClock
from claude_wrapper.errors import (
    AgentCrashed,
    AgentProtocolError,
    AgentTimeout,
    OutputLimitExceeded,
    SpawnFailed,
    WrapperError,
)
from claude_wrapper.ids import RandomIds
from claude_wrapper.sandbox.port import Launch
from claude_wrapper.wire.streamjson import Frame

pytestmark = [pytest.mark.anyio, pytest.mark.process]


async def read(turn: Turn) -> list[Frame]:
    async with asyncio.timeout(20), turn:
        return [frame async for frame in turn]


async def fails(turn: Turn, error: type[WrapperError]) -> WrapperError:
    with pytest.raises(error) as caught:
        await read(turn)
    return caught.value


async def test_a_process_killed_while_idle_is_noticed_and_refuses_turns(double: Double) -> None:
    async with double("echo") as agent:
        await read(agent.turn("one"))
        os.kill(agent.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            await agent.closed.wait()
        assert agent.state is State.FAILED
        assert agent.returncode == -signal.SIGKILL
        assert agent.exit is not None
        assert agent.exit.ending is Ending.BY_ITSELF
        error = await fails(agent.turn("two"), AgentCrashed)
        assert "-9" in error.message
        with pytest.raises(AgentCrashed):
            await agent.set_model("m")


async def test_a_process_that_dies_in_mid_turn_fails_it_with_exit_code_and_last_words(double: Double) -> None:
    async with double("dies") as agent:
        turn = agent.turn("one")
        assert (await anext(turn)).type == "stream_event"
        with pytest.raises(AgentCrashed) as caught:
            await asyncio.wait_for(anext(turn), 20)
        assert caught.value.details["exit_code"] == 3
        assert "out of cheese" in caught.value.message
        async with asyncio.timeout(10):
            await agent.closed.wait()


async def test_turns_that_wait_behind_a_crash_fail_too(double: Double) -> None:
    async with double("dies") as agent:
        results = await asyncio.gather(*(read(agent.turn(str(n))) for n in range(4)), return_exceptions=True)
        assert [type(result) for result in results] == [AgentCrashed] * 4


async def test_a_process_that_hangs_fails_the_turn_in_bounded_time_and_is_killed(double: Double) -> None:
    async with double("hang", replace(FAST, answer_seconds=0.2)) as agent:
        error = await fails(agent.turn("one"), AgentTimeout)
        assert "0.2 s" in error.message
        async with asyncio.timeout(10):
            await agent.closed.wait()
        assert agent.state is State.FAILED


async def test_a_process_that_does_not_read_its_input_fails_the_turn(double: Double) -> None:
    async with double("deaf", replace(FAST, write_seconds=0.2)) as agent:
        error = await fails(agent.turn("x" * 4_000_000), AgentTimeout)
        assert "did not read" in error.message
        async with asyncio.timeout(10):
            await agent.closed.wait()


async def test_a_process_that_floods_its_output_fails_the_turn_and_is_killed(double: Double) -> None:
    async with double("flood") as agent:
        await fails(agent.turn("one"), OutputLimitExceeded)
        async with asyncio.timeout(10):
            await agent.closed.wait()


async def test_a_flood_that_nobody_reads_waits_in_its_pipe(double: Double) -> None:
    settings = replace(FAST, inbox_frames=50, turn_output=2**30, output_rate=2**30)
    async with double("flood", settings) as agent, agent.turn("one") as turn:
        await eventually(lambda: turn._record.inbox.full)
        read_so_far = turn._record.output
        assert read_so_far < 2**20
        for _ in range(100):
            await anext(turn)
        assert turn._record.output >= read_so_far


async def test_output_is_read_no_faster_than_the_rate(double: Double) -> None:
    settings = replace(FAST, output_rate=2**20, turn_output=2**30)
    async with double("flood", settings) as agent, agent.turn("one") as turn:
        clock = SystemClock()
        started, size = clock.monotonic(), 0
        async for frame in turn:
            size += len(frame.raw)
            if size > 1.5 * 2**20:  # one second's worth is the burst
                break
        assert clock.monotonic() - started > 0.25


async def test_a_line_beyond_the_limit_breaks_the_process(double: Double) -> None:
    async with double("hugeline") as agent:
        error = await fails(agent.turn("one"), AgentProtocolError)
        assert str(FAST.max_line) in error.message


async def test_some_garbage_is_dropped_and_counted(double: Double) -> None:
    async with double("garbage") as agent:
        frames = await read(agent.turn("one"))
        assert frames[-1].type == "result"
        assert agent.garbage == 4


async def test_much_garbage_breaks_the_process(double: Double) -> None:
    async with double("garbageflood") as agent:
        await fails(agent.turn("one"), AgentProtocolError)
        assert agent.garbage == FAST.garbage_lines + 1


async def test_a_process_that_closes_its_output_and_stays_is_killed(double: Double) -> None:
    async with double("closes") as agent:
        await fails(agent.turn("one"), AgentProtocolError)
        async with asyncio.timeout(10):
            await agent.closed.wait()


async def test_a_process_that_answers_no_control_call_costs_a_timeout_and_stays_usable(double: Double) -> None:
    async with double("mute") as agent:
        with pytest.raises(AgentTimeout, match="set_model"):
            await agent.set_model("m")
        assert (await read(agent.turn("one")))[-1].type == "result"


async def test_answers_to_unknown_calls_are_ignored(double: Double) -> None:
    async with double("echo") as agent:
        assert await agent.mcp_status() == {"mode": "echo"}


async def test_an_abandoned_turn_that_will_not_stop_costs_the_process(double: Double) -> None:
    async with double("unstoppable") as agent:
        async with asyncio.timeout(10), agent.turn("one") as turn:
            await anext(turn)
        assert not agent.alive
        await fails(agent.turn("two"), AgentTimeout)


async def test_stderr_is_drained_and_only_its_end_is_kept(double: Double) -> None:
    async with double("stderrflood") as agent:
        assert (await read(agent.turn("one")))[-1].type == "result"
        await agent.stop()
        assert len(agent.stderr_tail) <= FAST.stderr_bytes
        assert agent.stderr_tail.endswith(f"line 19999 {'e' * 80}\n")


async def test_a_permission_question_is_denied_unless_somebody_answers(double: Double) -> None:
    async with double("asks") as agent:
        denied = (await read(agent.turn("one")))[0].json()["event"]
        assert denied["response"]["response"]["behavior"] == "deny"

        async def allow(subtype: str, request: dict[str, object]) -> dict[str, object]:
            return {"behavior": "allow", "asked": [subtype, request["tool_name"]]}

        agent.on_control = allow
        allowed = (await read(agent.turn("two")))[0].json()["event"]
        assert allowed["response"]["response"] == {"behavior": "allow", "asked": ["can_use_tool", "Bash"]}


# Ending ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("echo", Ending.END_OF_INPUT), ("lingers", Ending.TERMINATED), ("stubborn", Ending.KILLED)],
)
async def test_stop_escalates_as_far_as_it_must(double: Double, mode: str, ending: Ending) -> None:
    async with double(mode) as agent:
        await read(agent.turn("one"))
        async with asyncio.timeout(10):
            report = await agent.stop()
        assert report.ending is ending
        assert agent.state is State.CLOSED
        assert agent.closed.is_set()
        assert await agent.stop() is report


async def test_stop_without_grace_kills_at_once_also_while_somebody_waits_politely(double: Double) -> None:
    async with double("stubborn", replace(FAST, exit_grace=60)) as agent:
        await read(agent.turn("one"))
        polite = asyncio.create_task(agent.stop())
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await agent.stop(grace=0)
            assert (await polite).returncode == -signal.SIGKILL


async def test_a_frozen_process_can_be_stopped(double: Double) -> None:
    async with double("echo") as agent:
        await read(agent.turn("one"))
        agent.freeze()
        status = Path(f"/proc/{agent.main_pid}/stat")
        await eventually(lambda: status.read_text().rsplit(")", 1)[1].split()[0] == "T")
        async with asyncio.timeout(10):
            assert (await agent.stop()).ending is Ending.END_OF_INPUT


async def test_freeze_and_thaw_between_turns_change_nothing(double: Double) -> None:
    async with double("echo") as agent:
        await read(agent.turn("one"))
        agent.freeze()
        agent.thaw()
        assert (await read(agent.turn("two")))[-1].type == "result"


async def test_a_grandchild_that_holds_the_output_open_delays_nothing_and_is_killed(double: Double) -> None:
    async with double("grandchild") as agent:
        await eventually(lambda: agent.session_uuid is not None)
        group = agent.pid
        os.kill(agent.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            await agent.closed.wait()
        await eventually(lambda: not group_exists(group))


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("mode", ["echo", "stubborn", "grandchild"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 8, 12, 20])
async def test_stop_can_be_cancelled_at_any_point_and_still_ends_everything(
    double: Double, mode: str, steps: int
) -> None:
    async with double(mode, replace(FAST, exit_grace=0.02, term_grace=0.02)) as agent:
        stopping = asyncio.create_task(agent.stop())
        for _ in range(steps):
            await asyncio.sleep(0)
        stopping.cancel()
        await asyncio.wait({stopping})
        async with asyncio.timeout(10):
            await agent.closed.wait()
        assert agent.returncode is not None


async def test_cancelling_the_start_leaves_no_process(tmp_path: Path, leaves_nothing: None) -> None:
    dirs = slot_dirs(tmp_path)
    for steps in range(6):
        start = asyncio.create_task(
            Agent.start(
                double_launch("stubborn", dirs.work),
                sandbox=BareSandbox(),
                dirs=dirs,
                clock=SystemClock(),
                ids=RandomIds(),
                settings=FAST,
            )
        )
        for _ in range(steps):
            await asyncio.sleep(0)
        start.cancel()
        await asyncio.wait({start})
        if not start.cancelled():
            await start.result().stop(grace=0)


async def test_what_cannot_be_started_is_said_and_its_descriptors_are_closed(
    tmp_path: Path, leaves_nothing: None
) -> None:
    dirs = slot_dirs(tmp_path)
    passed = os.open("/dev/null", os.O_RDONLY)
    launch = Launch(("/nonexistent/claude",), {}, dirs.work, (passed,))
    with pytest.raises(SpawnFailed, match="/nonexistent/claude"):
        await Agent.start(launch, sandbox=BareSandbox(), dirs=dirs, clock=SystemClock(), ids=RandomIds(), settings=FAST)


def test_when_the_event_loop_goes_away_no_process_is_left(tmp_path: Path, leaves_nothing: None) -> None:
    dirs = slot_dirs(tmp_path)

    async def forgetful() -> None:
        agent = await Agent.start(
            double_launch("stubborn", dirs.work),
            sandbox=BareSandbox(),
            dirs=dirs,
            clock=SystemClock(),
            ids=RandomIds(),
            settings=FAST,
        )
        await agent.set_model("m")

    asyncio.run(forgetful())
