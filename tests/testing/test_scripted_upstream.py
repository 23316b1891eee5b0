"""The scripted upstream is the Messages API to the official SDK."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx2
import pytest

from claude_wrapper.testing import ManualClock, ScriptedUpstream
from claude_wrapper.wire.usage import Usage

pytestmark = pytest.mark.anyio


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        yield running


@pytest.fixture
async def client(upstream: ScriptedUpstream) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=upstream.url, api_key="k", max_retries=0) as sdk:
        yield sdk


def ask(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "claude-sonnet-5-5", "max_tokens": 500, "messages": [{"role": "user", "content": prompt}]} | fields


async def said(client: anthropic.AsyncAnthropic, prompt: Any, **fields: Any) -> str:
    message = await client.messages.create(**ask(prompt, **fields))
    return "".join(block.text for block in message.content if block.type == "text")


async def test_it_echoes_in_several_deltas(client: anthropic.AsyncAnthropic, upstream: ScriptedUpstream) -> None:
    async with client.messages.stream(**ask("hello world")) as stream:
        pieces = [text async for text in stream.text_stream]
        message = await stream.get_final_message()
    assert pieces == ["You ", "said: ", "hello ", "world"]
    assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 4)
    assert upstream.usage_totals == Usage(input_tokens=3, output_tokens=4) == upstream.calls[0].usage
    whole = await client.messages.create(**ask("hello world"))
    assert whole.content[0].text == message.content[0].text == "You said: hello world"
    assert whole._request_id == upstream.calls[1].request_id


async def test_thinking_text_and_tools_stream_as_blocks(client: anthropic.AsyncAnthropic) -> None:
    prompt = '[[think let me see]] [[say Calling.]] [[tool weather {"city": "Paris"}]] [[tool time {}]]'
    async with client.messages.stream(**ask(prompt)) as stream:
        message = await stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[2].input == {"city": "Paris"}
    assert message.content[2].id != message.content[3].id
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens_details.thinking_tokens == 3


async def test_an_agent_loop_ends(client: anthropic.AsyncAnthropic) -> None:
    body = ask("[[tool a {}]] [[tool b {}]] [[then]] [[tool c {}]]")
    called = []
    for _ in range(5):
        message = await client.messages.create(**body)
        calls = [block for block in message.content if block.type == "tool_use"]
        if not calls:
            break
        called.append([call.name for call in calls])
        results = [{"type": "tool_result", "tool_use_id": call.id, "content": f"did {call.name}"} for call in calls]
        body["messages"] += [
            {"role": "assistant", "content": [block.to_dict() for block in message.content]},
            {"role": "user", "content": results},
        ]
    assert called == [["a", "b"], ["c"]]
    assert message.content[0].text == "Tool said: did c"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, anthropic.BadRequestError),
        (401, anthropic.AuthenticationError),
        (429, anthropic.RateLimitError),
        (529, anthropic.OverloadedError),
    ],
)
async def test_errors_are_the_apis(client: anthropic.AsyncAnthropic, status: int, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        await client.messages.create(**ask(f"[[error {status}]]"))
    assert caught.value.response.headers.get("retry-after") == ("1" if status in {429, 529} else None)  # type: ignore[attr-defined]


async def test_a_fault_may_happen_only_once(client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        await said(client, "[[error-once 503 overloaded_error]] hi")
    assert caught.value.type == "overloaded_error"
    assert await said(client, "[[error-once 503 overloaded_error]] hi") == "You said: hi"


async def test_a_text_may_be_answered_otherwise_each_time_that_it_arrives(client: anthropic.AsyncAnthropic) -> None:
    text = "[[say one]] [[again]] [[error 503]] [[again]] [[say three]]"
    assert await said(client, text) == "one"
    with pytest.raises(anthropic.APIStatusError):
        await said(client, text)
    assert [await said(client, text) for _ in range(2)] == ["three", "three"]


async def test_a_cut_stream_loses_the_connection_after_its_deltas(
    client: anthropic.AsyncAnthropic, upstream: ScriptedUpstream
) -> None:
    pieces = []
    with pytest.raises(httpx2.RemoteProtocolError):
        async with client.messages.stream(**ask("[[cut 2]] a b c d")) as stream:
            pieces = [text async for text in stream.text_stream if pieces.append(text) is None]
    assert pieces == ["You ", "said: "]
    record = await upstream.calls[0].wait_done()
    assert (record.dropped, record.cancelled) == (True, False)
    assert await said(client, "[[cut 2]] a b c d") == "You said: a b c d"


async def test_an_error_event_ends_a_stream(client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        async with client.messages.stream(**ask("[[error-after 1]] a b c")) as stream:
            await stream.get_final_message()
    assert caught.value.type == "overloaded_error"


async def test_a_client_that_hangs_up_is_noticed(client: anthropic.AsyncAnthropic, upstream: ScriptedUpstream) -> None:
    waiting = asyncio.ensure_future(client.messages.create(**ask("[[hang]]")))
    async with asyncio.timeout(20):
        (record,) = await upstream.wait_for(1)
        assert upstream.active == 1
        waiting.cancel()
        await record.wait_done()
    assert record.cancelled
    assert upstream.active == 0


async def test_a_hanging_stream_is_given_up_when_its_client_goes(
    client: anthropic.AsyncAnthropic, upstream: ScriptedUpstream
) -> None:
    async with asyncio.timeout(20):
        async with client.messages.stream(**ask("[[hang 2]] a b c d")) as stream:
            async for text in stream.text_stream:
                if text == "said: ":
                    break
        record = await upstream.calls[0].wait_done()
    assert record.cancelled


async def test_closing_ends_what_hangs() -> None:
    async with asyncio.timeout(20), anthropic.AsyncAnthropic(api_key="k", max_retries=0, base_url="x") as sdk:
        async with ScriptedUpstream() as upstream:
            waiting = asyncio.ensure_future(sdk.with_options(base_url=upstream.url).messages.create(**ask("[[hang]]")))
            await upstream.wait_for(1)
        with pytest.raises(anthropic.APIConnectionError):
            await waiting


async def test_delays_wait_on_the_injected_clock() -> None:
    clock = ManualClock()
    async with (
        asyncio.timeout(20),
        ScriptedUpstream(sleep=clock.sleep) as upstream,
        anthropic.AsyncAnthropic(api_key="k", base_url=upstream.url) as sdk,
    ):
        answer = asyncio.ensure_future(said_streaming(sdk, "[[first 50]] [[delay 10]] [[say a b c]]"))
        for seconds in (0.05, 0.01, 0.01, 0.01):
            assert not answer.done()
            await clock.wait_for_sleepers()
            await clock.advance(seconds)
        assert await answer == ["a ", "b ", "c"]


async def said_streaming(client: anthropic.AsyncAnthropic, prompt: str) -> list[str]:
    async with client.messages.stream(**ask(prompt)) as stream:
        return [text async for text in stream.text_stream]


async def test_it_tells_what_it_received(client: anthropic.AsyncAnthropic) -> None:
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    history = json.loads(await said(client, "", messages=[*turns, {"role": "user", "content": "[[history]]"}]))
    assert (history["messages"], history["texts"]) == (3, ["one", "two", "[[history]]"])
    assert json.loads(await said(client, "", messages=[*turns, {"role": "user", "content": "[[recall]]"}])) == ["one"]
    assert await said(client, "[[system]]", system="Be brief.") == "Be brief."
    assert json.loads(await said(client, "[[field metadata]]", metadata={"user_id": "u"})) == {"user_id": "u"}
    assert await said(client, "[[field temperature]]") == "null"


async def test_limits_and_stop_sequences_are_honoured(client: anthropic.AsyncAnthropic) -> None:
    message = await client.messages.create(**ask("[[tokens 50]]", max_tokens=3))
    assert (message.content[0].text, message.stop_reason) == ("1 2 3 ", "max_tokens")
    message = await client.messages.create(**ask("[[tokens 50]]", stop_sequences=["7", "4"]))
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("1 2 3 ", "stop_sequence", "4")
    message = await client.messages.create(**ask("[[stop refusal]] x"))
    assert (message.stop_reason, message.stop_details.type) == ("refusal", "refusal")


async def test_structured_output_fits_its_schema(client: anthropic.AsyncAnthropic) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answer = await said(client, "x", output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(answer) == {"n": 0}


async def test_models_and_tokens_are_served(client: anthropic.AsyncAnthropic) -> None:
    assert [model.id async for model in client.models.list(limit=1)] == [
        "claude-opus-5-5",
        "claude-sonnet-5-5",
        "claude-haiku-4-5",
    ]
    assert (await client.models.retrieve("haiku")).capabilities.thinking.types.adaptive.supported
    with pytest.raises(anthropic.NotFoundError):
        await client.models.retrieve("gpt")
    with pytest.raises(anthropic.NotFoundError, match="gpt"):
        await client.messages.create(**ask("x", model="gpt"))
    counted = await client.messages.count_tokens(model="opus", messages=[{"role": "user", "content": "x" * 40}])
    assert counted.input_tokens == 10


async def test_cached_tokens_grow_with_the_history(client: anthropic.AsyncAnthropic) -> None:
    marked = [{"type": "text", "text": "x" * 400, "cache_control": {"type": "ephemeral"}}]
    first = await client.messages.create(**ask("hi", system=marked))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "y" * 40}]
    messages = [*turns, {"role": "user", "content": "z"}]
    second = await client.messages.create(**ask("", messages=messages, system=marked))
    assert (first.usage.cache_creation_input_tokens, first.usage.cache_read_input_tokens) == (100, 0)
    assert (second.usage.cache_creation_input_tokens, second.usage.cache_read_input_tokens) == (10, 101)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one"),
        ([{"role": "assistant", "content": "x"}], "first message"),
        ([{"role": "user", "content": ""}], "non-empty"),
        ([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1"}]}], "unexpected `tool_use_id`"),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "n", "input": {}}]},
                {"role": "user", "content": "y"},
            ],
            "without `tool_result`",
        ),
    ],
)
async def test_it_is_strict_where_the_api_is(
    client: anthropic.AsyncAnthropic, messages: list[Any], reason: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=reason):
        await client.messages.create(**ask("", messages=messages))


async def test_keys_versions_bodies_and_paths_are_checked() -> None:
    async with ScriptedUpstream(api_keys={"right"}) as upstream, httpx2.AsyncClient(base_url=upstream.url) as http:
        version = {"anthropic-version": "2023-06-01"}
        for headers, status in [
            (version, 401),
            (version | {"x-api-key": "wrong"}, 401),
            ({"x-api-key": "right"}, 400),
            (version | {"x-api-key": "right"}, 200),
            (version | {"authorization": "Bearer right"}, 200),
        ]:
            answer = await http.post("/v1/messages?beta=true", json=ask("hi"), headers=headers)
            assert answer.status_code == status
        for content, status in [(b"{", 400), (b"[]", 400), (b'{"model":"opus"}', 400), (b"x" * (33 * 2**20), 413)]:
            answer = await http.post("/v1/messages", content=content, headers=version | {"x-api-key": "right"})
            assert answer.status_code == status
            assert answer.json()["type"] == "error"
        assert (await http.get("/v1/nothing")).status_code == 404
        assert upstream.calls[-1].status == 413
        assert upstream.count == 9
        upstream.forget()
        assert (upstream.count, list(upstream.requests), upstream.usage_totals) == (0, [], Usage())
