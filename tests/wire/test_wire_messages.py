"""Requests to /v1/messages: what is accepted, what is refused, and which field a refusal names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.wire.extensions import McpServer, OAuthCredentials
from claude_wrapper.wire.messages import Message, MessagesRequest, parse_messages_request

HELLO = {"role": "user", "content": "hello"}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "n", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "ok"}


def parse(**fields: Any) -> MessagesRequest:
    body = {"model": "claude-sonnet-5-5", "max_tokens": 100, "messages": [HELLO]} | fields
    return parse_messages_request(json.dumps(body).encode())


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    return caught.value


def test_a_plain_request_is_read() -> None:
    request = parse(stream=True, system="Be brief.", temperature=0.5, metadata={"user_id": "u"})
    assert (request.model, request.max_tokens, request.stream) == ("claude-sonnet-5-5", 100, True)
    assert request.messages == [Message("user", "hello")]
    assert request.system_blocks() == [{"type": "text", "text": "Be brief."}]
    assert request.overrides() == {"max_tokens": 100, "temperature": 0.5, "metadata": {"user_id": "u"}}
    assert request.extra == {}


def test_unknown_fields_are_kept_and_null_means_absent() -> None:
    request = parse(new_field={"a": [1]}, context_management=None, stream=None, system=None, agent=None)
    assert request.extra == {"new_field": {"a": [1]}, "context_management": None}
    assert (request.stream, request.system, request.agent) == (False, None, None)


def test_unknown_blocks_and_fields_of_blocks_pass_through_untouched() -> None:
    block = {"type": "hologram", "payload": {"deep": [None, 1.5]}, "cache_control": {"type": "ephemeral"}}
    assert parse(messages=[{"role": "user", "content": [block]}]).messages[0].content == [block]


def test_consecutive_turns_of_one_role_become_one() -> None:
    image = {"type": "image", "source": {"type": "url", "url": "https://example.com/x.png"}}
    request = parse(messages=[HELLO, {"role": "user", "content": [image]}, {"role": "user", "content": "there"}])
    hello, there = ({"type": "text", "text": text} for text in ("hello", "there"))
    assert request.messages == [Message("user", [hello, image, there])]


def test_history_and_new_messages_are_told_apart() -> None:
    answer = {"role": "assistant", "content": "hi"}
    request = parse(messages=[HELLO, answer, {"role": "user", "content": "more"}])
    assert [message.role for message in request.history()] == ["user", "assistant"]
    assert request.new_messages() == [Message("user", "more")]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"model":"\xff"}', b"[]", b"null", b'"x"', b'"\\ud800"'])
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"not valid JSON|must be a JSON object"):
        parse_messages_request(body)


@pytest.mark.parametrize("depth", [150, 900, 50_000])
def test_nesting_is_bounded_wherever_it_is(depth: int) -> None:
    nest = b"[" * depth + b"]" * depth
    places = [
        b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":[{"type":"x","y":%b}]}]}',
        b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"a"}],"surprise":{"y":%b}}',
        b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"a"}],"metadata":{"y":%b}}',
        b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"a"}],"thinking":{"type":"disabled","y":%b}}',
        b'{"model":"m","max_tokens":1,"messages":%b}',
    ]
    for place in places:
        with pytest.raises(InvalidRequest):
            parse_messages_request(place % nest)


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": 5}, "model", "expected `str`"),
    ({"model": ""}, "model", "length >= 1"),
    ({"max_tokens": None}, "max_tokens", "is required"),
    ({"max_tokens": "5"}, "max_tokens", "expected `int"),
    ({"max_tokens": -1}, "max_tokens", ">= 0"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": "hi"}, "messages", "expected `array`"),
    ({"messages": [5]}, "messages[0]", "expected `object`"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
    ({"messages": [HELLO, {"role": "tool", "content": "x"}]}, "messages[1].role", "'tool'"),
    ({"messages": [{"role": "assistant", "content": "x"}, HELLO]}, "messages[0].role", "first message"),
    ({"messages": [HELLO, {"role": "assistant", "content": "pre"}]}, "messages[1].role", "prefilling"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages", "at least one user message"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content", "empty"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "expected `str | array`"),
    (
        {"messages": [HELLO, {"role": "user", "content": [{"type": "text", "text": "a"}, 3]}]},
        "messages[1].content[1]",
        "",
    ),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0].content[0].type", "is required"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": " "}]}]},
        "messages[0].content[0].text",
        "non",
    ),
    ({"messages": [HELLO, {"role": "assistant", "content": [CALL]}, HELLO]}, "messages[2].content", "no tool result"),
    ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages[0].content", "no tool call"),
    ({"system": [{"type": "image"}]}, "system[0]", "text block"),
    ({"stop_sequences": ["a", 1]}, "stop_sequences[1]", "expected `str`"),
    ({"temperature": 1.1}, "temperature", "<= 1.0"),
    ({"top_k": 1.5}, "top_k", "expected `int"),
    ({"tools": [{"name": "a"}, {}]}, "tools[1].name", "is required"),
    ({"tools": [{"name": "a"}, "b"]}, "tools[1]", "expected `object`"),
    ({"tool_choice": {"type": ["auto"]}}, "tool_choice.type", "must be"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name", "is required"),
    ({"thinking": {"type": "sometimes"}}, "thinking.type", "must be"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "at least 1024"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.budget_tokens", "less than max_tokens"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type", "json_schema"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema", "is required"),
    ({"output_config": {"effort": 3}}, "output_config.effort", "string"),
    ({"agent": {"tool": "none"}}, "agent", "unknown field `tool`"),
    ({"agent": {"tools": 5}}, "agent.tools", "expected"),
    ({"agent": {"on_disconnect": "explode"}}, "agent.on_disconnect", "'explode'"),
    ({"agent": {"max_turns": 0}}, "agent.max_turns", ">= 1"),
    ({"session_id": "../etc"}, "session_id", "letters"),
    ({"session_id": "a\0b"}, "session_id", "letters"),
    ({"session_id": "a..b"}, "session_id", "letters"),
    ({"session_id": ""}, "session_id", "letters"),
    ({"session_id": "x" * 129}, "session_id", "letters"),
    ({"oauth_credentials": {"access_token": ""}}, "oauth_credentials.access_token", "length >= 1"),
    ({"oauth_credentials": {}}, "oauth_credentials.access_token", "is required"),
    ({"mcp_servers": 3}, "mcp_servers", "list of servers"),
    ({"mcp_servers": {"a b": {"command": "x"}}}, "mcp_servers.a b", "name"),
    ({"mcp_servers": {"client": {"command": "x"}}}, "mcp_servers.client", "reserved"),
    ({"mcp_servers": {"a": {"type": "pigeon"}}}, "mcp_servers.a.type", "'pigeon'"),
    ({"mcp_servers": {"a": {"type": ["x"]}}}, "mcp_servers.a.type", "must be"),
    ({"mcp_servers": {"a": {"command": "x", "args": "y"}}}, "mcp_servers.a.args", "list of strings"),
    ({"mcp_servers": {"a": {"command": "x\0"}}}, "mcp_servers.a.command", "NUL"),
    ({"mcp_servers": {"a": {"command": "x", "env": {"A=B": "c"}}}}, "mcp_servers.a.env.A=B", "environment"),
    ({"mcp_servers": {"a": {"url": "file:///etc/passwd"}}}, "mcp_servers.a.url", "http or https"),
    ({"mcp_servers": {"a": {"url": "http://x:y"}}}, "mcp_servers.a.url", "http or https"),
    ({"mcp_servers": [{"type": "url", "url": "https://x"}]}, "mcp_servers[0].name", "non-empty"),
    ({"mcp_servers": {"a": {"url": "https://x", "headers": {"A": "b\r\nC: d"}}}}, "mcp_servers.a.headers.A", "header"),
    ({"mcp_servers": [{"name": "a", "url": "https://x"}] * 2}, "mcp_servers", "two servers"),
    ({"mcp_servers": {f"s{n}": {"command": "x"} for n in range(21)}}, "mcp_servers", "at most 20"),
]


@pytest.mark.parametrize(("fields", "field", "reason"), REFUSALS, ids=[f"{row[1]}: {row[2]}" for row in REFUSALS])
def test_a_refusal_names_the_field_and_the_reason(fields: dict[str, Any], field: str, reason: str) -> None:
    error = refused(**fields)
    assert error.field == field
    assert reason in error.message


def test_too_many_messages_are_refused() -> None:
    turns = [HELLO, {"role": "assistant", "content": "x"}] * 50_000
    assert "at most 100000" in refused(messages=[*turns, HELLO]).message


def test_max_tokens_may_be_left_out_where_the_endpoint_says_so() -> None:
    body = json.dumps({"model": "m", "messages": [HELLO]}).encode()
    assert parse_messages_request(body, max_tokens_required=False).max_tokens is None


def test_nul_in_text_is_kept_because_json_and_the_cli_carry_it() -> None:
    assert parse(messages=[{"role": "user", "content": "a\0b"}]).messages[0].content == "a\0b"


def test_tool_results_of_calls_that_the_server_holds_are_accepted() -> None:
    request = parse(session_id="my-chat", messages=[{"role": "user", "content": [RESULT]}])
    assert request.new_messages() == [Message("user", [RESULT])]


def test_a_complete_tool_exchange_is_accepted_and_system_turns_may_stand_between() -> None:
    asked = {"role": "assistant", "content": [CALL]}
    note = {"role": "system", "content": "note"}
    request = parse(messages=[HELLO, asked, note, {"role": "user", "content": [RESULT]}])
    assert [message.role for message in request.messages] == ["user", "assistant", "system", "user"]


def test_the_agent_field_has_sensible_defaults() -> None:
    agent = parse(agent={}).agent
    assert agent is not None
    assert (agent.tools, agent.permission_mode, agent.on_disconnect) == ("default", None, None)
    listed = parse(agent={"tools": ["Read", "Grep"], "max_turns": 3}).agent
    assert listed is not None
    assert (listed.tools, listed.max_turns) == (["Read", "Grep"], 3)


def test_both_forms_of_mcp_servers_become_one() -> None:
    command = {"command": "npx", "args": ["-y", "x"], "env": {"TOKEN": "t"}}
    named = parse(mcp_servers={"files": command, "web": {"url": "https://e.com/mcp", "headers": {"X": "y"}}})
    listed = parse(
        mcp_servers=[
            {"name": "files", "type": "stdio", **command},
            {"name": "web", "type": "url", "url": "https://e.com/mcp", "authorization_token": "s3cret"},
        ]
    )
    files = McpServer("files", "stdio", command="npx", args=("-y", "x"), env={"TOKEN": "t"})
    assert named.mcp_servers == (files, McpServer("web", "http", url="https://e.com/mcp", headers={"X": "y"}))
    assert listed.mcp_servers[0] == files
    assert listed.mcp_servers[1].headers == {"Authorization": "Bearer s3cret"}
    assert files.to_cli() == {"type": "stdio", **command}


def test_secrets_are_not_printed() -> None:
    request = parse(
        oauth_credentials={"access_token": "sk-secret-1", "refresh_token": "sk-secret-2", "expires_at": 5},
        mcp_servers=[{"name": "a", "url": "https://e.com", "authorization_token": "sk-secret-3"}],
    )
    assert request.oauth_credentials == OAuthCredentials("sk-secret-1", "sk-secret-2", 5)
    assert "sk-secret" not in repr(request.oauth_credentials) + repr(request.mcp_servers)


@pytest.mark.parametrize(
    ("thinking", "budget"),
    [
        (None, None),
        ({"type": "adaptive"}, None),
        ({"type": "disabled"}, 0),
        ({"type": "enabled", "budget_tokens": 1024}, 1024),
    ],
)
def test_the_thinking_budget_is_read(thinking: Any, budget: int | None) -> None:
    assert parse(thinking=thinking, max_tokens=5000).thinking_budget() == budget


def test_the_json_schema_is_found() -> None:
    assert parse(output_config={"format": {"type": "json_schema", "schema": {"a": 1}}}).json_schema() == {"a": 1}
    assert parse(output_config={"effort": "low"}).json_schema() is None


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "role", "text"]), inner),
    max_leaves=6,
)
FIELDS = ["model", "messages", "max_tokens", "system", "thinking", "tools", "tool_choice", "output_config", "agent"]


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from([*FIELDS, "mcp_servers", "session_id", "oauth_credentials", "x"]), junk))
def test_no_junk_gives_anything_but_a_request_or_a_clear_refusal(fields: dict[str, Any]) -> None:
    body = {"model": "m", "max_tokens": 1, "messages": [HELLO]} | fields
    try:
        parse_messages_request(json.dumps(body).encode())
    except InvalidRequest as refusal:
        assert refusal.message  # noqa: PT017 (either way is right)
