"""What the broker does when the upstream fails: fail fast, repeat, rest - and always say what really happened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker.raw import RawUpstream, drop, hang, pieces, raw_upstream, then, whole
from broker.world import SECRET, Process, World, binding, encoded_request, request_body, turn
from claude_wrapper.broker import BrokerSettings
from claude_wrapper.testing import ManualClock

pytestmark = pytest.mark.anyio

GOOD = encoded_request()
ERROR = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"},"request_id":"req_9"}'
STREAM = b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":3}}}\n\n'
STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'


@asynccontextmanager
async def timed(
    tmp_path: Path, *answers: object, **changes: object
) -> AsyncIterator[tuple[World, Process, RawUpstream]]:
    """A world whose clock stands still, before an upstream of bytes."""
    settings = BrokerSettings(**({"finish_seconds": 1.0} | changes))  # type: ignore[arg-type]
    async with (
        asyncio.timeout(30),
        World(tmp_path, settings, ManualClock()) as world,
        raw_upstream(*answers) as upstream,  # type: ignore[arg-type]
    ):
        process = await world.process()
        process.endpoint.bind(binding(upstream.url))
        process.endpoint.begin(turn())
        yield world, process, upstream


async def ask(process: Process) -> tuple[int, bytes]:
    async with process.post(GOOD) as answer:
        return answer.status, await answer.read()


async def waking(world: World, asking: asyncio.Task[tuple[int, bytes]]) -> list[float]:
    """Let time pass whenever the broker waits; the moments of its attempts."""
    while not asking.done():
        if world.clock.sleepers:
            await world.clock.advance(0.25)
        await asyncio.sleep(0)
    return [delay for _, _, delay in world.noted.retries]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
    ],
)
async def test_what_would_fail_again_fails_at_once(world: World, status: int, kind: str) -> None:
    process = await world.process()
    async with process.post(request_body(f"[[error {status}]]")) as answer:
        assert answer.status == status
        body = await answer.json()
        assert body["error"]["type"] == kind
        assert answer.headers["x-should-retry"] == "false"
    assert len(world.upstream.requests) == 1
    (call,) = await process.endpoint.end()
    assert (call.status, call.error_type, call.error_message) == (status, kind, body["error"]["message"])
    assert call.upstream_request_id == world.upstream.requests[0].request_id
    assert world.books.recorded == [call]


async def test_passing_trouble_is_repeated_with_growing_pauses_and_counted_as_one_call(tmp_path: Path) -> None:
    busy = whole("529 Overloaded", ERROR)
    async with timed(tmp_path, busy, busy, busy, pieces(STREAM, STOP)) as (world, process, upstream):
        asking = asyncio.ensure_future(ask(process))
        pauses = await waking(world, asking)
        assert await asking == (200, STREAM + STOP)
        (call,) = await process.endpoint.end()
        assert len(upstream.requests) == 4
        assert (call.attempts, call.status, call.error_type) == (4, 200, None)
        assert len(pauses) == 3
        assert all(base / 2 <= pause <= base for base, pause in zip((0.5, 1, 2), pauses, strict=True))
        assert world.books.recorded == [call]


async def test_after_the_last_attempt_the_upstream_s_own_error_is_passed_on(tmp_path: Path) -> None:
    async with timed(tmp_path, whole("529 Overloaded", ERROR)) as (world, process, upstream):
        asking = asyncio.ensure_future(ask(process))
        await waking(world, asking)
        assert await asking == (529, ERROR)
        (call,) = await process.endpoint.end()
        assert (call.attempts, len(upstream.requests)) == (4, 4)
        assert (call.error_type, call.error_message) == ("overloaded_error", "Overloaded")


async def test_retry_after_is_kept_and_a_long_one_is_passed_on(tmp_path: Path) -> None:
    headers = "content-type: application/json\r\nretry-after: "
    soon = whole("429 Too Many Requests", ERROR, headers + "3")
    late = whole("429 Too Many Requests", ERROR, headers + "120")
    async with timed(tmp_path, soon, late) as (world, process, upstream):
        asking = asyncio.ensure_future(process.post(GOOD).__aenter__())
        assert await waking(world, asking) == [3.0]
        answer = await asking
        assert (answer.status, answer.headers["retry-after"]) == (429, "120")
        answer.release()
        assert len(upstream.requests) == 2
        (call,) = await process.endpoint.end()
        assert call.retry_after == 120


async def test_an_upstream_that_says_not_to_repeat_is_not_asked_again(tmp_path: Path) -> None:
    headers = "content-type: application/json\r\nx-should-retry: false"
    async with timed(tmp_path, whole("500 Oops", ERROR, headers)) as (_, process, upstream):
        assert (await ask(process))[0] == 500
        assert len(upstream.requests) == 1


async def test_a_stream_that_begins_with_an_error_counts_as_an_error_answer(tmp_path: Path) -> None:
    failed = pieces(b"event: error\ndata: " + ERROR + b"\n\n")
    async with timed(tmp_path, failed, pieces(STREAM, STOP)) as (world, process, upstream):
        asking = asyncio.ensure_future(ask(process))
        await waking(world, asking)
        assert await asking == (200, STREAM + STOP)
        assert len(upstream.requests) == 2
        assert world.noted.retries[0][1] == 529


async def test_an_error_event_in_mid_stream_is_passed_on_and_known(world: World) -> None:
    process = await world.process()
    async with process.post(request_body("[[tokens 9]] [[error-after 3]]")) as answer:
        assert b"event: error" in await answer.read()
    (call,) = await process.endpoint.end()
    assert (call.status, call.error_type, call.stream_complete) == (200, "overloaded_error", False)
    assert len(world.upstream.requests) == 1


async def test_an_error_that_is_not_in_the_api_s_shape_is_brought_into_it(tmp_path: Path) -> None:
    page = whole(
        "503 Service Unavailable", b"<html>" + SECRET.encode(), "content-type: text/html\r\nx-should-retry: false"
    )
    async with timed(tmp_path, page) as (_, process, _upstream):
        async with process.post(GOOD) as answer:
            assert answer.status == 503
            assert answer.content_type == "application/json"
            error = (await answer.json())["error"]
        assert error == {"type": "api_error", "message": "The upstream answered 503."}


async def test_an_upstream_that_echoes_the_credential_does_not_reveal_it(tmp_path: Path) -> None:
    echo = ERROR.replace(b"Overloaded", b"bad key " + SECRET.encode())
    async with timed(tmp_path, whole("401 Unauthorized", echo)) as (_, process, _upstream):
        status, body = await ask(process)
        assert status == 401
        assert SECRET.encode() not in body
        (call,) = await process.endpoint.end()
        assert SECRET not in repr(call)


async def test_an_unreachable_upstream_is_tried_again_and_then_a_502(tmp_path: Path) -> None:
    async with timed(tmp_path, hang) as (world, process, _):
        process.endpoint.bind(binding("http://127.0.0.1:9"))
        asking = asyncio.ensure_future(ask(process))
        await waking(world, asking)
        status, body = await asking
        assert status == 502
        assert b"127.0.0.1" not in body
        (call,) = await process.endpoint.end()
        assert (call.attempts, call.error_type) == (4, "api_error")


async def test_an_idle_connection_that_has_gone_costs_one_attempt_at_once(tmp_path: Path) -> None:
    async with timed(tmp_path, pieces(STREAM, STOP), drop, pieces(STREAM, STOP)) as (world, process, upstream):
        assert (await ask(process))[0] == 200
        assert (await ask(process))[0] == 200
        assert len(upstream.requests) == 3
        assert [delay for _, _, delay in world.noted.retries] == [0.0]
        assert world.broker.breakers() == ()


async def test_a_hanging_upstream_is_given_up(tmp_path: Path) -> None:
    async with timed(tmp_path, hang, read_seconds=0.05, retry_attempts=1) as (world, process, upstream):
        status, body = await ask(process)
        assert (status, b"timeout_error" in body) == (504, True)
        await upstream.closed.wait()
        (call,) = await process.endpoint.end()
        assert (call.status, call.error_type) == (504, "timeout_error")
        assert world.books.balanced


async def test_a_stream_that_falls_silent_is_cut(tmp_path: Path) -> None:
    async with timed(tmp_path, then(STREAM, hang), read_seconds=0.05) as (_, process, upstream):
        with pytest.raises(Exception, match="payload"):
            await ask(process)
        assert len(upstream.requests) == 1
        (call,) = await process.endpoint.end()
        assert (call.status, call.error_type, call.usage.input_tokens) == (200, "stream_cut", 3)


async def test_after_five_failures_the_upstream_rests_and_one_probe_ends_the_rest(tmp_path: Path) -> None:
    failing = whole("500 Oops", ERROR, "content-type: application/json\r\nx-should-retry: false")
    good = pieces(STREAM, STOP)
    async with timed(tmp_path, *[failing] * 5, failing, good) as (world, process, upstream):
        for _ in range(5):
            assert (await ask(process))[0] == 500
        async with process.post(GOOD) as answer:
            assert answer.status == 503
            assert answer.headers["retry-after"] == "60"
        assert len(upstream.requests) == 5
        assert [(view.state, view.failures) for view in world.broker.breakers()] == [("open", 5)]
        recorded = len(world.books.recorded)
        assert world.books.balanced

        process.endpoint.bind(binding(upstream.url, id="cred_2"))  # another credential has a breaker of its own
        assert (await ask(process))[0] == 500
        process.endpoint.bind(binding(upstream.url))

        await world.clock.advance(60)
        assert {status for status, _ in await asyncio.gather(*(ask(process) for _ in range(5)))} == {200, 503}
        assert (await ask(process))[0] == 200
        assert len(upstream.requests) == 8
        assert world.noted.breakers == ["open", "half_open", "closed"]
        assert recorded == 5


async def test_retries_of_a_credential_are_bounded_in_the_long_run(tmp_path: Path) -> None:
    failing = whole("429 Too Many Requests", ERROR)
    async with timed(tmp_path, failing, retry_budget_reserve=2.0, retry_budget_ratio=0.0) as (world, process, upstream):
        for _ in range(5):
            asking = asyncio.ensure_future(ask(process))
            await waking(world, asking)
            assert (await asking)[0] == 429
        assert len(upstream.requests) == 5 + 2


async def test_a_row_that_takes_longer_than_it_is_waited_for_is_no_error(tmp_path: Path) -> None:
    """The database is away for a while, or the whole server was stopped for longer than the deadline: the sink goes on."""
    async with timed(tmp_path, pieces(STREAM, STOP), finish_seconds=0.01) as (world, process, _):
        came = asyncio.Event()

        async def pause(point: str) -> None:
            if point == "record":
                came.set()
                await asyncio.Event().wait()

        world.books.pause = pause
        assert await ask(process) == (200, STREAM + STOP)
        await came.wait()
        while not world.noted.lates:
            await asyncio.sleep(0)
        assert (world.noted.lates, world.noted.faults) == (["record a call"], [])
        assert len(world.books.settled) == 1
