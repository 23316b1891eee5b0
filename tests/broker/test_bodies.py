"""Bodies: the main request gets the turn's system prompt and parameters; everything else is left alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.world import MODEL, turn
from claude_wrapper.broker import SYSTEM_PLACEHOLDER, CredentialKind, bodies, refused_overrides
from claude_wrapper.broker.refusals import Refused

KEY, OAUTH = CredentialKind.API_KEY, CredentialKind.OAUTH
EPHEMERAL = {"type": "ephemeral"}
CLI = {"type": "text", "text": "You are a Claude agent.", "cache_control": EPHEMERAL}
BILLING = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.327;"}
PLACEHOLDER = {"type": "text", "text": SYSTEM_PLACEHOLDER, "cache_control": EPHEMERAL}


def body(**changes: Any) -> dict[str, Any]:
    """What the CLI sends (`--bare --tools ""`), shortened."""
    sent: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "system", "content": []}],
        "system": [BILLING, CLI, PLACEHOLDER],
        "tools": [],
        "max_tokens": 128000,
        "thinking": {"type": "adaptive", "display": "updates"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "stream": True,
    }
    return sent | changes


def encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def rewritten(sent: dict[str, Any], kind: CredentialKind = KEY, *, again: bool = False, **context: Any) -> Any:
    out = bodies.rewrite(bodies.read(encoded(sent)), turn(**context), kind, repeats_failed=again)
    return json.loads(out.body), out.main


def test_the_placeholder_is_replaced_by_the_caller_s_blocks_which_take_over_its_cache_mark() -> None:
    out, main = rewritten(body(), system=[{"type": "text", "text": "A"}, {"type": "text", "text": "B"}])
    assert out["system"] == [
        BILLING,
        CLI,
        {"type": "text", "text": "A"},
        {"type": "text", "text": "B", "cache_control": EPHEMERAL},
    ]
    assert main
    assert {**out, "system": 0} == {**body(), "system": 0}


def test_without_a_system_prompt_the_placeholder_is_removed() -> None:
    assert rewritten(body())[0]["system"] == [BILLING, CLI]
    assert "system" not in rewritten(body(system=[PLACEHOLDER]))[0]
    assert "system" not in rewritten(body(system=SYSTEM_PLACEHOLDER))[0]


def test_the_caller_s_own_cache_marks_rule_and_never_exceed_four() -> None:
    hour = {"type": "ephemeral", "ttl": "1h"}
    blocks = [{"type": "text", "text": str(n), "cache_control": hour} for n in range(4)]
    marked = [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": EPHEMERAL}]}]
    out, _ = rewritten(body(messages=marked), system=blocks)
    assert [block.get("cache_control") for block in out["system"]] == [None, None, None, hour, hour, hour]
    assert blocks[0]["cache_control"] == hour, "the caller's blocks are not changed"


def test_a_text_about_cache_marks_is_not_one() -> None:
    text = [{"role": "user", "content": '"cache_control":{' * 9}]
    assert rewritten(body(messages=text), system=[{"type": "text", "text": "A"}])[0]["system"][2]["cache_control"]


def test_a_text_that_only_mentions_the_placeholder_is_left_alone() -> None:
    system = [{"type": "text", "text": f"never say {SYSTEM_PLACEHOLDER}"}]
    messages = [{"role": "user", "content": SYSTEM_PLACEHOLDER}]
    sent = body(system=system, messages=messages)
    assert rewritten(sent, system=[{"type": "text", "text": "A"}])[0] == sent


def test_overrides_go_into_the_main_request_and_none_removes() -> None:
    overrides = {"max_tokens": 5, "temperature": 0.5, "metadata": None, "stop_sequences": ["x"]}
    out, main = rewritten(body(metadata={"user_id": "u"}), overrides=overrides)
    assert main
    assert (out["max_tokens"], out["temperature"], out["stop_sequences"]) == (5, 0.5, ["x"])
    assert "metadata" not in out


@pytest.mark.parametrize("thinking", [None, {"type": "disabled"}])
def test_without_thinking_its_context_edit_goes_too(thinking: Any) -> None:
    assert "context_management" not in rewritten(body(), overrides={"thinking": thinking})[0]
    edits = [{"type": "clear_thinking_20251015"}, {"type": "clear_tool_uses_20250919"}]
    out, _ = rewritten(body(context_management={"edits": edits}), overrides={"thinking": thinking})
    assert out["context_management"] == {"edits": edits[1:]}


@pytest.mark.parametrize(
    ("sent", "context"),
    [
        (body(model="claude-haiku-4-5"), {}),
        (body(stream=False), {}),
        (body(system=[CLI]), {"placeholder": True}),
    ],
)
def test_side_requests_get_no_overrides(sent: dict[str, Any], context: dict[str, Any]) -> None:
    out, main = rewritten(sent, overrides={"max_tokens": 5}, **context)
    assert not main
    assert out["max_tokens"] == 128000
    assert SYSTEM_PLACEHOLDER not in json.dumps(out)


def test_the_repetition_of_a_failed_stream_without_streaming_is_main_again() -> None:
    assert rewritten(body(stream=False), again=True, placeholder=True)[1]


def test_a_model_with_the_cli_s_suffix_is_the_same_model() -> None:
    assert rewritten(body(), model=f"{MODEL}[1m]")[1]


def test_with_oauth_nothing_is_changed_and_wishes_are_refused_by_name() -> None:
    context = turn(system=[{"type": "text", "text": "A"}], overrides={"top_p": 1, "max_tokens": 5})
    assert refused_overrides(OAUTH, context) == ["max_tokens", "system", "top_p"]
    assert refused_overrides(KEY, context) == []
    assert refused_overrides(OAUTH, turn()) == []
    raw = encoded(body(system=[BILLING, CLI]))
    assert bodies.rewrite(bodies.read(raw), turn(), OAUTH).body is raw
    with pytest.raises(Refused, match="primed"):
        rewritten(body(), OAUTH)


def test_a_body_that_needs_no_change_is_sent_as_the_very_bytes_that_came() -> None:
    raw = encoded(body(system=[BILLING, CLI], messages=[{"role": "user", "content": "ä\u2028 \\u00e4 \\/"}]))
    assert bodies.rewrite(bodies.read(raw), turn(), KEY).body is raw


def test_a_repeated_key_cannot_name_two_models() -> None:
    raw = b'{"model":"cheap","stream":true,"model":"dear"}'
    asked = bodies.read(raw)
    assert asked.model == "dear"
    assert bodies.rewrite(asked, None, OAUTH).body == b'{"model":"dear","stream":true}'
    escaped = b'{"mod\\u0065l":"cheap","stream":true}'
    assert json.loads(bodies.read(escaped).raw) == {"model": "cheap", "stream": True}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b'{"model":1}',
        b'{"stream":"yes"}',
        b'{"max_tokens":[]}',
        b"\xff",
        b'{"a":\x00}',
        b'{"model":' + b"[" * 100000,
    ],
)
def test_what_is_no_request_is_refused(raw: bytes) -> None:
    with pytest.raises(Refused) as refused:
        bodies.read(raw)
    assert refused.value.refusal.status == 400


@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name not in {"model", "stream", "max_tokens", "system"}),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=8
        ),
        max_size=6,
    ),
    st.booleans(),
)
def test_unknown_fields_arrive_as_they_were(extra: dict[str, Any], spaced: bool) -> None:
    sent = extra | {"model": MODEL, "stream": True, "system": [PLACEHOLDER]}
    raw = json.dumps(sent, indent=2).encode() if spaced else encoded(sent)
    out = json.loads(bodies.rewrite(bodies.read(raw), turn(overrides={"max_tokens": 1}), KEY).body)
    assert out == extra | {"model": MODEL, "stream": True, "max_tokens": 1}


def test_what_the_cli_adds_to_images_is_taken_out_again() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    note = {"type": "text", "text": "[Image: source: /tmp/claude-0/-work/x/images/1.png]", "cache_control": EPHEMERAL}
    sent = body(messages=[{"role": "user", "content": [image, {"type": "text", "text": "look\n"}, note]}])
    out = bodies.rewrite(bodies.read(encoded(sent)), turn(), KEY)
    content = json.loads(out.body)["messages"][0]["content"]
    assert content == [image, {"type": "text", "text": "look", "cache_control": EPHEMERAL}]
