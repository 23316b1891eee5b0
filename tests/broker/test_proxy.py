"""A request of a process reaches the upstream under the real credential, and its answer comes back as it was."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.raw import drop, exchange, hang, pieces, raw_upstream, request, then, whole
from broker.world import MODEL, SECRET, World, binding, encoded_request, request_body, turn
from claude_wrapper.broker import CredentialKind
from claude_wrapper.broker.meter import Meter
from claude_wrapper.errors import BudgetExceeded, Conflict, InvalidRequest, PermissionDenied, RateLimited
from claude_wrapper.wire.usage import UsageReader

pytestmark = pytest.mark.anyio

STREAM = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","model":"m","usage":'
    b'{"input_tokens":10,"cache_read_input_tokens":7,"output_tokens":1}}}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"event: message_stop \\u00e4"}}\n\n'
    b'event: ping\ndata: {"type":"ping"}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"b"}}\n\n'
    b'event: a_new_event\ndata: {"x":1}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":42}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
GOOD = encoded_request()


async def test_a_stream_reaches_the_process_and_the_books(world: World) -> None:
    process = await world.process()
    async with process.post(request_body("[[tokens 20]]")) as answer:
        text = await answer.read()
    assert answer.status == 200
    assert text.endswith(b'data: {"type":"message_stop"}\n\n')
    (call,) = await process.endpoint.end()
    assert (call.status, call.main, call.stream_complete, call.attempts, call.error_type) == (200, True, True, 1, None)
    assert call.usage.output_tokens > 0
    assert (call.org, call.session, call.turn, call.model) == ("org_1", "sesn_1", "turn_1", MODEL)
    assert call.upstream_request_id == world.upstream.requests[0].request_id
    assert call.first_byte_seconds is not None
    assert call.total_seconds >= call.first_byte_seconds
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


@given(cuts=st.lists(st.integers(1, len(STREAM) - 1), max_size=12, unique=True))
@settings(max_examples=60, deadline=None)
def test_usage_is_the_same_however_the_stream_is_cut_into_pieces(cuts: list[int]) -> None:
    meter = Meter(streamed=True, max_json_bytes=0)
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(STREAM)], strict=True):
        meter.feed(STREAM[start:end])
    meter.end()
    whole_stream = UsageReader()
    whole_stream.feed(STREAM)
    assert meter.usage == whole_stream.usage
    assert (meter.usage.input_tokens, meter.usage.cache_read_tokens, meter.usage.output_tokens) == (10, 7, 42)
    assert (meter.complete, meter.stop_reason, meter.error) == (True, "end_turn", None)


async def test_bytes_arrive_as_they_were_in_every_chunking(world: World) -> None:
    process = await world.process()
    for size in (1, 3, 7, 64, 1000):
        parts = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
        async with raw_upstream(pieces(*parts)) as upstream:
            process.endpoint.bind(binding(upstream.url))
            process.endpoint.begin(turn())
            async with process.post(GOOD) as answer:
                assert await answer.read() == STREAM
            (call,) = await process.endpoint.end()
            assert (call.usage.output_tokens, call.stream_complete) == (42, True)


async def test_each_piece_is_sent_on_when_it_comes(world: World) -> None:
    first, rest = STREAM[:200], STREAM[200:]
    go = asyncio.Event()

    async def later(writer: asyncio.StreamWriter) -> None:
        await go.wait()
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest))

    async with raw_upstream(then(first, later)) as upstream:
        process = await world.process()
        process.endpoint.bind(binding(upstream.url))
        async with process.post(GOOD) as answer:
            assert await answer.content.readany() == first
            go.set()
            assert await answer.content.read() == rest


async def test_the_body_goes_up_untouched_with_an_oauth_token_which_is_a_bearer(world: World) -> None:
    async with raw_upstream(pieces(STREAM)) as upstream:
        process = await world.process()
        process.endpoint.bind(binding(upstream.url, kind=CredentialKind.OAUTH))
        await exchange(process.endpoint, request(process.endpoint, GOOD, target="/v1/messages?beta=true"))
    (seen,) = upstream.requests
    head, _, body = seen.partition(b"\r\n\r\n")
    assert body == GOOD
    assert head.startswith(b"POST /v1/messages?beta=true HTTP/1.1\r\n")
    assert f"authorization: Bearer {SECRET}".encode() in head
    assert b"anthropic-beta: oauth-2025-04-20" in head
    assert b"x-api-key" not in head.lower()
    assert b"accept-encoding: identity" in head


async def test_a_turn_that_an_oauth_token_does_not_allow_is_refused_before_it_begins(world: World) -> None:
    process = await world.process(begun=False, kind=CredentialKind.OAUTH)
    with pytest.raises(InvalidRequest, match="temperature"):
        process.endpoint.begin(turn(overrides={"temperature": 0}))


async def test_token_counts_and_models_pass_too(world: World) -> None:
    process = await world.process()
    async with process.post(request_body(stream=False), path="/v1/messages/count_tokens?beta=true") as answer:
        assert (await answer.json())["input_tokens"] > 0
    async with process.get("/v1/models?limit=1") as answer:
        assert len((await answer.json())["data"]) == 1
    async with process.get(f"/v1/models/{MODEL}") as answer:
        assert (await answer.json())["id"] == MODEL
    calls = await process.endpoint.end()
    assert [(call.path, call.main, call.error_type, call.stream_complete) for call in calls] == [
        ("/v1/messages/count_tokens", False, None, True),
        ("/v1/models", False, None, True),
        (f"/v1/models/{MODEL}", False, None, True),
    ]
    assert world.books.balanced


async def test_a_whole_answer_is_metered_as_well(world: World) -> None:
    process = await world.process()
    async with process.post(request_body(stream=False)) as answer:
        assert (await answer.json())["usage"]["output_tokens"] > 0
    (call,) = await process.endpoint.end()
    assert (call.usage.output_tokens > 0, call.main, call.stream_complete) == (True, False, True)


async def test_an_unbound_slot_reaches_nothing(world: World) -> None:
    process = await world.process(bound=False)
    async with process.post(GOOD) as answer:
        assert answer.status == 401
        assert (await answer.json())["error"]["type"] == "authentication_error"
    process.endpoint.bind(binding(world.upstream.url))
    async with process.post(GOOD) as answer:
        assert answer.status == 403
    process.endpoint.begin(turn())
    async with process.post(GOOD) as answer:
        assert answer.status == 200
        await answer.read()
    process.endpoint.unbind()
    async with process.post(GOOD) as answer:
        assert answer.status == 401
    assert len(world.upstream.requests) == 1


async def test_a_slot_is_never_bound_to_two_organisations_at_once(world: World) -> None:
    process = await world.process()
    with pytest.raises(Conflict):
        process.endpoint.bind(binding(world.upstream.url, org="org_2"))
    with pytest.raises(Conflict):
        (await world.process(bound=False)).endpoint.begin(turn())


async def test_nothing_of_one_session_goes_on_under_the_next(world: World) -> None:
    async with raw_upstream(then(STREAM[:300], hang)) as upstream:
        process = await world.process()
        process.endpoint.bind(binding(upstream.url))
        process.endpoint.begin(turn())
        reader, writer = await asyncio.open_unix_connection(str(process.endpoint.socket))
        writer.write(request(process.endpoint, GOOD))
        await reader.readuntil(b"\n\n")
        process.endpoint.bind(binding(upstream.url, session="sesn_2"))
        await upstream.closed.wait()
        async with process.post(GOOD) as answer:
            assert answer.status == 403, "the next session's turn has not begun"
        writer.close()
    await process.endpoint.close()
    assert [call.session for call in world.books.recorded] == ["sesn_1"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "claude-opus-5-5"}, "the model 'claude-opus-5-5'"),
        ({"model": "claude-haiku-4-5"}, "the model 'claude-haiku-4-5'"),
        ({"model": ""}, "the model ''"),
        ({"fallbacks": [{"model": "claude-opus-5-5"}]}, "`fallbacks`"),
        ({"fallbacks": "default"}, "`fallbacks`"),
        ({"speed": "fast"}, "`speed`"),
        ({"tools": [{"name": "Read"}, {"type": "advisor_20260301", "model": MODEL}]}, "a tool that is a model"),
    ],
)
@pytest.mark.parametrize("kind", list(CredentialKind))
async def test_a_turn_is_for_its_own_model_alone(
    world: World, changes: dict[str, Any], named: str, kind: CredentialKind
) -> None:
    process = await world.process(kind=kind)
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        async with process.post(request_body(**changes), path) as answer:
            assert answer.status == 403
            error = (await answer.json())["error"]
        assert error["type"] == "permission_error"
        assert error["message"].startswith("model_not_allowed: ")
        assert named in error["message"]
    assert not world.upstream.requests
    assert world.noted.models == [(MODEL, named)] * 2


async def test_the_turns_model_may_be_named_with_and_without_its_context_suffix(world: World) -> None:
    process = await world.process(begun=False)
    process.endpoint.begin(turn(model=MODEL + "[1m]"))
    async with process.post(request_body(tools=[{"name": "model", "input_schema": {"model": 1}}])) as answer:
        assert answer.status == 200


async def test_tokens_are_counted_between_turns_by_the_last_turns_model_and_before_any_by_none(world: World) -> None:
    process = await world.process(begun=False)

    async def status(model: str) -> int:
        async with process.post(request_body(model=model), "/v1/messages/count_tokens") as answer:
            return int(answer.status)

    assert await status(MODEL) == 403
    process.endpoint.begin(turn())
    await process.endpoint.end()
    assert [await status(MODEL), await status("claude-haiku-4-5")] == [200, 403]
    process.endpoint.bind(binding(world.upstream.url, session="sesn_2"))
    assert await status(MODEL) == 403


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (BudgetExceeded("no money left"), 402, "billing_error"),
        (RateLimited("too fast", retry_after=7), 429, "rate_limit_error"),
        (PermissionDenied("no"), 403, "permission_error"),
    ],
)
async def test_what_the_gate_refuses_ends_the_call_and_nothing_is_booked(
    world: World, error: Exception, status: int, kind: str
) -> None:
    process = await world.process()
    world.books.refuse = error
    async with process.post(GOOD) as answer:
        assert answer.status == status
        assert (await answer.json())["error"] == {"type": kind, "message": str(error)}
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers.get("retry-after") == ("7" if status == 429 else None)
    assert [(one.status, one.error_type, one.attempts) for one in await process.endpoint.end()] == [(status, kind, 0)]
    assert world.books.recorded == []
    assert world.books.balanced
    assert not world.upstream.requests


async def test_a_gate_that_breaks_is_an_error_and_not_a_way_through(world: World) -> None:
    process = await world.process()
    world.books.refuse = ZeroDivisionError("oops")
    async with process.post(GOOD) as answer:
        assert answer.status == 500
        assert "oops" not in await answer.text()
    assert len(world.noted.faults) == 1
    assert not world.upstream.requests


async def test_priming_is_answered_without_an_upstream(world: World) -> None:
    process = await world.process(bound=False)
    with process.endpoint.prime():
        async with process.post(GOOD) as answer:
            text = await answer.text()
        async with process.post(request_body(stream=False)) as answer:
            message = await answer.json()
        async with process.post(request_body(), path="/v1/messages/count_tokens") as answer:
            assert await answer.json() == {"input_tokens": 1}
        async with process.get("/v1/models") as answer:
            assert answer.status == 401
    reader = UsageReader()
    reader.feed(text.encode())
    assert (reader.complete, reader.model, reader.error) == (True, MODEL, None)
    assert message["model"] == MODEL
    async with process.post(GOOD) as answer:
        assert answer.status == 401
    assert not world.upstream.requests
    assert world.books.reserved == []


async def test_two_slots_never_mix(world: World) -> None:
    processes = [
        await world.process(session=f"sesn_{n}", org=f"org_{n}", secret=f"sk-{n}", id=f"cred_{n}") for n in range(8)
    ]

    async def ask(number: int, times: int) -> list[str]:
        texts = []
        for turn_number in range(times):
            async with processes[number].post(request_body(f"[[say slot {number} turn {turn_number}]]")) as answer:
                texts.append(await answer.text())
        return texts

    answers = await asyncio.gather(*(ask(number, 10) for number in range(8)))
    for number, texts in enumerate(answers):
        for turn_number, text in enumerate(texts):
            said = "".join(
                json.loads(line[6:])["delta"].get("text", "")
                for line in text.splitlines()
                if line.startswith("data: ") and "text_delta" in line
            )
            assert said == f"slot {number} turn {turn_number}"
        calls = await processes[number].endpoint.end()
        assert {(call.session, call.org, call.credential_id) for call in calls} == {
            (f"sesn_{number}", f"org_{number}", f"cred_{number}")
        }
    for seen in world.upstream.requests:
        assert seen.text.startswith(f"[[say slot {seen.headers['x-api-key'].removeprefix('sk-')} ")
    assert world.books.balanced


async def test_cookies_of_one_answer_do_not_travel_with_another_call(world: World) -> None:
    cookie = whole("200 OK", b"{}", "set-cookie: tenant=1; path=/\r\ncontent-type: application/json")
    async with raw_upstream(cookie) as upstream:
        process = await world.process()
        process.endpoint.bind(binding(upstream.url))
        for _ in range(2):
            async with process.post(GOOD) as answer:
                assert "set-cookie" not in answer.headers
                await answer.read()
        assert b"cookie" not in upstream.requests[1].lower()


async def test_a_redirect_is_not_followed_and_a_compressed_answer_not_passed_on(world: World) -> None:
    process = await world.process()
    redirect = whole("307 Temporary Redirect", b"", "location: http://169.254.169.254/")
    zipped = whole("200 OK", b"\x1f\x8b", "content-encoding: gzip\r\ncontent-type: text/event-stream")
    for answer_with in (redirect, zipped):
        async with raw_upstream(answer_with) as upstream:
            process.endpoint.bind(binding(upstream.url))
            async with process.post(GOOD) as answer:
                assert answer.status == 502
            assert len(upstream.requests) == 1


async def test_a_dropped_stream_stays_a_dropped_stream_and_a_hanging_one_ends_with_the_process(world: World) -> None:
    async with raw_upstream(then(STREAM[:300], drop)) as upstream:
        process = await world.process()
        process.endpoint.bind(binding(upstream.url))
        process.endpoint.begin(turn())
        got = await exchange(process.endpoint, request(process.endpoint, GOOD))
        assert got.endswith(b"\r\n")
        assert not got.endswith(b"0\r\n\r\n")
        (call,) = await process.endpoint.end()
        assert (call.status, call.error_type, call.stream_complete) == (200, "stream_cut", False)
        assert call.usage.input_tokens == 10
    async with raw_upstream(then(STREAM[:300], hang)) as upstream:
        process.endpoint.bind(binding(upstream.url))
        process.endpoint.begin(turn())
        _, writer = await asyncio.open_unix_connection(str(process.endpoint.socket))
        writer.write(request(process.endpoint, GOOD))
        while not upstream.requests:
            await asyncio.sleep(0)
        writer.close()
        async with asyncio.timeout(1):
            await upstream.closed.wait()
