"""`/v1/messages` through real HTTP, on the real CLI."""

from __future__ import annotations

import asyncio

import pytest

from running_server import Running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


def _text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


async def test_the_second_turn_of_a_stateless_client_runs_on_the_same_process(server: Running) -> None:
    first = await server.ask("one")
    assert (first.status, first.text) == (200, "You said: one")
    history = [{"role": "user", "content": "one"}, {"role": "assistant", "content": first.body["content"]}]
    second = await server.ask("two [[recall]]", history=history)
    assert second.headers["cw-process"] == "warm"
    assert second.pid == first.pid
    assert "one" in second.text


async def test_a_history_that_no_process_holds_is_injected_exactly(server: Running) -> None:
    history = [
        {"role": "user", "content": "my name is Ada"},
        {"role": "assistant", "content": "Hello Ada"},
        {"role": "user", "content": "I like tea"},
        {"role": "assistant", "content": [{"type": "text", "text": "Noted."}]},
    ]
    answer = await server.ask("[[history]]", history=history)
    assert answer.status == 200
    sent = [
        (message["role"], _text(message["content"]))
        for message in server.upstream.calls[-1].body["messages"]
        if message["role"] != "system"
    ]
    assert sent == [
        ("user", "my name is Ada"),
        ("assistant", "Hello Ada"),
        ("user", "I like tea"),
        ("assistant", "Noted."),
        ("user", "[[history]]"),
    ]


async def test_eight_requests_at_once_on_one_session_are_answered_in_order_and_never_crossed(server: Running) -> None:
    await server.ask("hello", session_id="shared")
    answers = await asyncio.gather(*(server.ask(f"[[say answer-{n}]]", session_id="shared") for n in range(8)))
    assert [answer.text for answer in answers] == [f"answer-{n}" for n in range(8)]
    assert len({answer.pid for answer in answers}) == 1


async def test_system_prompt_and_parameters_reach_upstream_as_given(server: Running) -> None:
    answer = await server.ask("[[system]]", system="Be terse.", temperature=0.5, stop_sequences=["END"], max_tokens=77)
    assert "Be terse." in answer.text
    body = server.upstream.calls[-1].body
    assert (body["temperature"], body["stop_sequences"], body["max_tokens"]) == (0.5, ["END"], 77)
    assert "thinking" not in body
    assert "claude-wrapper:system-placeholder" not in str(body)


async def test_upstream_errors_keep_their_status_and_the_next_turn_works(server: Running) -> None:
    for status, kind in ((400, "invalid_request_error"), (429, "rate_limit_error")):
        failed = await server.ask(f"[[error {status}]]", session_id="s")
        assert (failed.status, failed.body["error"]["type"]) == (status, kind)
    good = await server.ask("fine [[recall]]", session_id="s")
    assert good.status == 200
    assert "error" not in good.text
