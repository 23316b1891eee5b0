"""A request of a process reaches the upstream under the real credential, and its answer comes back as it was."""

from __future__ import annotations

import pytest

from broker.world import MODEL, SECRET, World, request_body

pytestmark = pytest.mark.anyio


async def test_a_stream_reaches_the_process_and_the_books(world: World) -> None:
    process = await world.process()
    async with process.post(request_body("[[tokens 20]]")) as answer:
        text = await answer.read()
    assert answer.status == 200
    assert text.endswith(b'data: {"type":"message_stop"}\n\n')
    (call,) = await process.endpoint.end()
    assert (call.status, call.main, call.stream_complete, call.attempts, call.error_type) == (200, True, True, 1, None)
    assert call.usage.output_tokens > 0
    assert call.model == MODEL
    assert world.books.recorded == [call]
    assert world.books.settled == [call]
    assert world.noted.faults == []


@pytest.mark.parametrize("unix", [True, False])
async def test_the_upstream_sees_the_real_key_and_nothing_of_the_dummy(world: World, unix: bool) -> None:
    process = await world.process(unix=unix)
    async with process.post(request_body(), authorization=f"Bearer {process.endpoint.token}") as answer:
        await answer.read()
    (seen,) = world.upstream.requests
    assert seen.headers["x-api-key"] == SECRET
    assert "authorization" not in seen.headers
    assert process.endpoint.token not in repr(dict(seen.headers))
    assert SECRET not in repr(dict(answer.headers))
