"""The listener against hostile bytes: nothing but one well-formed request at a time gets through."""

from __future__ import annotations

import asyncio
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from broker.raw import complete, exchange, hang, raw_upstream, request, then, whole
from broker.world import World, binding, encoded_request, turn
from claude_wrapper.broker import BrokerSettings
from claude_wrapper.errors import ConfigurationError, Conflict

pytestmark = pytest.mark.anyio

GOOD = encoded_request()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


async def test_only_the_owner_of_the_directory_can_connect(world: World) -> None:
    process = await world.process()
    assert process.endpoint.socket is not None
    found = process.endpoint.socket.stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    await process.endpoint.close()
    assert not process.endpoint.socket.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
async def test_the_socket_belongs_to_the_tenant_s_uid(world: World) -> None:
    run = world.tmp / "tenant"
    run.mkdir(mode=0o700)
    os.chown(run, 20001, 20001)
    endpoint = await world.broker.open("slot_t", run / "api.sock")
    assert endpoint.socket is not None
    found = endpoint.socket.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (20001, 20001, 0o600)


async def test_a_socket_left_by_a_killed_server_is_replaced_and_a_long_path_works(world: World) -> None:
    run = world.tmp / ("d" * 120)
    run.mkdir()
    (run / "api.sock").touch()
    endpoint = await world.broker.open("slot_x", run / "api.sock")
    assert stat.S_ISSOCK((run / "api.sock").stat().st_mode)
    await endpoint.close()


async def test_a_directory_that_is_a_link_is_refused(world: World) -> None:
    (world.tmp / "real").mkdir()
    (world.tmp / "link").symlink_to(world.tmp / "real")
    with pytest.raises(ConfigurationError, match="cannot listen"):
        await world.broker.open("slot_l", world.tmp / "link" / "api.sock")
    await world.broker.open("slot_l", world.tmp / "real" / "api.sock")
    with pytest.raises(Conflict):
        await world.broker.open("slot_l", world.tmp / "real" / "api.sock")


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"GET / HTTP/1.0\r\n\r\n", 505),
        (b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com\r\n\r\n", 404),
        (b"POST http://api.anthropic.com/v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n", 404),
        (b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!", 400),
        (
            b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 1 \r\n a: b\r\n\r\n", 400),
        (b"POST /v1/messages HTTP/1.1\r\nhost : x\r\n\r\n", 400),
        (b"POST /v1/messages HTTP/1.1\r\nbad\x00name: x\r\n\r\n", 400),
        (b"POST /v1/messages HTTP/1.1\nhost: x\n\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 400),
        (b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        (b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n", 401),
        (b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: wrong\r\ncontent-length: 0\r\n\r\n", 401),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 70_000, 431),
    ],
)
async def test_malformed_or_forbidden_requests_are_refused(world: World, sent: bytes, expected: int) -> None:
    process = await world.process()
    answer = await exchange(process.endpoint, sent)
    assert status(answer) == expected, answer
    assert not world.upstream.requests
    assert world.noted.faults == []


async def test_the_token_of_another_slot_is_refused(world: World) -> None:
    mine, other = await world.process(), await world.process()
    async with mine.post(GOOD, **{"x-api-key": other.endpoint.token}) as answer:
        assert answer.status == 401
    assert not world.upstream.requests


async def test_a_loopback_path_with_a_wrong_token_leads_nowhere(world: World) -> None:
    process = await world.process(unix=False)
    base, _, secret = process.endpoint.base_url.rpartition("/")
    assert len(secret) == 52
    for path in (f"{base}/{secret[:-1]}x/v1/messages", f"{base}/v1/messages", f"{base}//{secret}/v1/messages"):
        async with process.session.post(path, data=GOOD, headers=process.headers) as answer:
            assert answer.status == 404
    await process.endpoint.close()
    async with process.post(GOOD) as answer:
        assert answer.status == 404


async def test_a_second_request_before_the_answer_cuts_the_connection(world: World) -> None:
    async with raw_upstream(hang) as upstream:
        process = await world.process()
        process.endpoint.bind(binding(upstream.url))
        reader, writer = await asyncio.open_unix_connection(str(process.endpoint.socket))
        writer.write(request(process.endpoint, GOOD))
        while not upstream.requests:
            await asyncio.sleep(0)
        writer.write(request(process.endpoint, GOOD))
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        await upstream.closed.wait()
        both = request(process.endpoint, GOOD) + request(process.endpoint, GOOD)
        assert status(await exchange(process.endpoint, both)) == 400


async def test_a_request_hidden_in_a_body_stays_a_body(world: World) -> None:
    async with raw_upstream(whole("200 OK", b"{}")) as upstream:
        process = await world.process()
        process.endpoint.bind(binding(upstream.url))
        hidden = encoded_request("POST /v1/files HTTP/1.1\r\nhost: x\r\n\r\n")
        chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(hidden), hidden)
        head = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {process.endpoint.token}\r\n"
        await exchange(process.endpoint, head.encode() + b"transfer-encoding: chunked\r\n\r\n" + chunked)
        (seen,) = upstream.requests
        assert seen.endswith(hidden)
        assert b"chunked" not in seen


async def test_large_bodies_pass_up_to_the_bound_and_larger_ones_get_413_at_once(tmp_path: Path) -> None:
    settings = BrokerSettings(max_body_bytes=3_000_000)
    async with (
        asyncio.timeout(20),
        World(tmp_path, settings) as world,
        raw_upstream(whole("200 OK", b"{}")) as upstream,
    ):
        process = await world.process()
        process.endpoint.bind(binding(upstream.url))
        large = encoded_request("x" * 2_900_000)
        assert status(await exchange(process.endpoint, request(process.endpoint, large))) == 200
        assert upstream.requests[0].endswith(large)
        announced = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {process.endpoint.token}\r\n"
        answer = await exchange(
            process.endpoint, (announced + "content-length: 10000000000\r\n\r\n").encode(), b"x" * 9999
        )
        assert status(answer) == 413
        assert b"request_too_large" in answer
        chunk = b"%x\r\n%b\r\n" % (1_000_000, b"x" * 1_000_000)
        unannounced = (announced + "transfer-encoding: chunked\r\n\r\n").encode()
        assert status(await exchange(process.endpoint, unannounced, chunk, chunk, chunk, chunk)) == 413
        expecting = request(process.endpoint, large, extra="expect: 100-continue\r\n")
        assert (await exchange(process.endpoint, expecting)).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert process.endpoint._buffered == 0


async def test_bodies_in_memory_and_calls_in_work_are_bounded_per_endpoint(tmp_path: Path) -> None:
    settings = BrokerSettings(max_buffered_bytes=10_000, max_calls=2)
    async with asyncio.timeout(20), World(tmp_path, settings) as world, raw_upstream(hang) as upstream:
        process = await world.process()
        process.endpoint.bind(binding(upstream.url))
        assert status(await exchange(process.endpoint, request(process.endpoint, b"x" * 10_001))) == 429
        waiting = [await asyncio.open_unix_connection(str(process.endpoint.socket)) for _ in range(2)]
        for _, writer in waiting:
            writer.write(request(process.endpoint, GOOD))
        while len(upstream.requests) < 2:
            await asyncio.sleep(0)
        assert status(await exchange(process.endpoint, request(process.endpoint, GOOD))) == 429
        for _, writer in waiting:
            writer.close()


async def test_a_thousand_connections_leave_room_for_others(tmp_path: Path) -> None:
    settings = BrokerSettings(max_connections=8)
    async with asyncio.timeout(30), World(tmp_path, settings) as world:
        process, other = await world.process(), await world.process()
        held = [await asyncio.open_unix_connection(str(process.endpoint.socket)) for _ in range(8)]
        for _ in range(200):
            reader, writer = await asyncio.open_unix_connection(str(process.endpoint.socket))
            assert await reader.read() == b""
            writer.close()
        async with other.post(GOOD) as answer:
            assert answer.status == 200
        for _, writer in held:
            writer.close()
        await held[0][0].read()
        while process.endpoint._connections:
            await asyncio.sleep(0)
        async with process.post(GOOD) as answer:
            assert answer.status == 200


async def test_a_request_that_never_ends_is_given_up(tmp_path: Path) -> None:
    settings = BrokerSettings(receive_seconds=0.05)
    async with asyncio.timeout(20), World(tmp_path, settings) as world:
        process = await world.process()
        for started in (b"POST /v1/mess", request(process.endpoint, GOOD)[:-5]):
            assert status(await exchange(process.endpoint, started)) == 408


async def test_one_connection_serves_many_requests(world: World) -> None:
    process = await world.process()
    reader, writer = await asyncio.open_unix_connection(str(process.endpoint.socket))
    for _ in range(5):
        writer.write(request(process.endpoint, GOOD, extra="anthropic-version: 2023-06-01\r\n"))
        got = b""
        while not complete(got):
            piece = await reader.read(65536)
            assert piece
            got += piece
        assert status(got) == 200
    writer.close()
    assert len(await process.endpoint.end()) == 5


async def test_a_process_that_does_not_read_is_cut_and_slows_nobody(tmp_path: Path) -> None:
    settings = BrokerSettings(stall_seconds=0.1, write_buffer_bytes=1000)
    flood = b"event: ping\ndata: {}\n\n" * 1000

    async def endless(writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(b"%x\r\n%b\r\n" % (len(flood), flood))
            await writer.drain()

    async with asyncio.timeout(20), World(tmp_path, settings) as world, raw_upstream(then(flood, endless)) as upstream:
        process = await world.process()
        process.endpoint.bind(binding(upstream.url))
        process.endpoint.begin(turn())
        _, writer = await asyncio.open_unix_connection(str(process.endpoint.socket))
        writer.transport.pause_reading()
        writer.write(request(process.endpoint, GOOD))
        while not world.books.recorded:
            await asyncio.sleep(0.01)
        writer.close()
        assert world.books.recorded[0].error_message == "The process did not read its answer."
