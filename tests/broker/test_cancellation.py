"""However a call is cut, and wherever it stands: the upstream is let go, and the books are kept exactly once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.raw import RawUpstream, hang, pieces, raw_upstream, request, then, whole
from broker.world import Process, World, binding, encoded_request, turn

pytestmark = pytest.mark.anyio

GOOD = encoded_request()
STREAM = b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":3}}}\n\n'
STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
ERROR = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'


class Gateway:
    """Holds the call at a named point of the books until released."""

    def __init__(self, at: str) -> None:
        self.at = at
        self.reached = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, name: str) -> None:
        if name == self.at:
            self.reached.set()
            await self.go.wait()


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def begin_call(world: World, upstream: RawUpstream) -> tuple[Process, asyncio.StreamReader, asyncio.StreamWriter]:
    process = await world.process()
    process.endpoint.bind(binding(upstream.url))
    process.endpoint.begin(turn())
    reader, writer = await asyncio.open_unix_connection(str(process.endpoint.socket))
    writer.write(request(process.endpoint, GOOD))
    return process, reader, writer


async def cut(how: str, process: Process, writer: asyncio.StreamWriter) -> None:
    match how:
        case "disconnect":
            writer.transport.abort()
        case "end":
            await process.endpoint.end()
        case "cancel_calls":
            await process.endpoint.cancel_calls()
        case "unbind":
            process.endpoint.unbind()
        case "close":
            await process.endpoint.close()


HOW = ["disconnect", "end", "cancel_calls", "unbind", "close"]


@pytest.mark.parametrize("how", HOW)
async def test_a_call_that_waits_for_its_answer_is_cut_upstream_within_a_second(world: World, how: str) -> None:
    async with raw_upstream(hang) as upstream:
        process, _, writer = await begin_call(world, upstream)
        await until(lambda: upstream.requests)
        async with asyncio.timeout(1):
            await cut(how, process, writer)
            await upstream.closed.wait()
        await until(lambda: world.books.recorded)
        (call,) = world.books.recorded
        assert (call.status, call.error_type, call.attempts, call.stream_complete) == (499, "cancelled", 1, False)
        assert world.books.settled == [call]
        assert world.books.balanced
        writer.close()


@pytest.mark.parametrize("how", HOW)
async def test_a_stream_in_the_middle_is_cut_upstream_within_a_second(world: World, how: str) -> None:
    async with raw_upstream(then(STREAM, hang)) as upstream:
        process, reader, writer = await begin_call(world, upstream)
        await reader.readuntil(b"}}}\n\n")
        async with asyncio.timeout(1):
            await cut(how, process, writer)
            await upstream.closed.wait()
        await until(lambda: world.books.recorded)
        (call,) = world.books.recorded
        assert (call.status, call.error_type, call.stream_complete) == (200, "cancelled", False)
        assert call.usage.input_tokens == 3
        assert world.books.settled == [call]
        writer.close()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("at", ["reserve", "reserved"])
async def test_a_reservation_made_while_the_call_is_cut_is_given_back(world: World, how: str, at: str) -> None:
    world.books.pause = gateway = Gateway(at)
    async with raw_upstream(hang) as upstream:
        process, _, writer = await begin_call(world, upstream)
        await gateway.reached.wait()
        await cut(how, process, writer)
        await until(lambda: not process.endpoint._in_work)
        gateway.go.set()
        await until(lambda: world.books.cancelled)
        assert world.books.balanced
        assert world.books.recorded == []
        assert not upstream.requests
        writer.close()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("at", ["settle", "record"])
async def test_books_that_are_being_written_are_finished(world: World, how: str, at: str) -> None:
    world.books.pause = gateway = Gateway(at)
    async with raw_upstream(pieces(STREAM, STOP)) as upstream:
        process, reader, writer = await begin_call(world, upstream)
        await reader.readuntil(b"0\r\n\r\n")
        await gateway.reached.wait()
        asyncio.get_running_loop().call_later(0.02, gateway.go.set)
        await cut(how, process, writer)
        await until(lambda: world.books.recorded)
        (call,) = world.books.recorded
        assert (call.status, call.error_type, call.stream_complete) == (200, None, True)
        assert world.books.settled == [call]
        assert world.books.balanced
        writer.close()


@pytest.mark.parametrize("how", HOW)
async def test_a_call_that_waits_to_try_again_is_cut(world: World, how: str) -> None:
    busy = whole("529 Overloaded", ERROR, "content-type: application/json\r\nretry-after: 20")
    async with raw_upstream(busy) as upstream:
        process, _, writer = await begin_call(world, upstream)
        await until(lambda: world.noted.retries)
        async with asyncio.timeout(1):
            await cut(how, process, writer)
            await until(lambda: world.books.recorded)
        (call,) = world.books.recorded
        assert (call.attempts, call.status) == (1, 499)
        assert world.books.settled == [call]
        assert len(upstream.requests) == 1
        writer.close()


@pytest.mark.parametrize("steps", range(0, 40, 2))
async def test_cutting_after_any_number_of_steps_keeps_the_books(world: World, steps: int) -> None:
    async with raw_upstream(pieces(STREAM, STOP)) as upstream:
        process, _, writer = await begin_call(world, upstream)
        for _ in range(steps):
            await asyncio.sleep(0)
        writer.transport.abort()
        calls = await process.endpoint.end()
        await until(lambda: not process.endpoint._running)
        assert world.books.balanced
        assert world.books.recorded == list(world.books.settled)
        assert len(world.books.recorded) in {len(calls), len(world.noted.calls)}
        assert len({call.id for call in world.books.recorded}) == len(world.books.recorded)
        assert process.endpoint._buffered == 0
        assert process.endpoint._in_work == 0


async def test_books_that_hang_or_fail_do_not_hold_up_the_turn(world: World) -> None:
    world.books.pause = Gateway("settle")
    async with raw_upstream(pieces(STREAM, STOP)) as upstream:
        process, reader, writer = await begin_call(world, upstream)
        await reader.readuntil(b"0\r\n\r\n")
        async with asyncio.timeout(5):
            (call,) = await process.endpoint.end()
        await until(lambda: world.books.recorded)
        assert world.books.recorded == [call]
        assert [where for where, _ in world.noted.faults] == ["settle a call"]
        writer.close()


async def test_an_answer_that_was_whole_is_not_called_cut(world: World) -> None:
    """The CLI ends its turn at `message_stop`, before the stream's own end has arrived."""
    async with raw_upstream(then(STREAM + STOP, hang)) as upstream:
        process, reader, writer = await begin_call(world, upstream)
        await reader.readuntil(b'"message_stop"}\n\n')
        (call,) = await process.endpoint.end()
        assert (call.status, call.error_type, call.stream_complete) == (200, None, True)
        writer.close()


async def test_closing_the_broker_ends_everything(world: World) -> None:
    async with raw_upstream(then(STREAM, hang)) as upstream:
        process, reader, writer = await begin_call(world, upstream)
        await reader.readuntil(b"}}}\n\n")
        async with asyncio.timeout(3):
            await world.broker.close()
            await upstream.closed.wait()
        assert len(world.books.recorded) == 1
        assert process.endpoint.socket is not None
        assert not process.endpoint.socket.exists()
        await reader.read()
        writer.close()
