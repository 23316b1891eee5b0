"""What goes wrong around a turn, on real processes: the answer is clear, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from running_server import Answer, Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


async def _eventually(what: Callable[[], bool], seconds: float = 15) -> None:
    """Wait until it holds; the loop's own turns are the events."""
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.01)


def _exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _children() -> set[int]:
    """Living descendants of this process."""
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                kids = [int(kid) for kid in task.read_text().split()]
                found.update(kid for kid in kids if _exists(kid))
                waiting += kids
    return found


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_the_cli_killed_while_idle_costs_the_next_turn_only_its_warmth(server: Running) -> None:
    first = await server.ask("remember me", session_id="s")
    os.kill(first.pid, signal.SIGKILL)
    await _eventually(lambda: not _exists(first.pid))
    second = await server.ask("[[recall]]", session_id="s")
    assert second.status == 200
    assert second.pid != first.pid
    assert "remember me" in second.text


async def test_the_cli_killed_in_mid_turn_is_a_clear_error_and_the_conversation_goes_on(server: Running) -> None:
    first = await server.ask("remember me", session_id="s")
    hanging = asyncio.ensure_future(server.ask("[[hang]]", session_id="s"))
    await server.upstream.wait_for(2)
    os.kill(first.pid, signal.SIGKILL)
    failed = await hanging
    assert (failed.status, failed.body["error"]["code"]) == (502, "agent_crashed")
    again = await server.ask("[[recall]]", session_id="s")
    assert again.status == 200
    assert "remember me" in again.text
    assert "hang" not in again.text


async def test_a_client_that_hangs_up_cancels_its_upstream_call_and_the_next_answer_is_right(server: Running) -> None:
    first = await server.ask("hello", session_id="s")
    body = {
        "model": "claude-sonnet-5-5",
        "max_tokens": 64,
        "stream": True,
        "session_id": "s",
        "messages": [{"role": "user", "content": "[[tokens 1000]] [[delay 50]]"}],
    }
    async with server.http.post("/v1/messages", json=body) as response:
        await response.content.readany()
        response.close()
    call = server.upstream.calls[-1]
    async with asyncio.timeout(5):
        await call.wait_done()
    assert call.cancelled
    again = await server.ask("[[recall]]", session_id="s")
    assert again.text == '["hello"]'
    assert again.pid == first.pid


async def test_a_client_that_hangs_up_before_the_first_byte_leaves_nothing_running(server: Running) -> None:
    asking = asyncio.ensure_future(server.ask("[[hang]]", session_id="s"))
    await server.upstream.wait_for(1)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    async with asyncio.timeout(5):
        await server.upstream.calls[0].wait_done()
    assert server.upstream.calls[0].cancelled
    assert (await server.ask("fine", session_id="s")).text == "You said: fine"


@pytest.mark.parametrize("status", [401, 403, 429, 500, 529])
async def test_upstream_refusals_arrive_with_their_status_and_retry_after(server: Running, status: int) -> None:
    answer = await server.ask(f"[[error {status}]]")
    assert answer.status == status
    assert answer.body["error"]["message"]
    if status == 429:
        assert answer.headers["Retry-After"] == "1"


async def test_a_stream_that_is_cut_is_an_error_and_its_retry_starts_from_the_same_history(server: Running) -> None:
    cut = await server.ask("[[cut 3]] [[once]] [[tokens 9]]", session_id="s")
    assert (cut.status, cut.body["error"]["type"]) == (502, "api_error")
    retried = await server.ask("[[cut 3]] [[once]] [[tokens 9]]", session_id="s")
    assert (retried.status, retried.text.strip()) == (200, "1 2 3 4 5 6 7 8 9")
    user = [one for one in server.upstream.calls[-1].body["messages"] if one["role"] == "user"]
    assert len(user) == 1


async def test_a_silent_upstream_ends_the_turn_in_bounded_time(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, upstream_read_seconds=1.0, upstream_attempts=1) as server:
        answer = await server.ask("[[hang]]")
        assert answer.status in {502, 504}
        assert (await server.ask("fine")).status == 200


async def test_a_turn_longer_than_its_limit_is_ended_and_named(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, turn_seconds=1.0) as server:
        answer = await server.ask("[[hang]]")
        assert (answer.status, answer.body["error"]["type"]) == (504, "timeout_error")
        assert "turn_seconds" in answer.body["error"]["message"]
        assert (await server.ask("fine")).status == 200


async def test_an_unreachable_upstream_is_a_clear_error(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, upstream_url="http://127.0.0.1:9", upstream_attempts=1) as server:
        answer = await server.ask("hello")
        assert answer.status == 502
        assert "reached" in answer.body["error"]["message"]


async def test_two_hundred_requests_over_32_conversations_each_get_their_own_answer(
    reachable_tmp_path: Path,
) -> None:
    async with running(
        reachable_tmp_path,
        max_processes=34,
        max_processes_per_org=34,
        max_processes_per_principal=34,
        queue_seconds=120.0,
    ) as server:

        async def converse(number: int) -> list[Answer]:
            turns = range(6 if number < 24 else 7)
            return [await server.ask(f"[[say c{number}-t{turn}]]", session_id=f"c{number}") for turn in turns]

        async with asyncio.timeout(110):
            conversations = await asyncio.gather(*(converse(number) for number in range(32)))
        for number, answers in enumerate(conversations):
            assert [answer.text for answer in answers] == [f"c{number}-t{turn}" for turn in range(len(answers))]
        assert sum(map(len, conversations)) == 200


async def test_more_conversations_than_processes_take_turns(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, max_processes=2, spares=0, queue_seconds=100.0) as server:
        for turn in range(2):
            said = await asyncio.gather(*(server.ask(f"[[say {n}-{turn}]]", session_id=f"c{n}") for n in range(4)))
            assert [answer.text for answer in said] == [f"{n}-{turn}" for n in range(4)]
        recalled = await server.ask("[[recall]]", session_id="c0")
        assert json.loads(recalled.text) == ["[[say 0-0]]", "[[say 0-1]]"]


async def test_a_full_server_refuses_with_retry_after(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, max_processes=1, spares=0, queue_seconds=4.0, queue_length=1) as server:
        hanging = asyncio.ensure_future(server.ask("[[hang]]"))
        await asyncio.wait({hanging, asyncio.ensure_future(server.upstream.wait_for(1))}, return_when="FIRST_COMPLETED")
        answer = await server.ask("hello")
        assert (answer.status, answer.body["error"]["type"]) == (529, "overloaded_error")
        assert "Retry-After" in answer.headers
        hanging.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await hanging


async def test_a_stopped_server_leaves_no_process_descriptor_or_file(reachable_tmp_path: Path) -> None:
    children, descriptors = _children(), _descriptors()
    async with running(reachable_tmp_path) as server:
        await asyncio.gather(*(server.ask(f"hello {n}", session_id=f"s{n}") for n in range(3)))
        await server.ask("[[error 400]]")
        assert len(_children() - children) >= 3
        await server.http.close()
    await _eventually(lambda: _children() <= children)
    assert _descriptors() <= descriptors
    assert list((reachable_tmp_path / "data" / "slots").iterdir()) == []
