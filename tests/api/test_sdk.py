"""The official `anthropic` SDK, unmodified: only its base URL is ours."""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import anthropic
import pydantic
import pytest
from anthropic import AsyncAnthropic, beta_async_tool

from running_server import KEY, Running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

MODEL = "claude-sonnet-5-5"
PIXEL = base64.b64encode(
    base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
).decode()


@pytest.fixture
async def client(server: Running) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


async def test_create_returns_a_message_with_usage_and_request_id(client: AsyncAnthropic) -> None:
    message = await client.messages.create(
        model=MODEL, max_tokens=64, messages=[{"role": "user", "content": "good morning"}]
    )
    assert message.content[0].text == "You said: good morning"
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0
    assert message._request_id.startswith("req_")


async def test_stream_gives_the_text_in_parts_and_the_same_final_message(client: AsyncAnthropic) -> None:
    async with client.messages.stream(
        model=MODEL, max_tokens=64, messages=[{"role": "user", "content": "[[tokens 20]]"}]
    ) as stream:
        parts = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert len(parts) == 20
    assert "".join(parts) == final.content[0].text


async def test_a_conversation_of_response_objects_stays_on_its_process(client: AsyncAnthropic) -> None:
    messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": "first"}]
    first = await client.messages.with_raw_response.create(model=MODEL, max_tokens=64, messages=messages)
    messages += [
        {"role": "assistant", "content": (await first.parse()).content},
        {"role": "user", "content": "[[recall]]"},
    ]
    second = await client.messages.with_raw_response.create(model=MODEL, max_tokens=64, messages=messages)
    assert second.headers["cw-process"] == "warm"
    assert second.headers["cw-process-pid"] == first.headers["cw-process-pid"]
    assert "first" in (await second.parse()).content[0].text


class Person(pydantic.BaseModel):
    """What is asked for."""

    name: str
    age: int


async def test_parse_gives_structured_output(client: AsyncAnthropic) -> None:
    parsed = await client.messages.parse(
        model=MODEL,
        max_tokens=64,
        messages=[{"role": "user", "content": "[[structured]]"}],
        output_format=Person,
    )
    assert isinstance(parsed.parsed_output, Person)


async def test_images_and_documents_reach_the_model_unchanged(client: AsyncAnthropic, server: Running) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a paper"}}
    await client.messages.create(
        model=MODEL,
        max_tokens=64,
        messages=[{"role": "user", "content": [image, document, {"type": "text", "text": "look"}]}],
    )
    user = next(one for one in server.upstream.calls[-1].body["messages"] if one["role"] == "user")
    sent = [{name: value for name, value in block.items() if name != "cache_control"} for block in user["content"]]
    assert sent == [image, document, {"type": "text", "text": "look"}]


async def test_thinking_is_streamed_and_returned(client: AsyncAnthropic, server: Running) -> None:
    message = await client.messages.create(
        model=MODEL,
        max_tokens=4096,
        thinking={"type": "enabled", "budget_tokens": 2048},
        messages=[{"role": "user", "content": "[[think hmm]] [[say done]]"}],
    )
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert server.upstream.calls[-1].body["thinking"] == {"type": "enabled", "budget_tokens": 2048}


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, anthropic.BadRequestError),
        (403, anthropic.PermissionDeniedError),
        (429, anthropic.RateLimitError),
        (529, anthropic.OverloadedError),
    ],
)
async def test_upstream_errors_raise_the_sdks_own_classes(
    client: AsyncAnthropic, status: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await client.messages.create(
            model=MODEL, max_tokens=64, messages=[{"role": "user", "content": f"[[error {status}]]"}]
        )


async def test_a_wrong_key_is_an_authentication_error(server: Running) -> None:
    async with AsyncAnthropic(base_url=server.url, api_key="sk-cw-wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(model=MODEL, max_tokens=64, messages=[{"role": "user", "content": "hi"}])


async def test_models_and_token_counts_come_from_upstream(client: AsyncAnthropic) -> None:
    models = [model.id async for model in client.models.list()]
    assert MODEL in models
    assert (await client.models.retrieve("sonnet")).id == MODEL
    count = await client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "x" * 400}])
    assert count.input_tokens >= 100
    with pytest.raises(anthropic.NotFoundError):
        await client.models.retrieve("claude-nothing-1")


@beta_async_tool
async def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Which one.
    """
    return f"sunny in {city}"


async def test_the_tool_runner_works_with_parallel_tools_of_the_caller(client: AsyncAnthropic, server: Running) -> None:
    prompt = '[[tool mcp__client__get_weather {"city": "Paris"}]] [[tool mcp__client__get_weather {"city": "Rome"}]] [[then]]'
    runner = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=256, tools=[get_weather], messages=[{"role": "user", "content": prompt}]
    )
    async with asyncio.timeout(30):
        messages = [message async for message in runner]
    assert [message.stop_reason for message in messages] == ["tool_use", "end_turn"]
    assert [block.name for block in messages[0].content if block.type == "tool_use"] == ["get_weather"] * 2
    assert "sunny in Paris" in messages[-1].content[0].text
    assert "sunny in Rome" in messages[-1].content[0].text


async def test_the_previous_major_of_the_sdk_works_too(server: Running) -> None:
    site = next(Path(__file__).parents[2].glob(".venv-sdk1/lib/python*/site-packages"), None)
    if site is None:
        pytest.skip("the previous SDK is not installed: run `make setup`")
    script = f"""
import anthropic
assert anthropic.__version__.startswith("1.")
client = anthropic.Anthropic(base_url={server.url!r}, api_key={KEY!r}, max_retries=0)
message = client.messages.create(model={MODEL!r}, max_tokens=64, messages=[{{"role": "user", "content": "old"}}])
assert message.content[0].text == "You said: old", message
with client.messages.stream(model={MODEL!r}, max_tokens=64, messages=[{{"role": "user", "content": "[[tokens 5]]"}}]) as s:
    assert len(list(s.text_stream)) == 5
try:
    client.messages.create(model={MODEL!r}, max_tokens=64, messages=[{{"role": "user", "content": "[[error 429]]"}}])
except anthropic.RateLimitError:
    print("ok")
"""
    python = site.parents[2] / "bin" / "python"
    process = await asyncio.create_subprocess_exec(
        python, "-c", script, env={"PATH": os.environ["PATH"]}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert output.decode().strip() == "ok"
