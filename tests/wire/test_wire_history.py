"""One conversation, one key, however the client writes it; two conversations, two keys."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_wrapper.wire.history import HistoryHash, history_key, new_messages_start
from claude_wrapper.wire.messages import Message

texts = st.text(max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
text_blocks = st.builds(lambda text: {"type": "text", "text": text}, texts)
tool_calls = st.builds(
    lambda name, given: {"type": "tool_use", "id": "toolu_" + name, "name": name, "input": given},
    texts,
    st.dictionaries(texts, values, max_size=3),
)
results = st.builds(
    lambda content: {"type": "tool_result", "tool_use_id": "toolu_1", "content": content},
    texts | st.lists(text_blocks, max_size=3),
)
blocks = text_blocks | tool_calls | results
conversations = st.lists(
    st.builds(
        Message, role=st.sampled_from(["user", "assistant"]), content=texts | st.lists(blocks, min_size=1, max_size=4)
    ),
    max_size=6,
)


def said(*turns: tuple[str, Any]) -> str:
    return history_key([Message(role, content) for role, content in turns])


def rewritten(draw: st.DrawFn, message: Message) -> list[Message]:
    """The same message as another client might send it."""
    out: list[dict[str, Any]] = []
    for block in copy.deepcopy(message.blocks()):
        if draw(st.booleans()):
            out.append({"type": "thinking", "thinking": "hm", "signature": "s"})
        if block["type"] == "text" and draw(st.booleans()):
            at = draw(st.integers(0, len(block["text"])))
            out += [{"type": "text", "text": block["text"][:at]}, {"text": block["text"][at:], "type": "text"}]
            continue
        if block["type"] == "tool_result" and isinstance(block["content"], str) and draw(st.booleans()):
            block["content"] = [{"type": "text", "text": block["content"]}]
        block.update(draw(st.sampled_from([{}, {"cache_control": {"type": "ephemeral"}}, {"citations": None}])))
        out.append(dict(reversed(block.items())) if draw(st.booleans()) else block)
    at = draw(st.integers(0, len(out)))
    return [Message(message.role, out[:at]), Message(message.role, out[at:])]


@st.composite
def rewritten_conversations(draw: st.DrawFn) -> tuple[list[Message], list[Message]]:
    original = draw(conversations)
    return original, [part for message in original for part in rewritten(draw, message)]


@settings(deadline=None)
@given(rewritten_conversations())
def test_the_same_conversation_written_differently_has_the_same_key(pair: tuple[list[Message], list[Message]]) -> None:
    original, other = pair
    assert history_key(original, "salt") == history_key(other, "salt")


@settings(deadline=None)
@given(conversations, conversations)
def test_extending_a_key_equals_hashing_the_whole(first: list[Message], second: list[Message]) -> None:
    growing = HistoryHash("s").extend(first)
    before = growing.key()
    branch = growing.copy().extend(second)
    assert branch.key() == history_key([*first, *second], "s")
    assert growing.key() == before == history_key(first, "s")


@settings(deadline=None)
@given(conversations, texts)
def test_a_stored_key_can_be_carried_on_by_a_turn_of_the_other_role(history: list[Message], text: str) -> None:
    history = [*history, Message("assistant", "done")]
    stored = HistoryHash("s").extend(history).key()
    assert HistoryHash.resume(stored).add("user", text).key() == history_key([*history, Message("user", text)], "s")


@settings(deadline=None)
@given(conversations, st.text(min_size=1, max_size=5))
def test_every_added_text_changes_the_key(history: list[Message], text: str) -> None:
    assert history_key(history) != history_key([*history, Message("user", text)])


DIFFERENT = [
    (("user", "ab"),),
    (("user", "a"), ("assistant", "b")),
    (("assistant", "ab"),),
    (("user", "ab"), ("user", "\0Rassistant")),
    (("user", "ab\0Rassistant\0T"),),
    (("user", "ab\0\0"),),
    (("user", [{"type": "text", "text": "a"}, {"type": "image", "source": {"type": "url", "url": "x"}}]),),
    (("user", [{"type": "image", "source": {"type": "url", "url": "x"}}, {"type": "text", "text": "a"}]),),
    (("user", [{"type": "tool_result", "tool_use_id": "1", "content": "a"}]),),
    (("user", [{"type": "tool_result", "tool_use_id": "2", "content": "a"}]),),
    (("user", [{"type": "tool_result", "tool_use_id": "2", "content": "a", "is_error": True}]),),
    (("assistant", [{"type": "tool_use", "id": "1", "name": "n", "input": {}}]),),
    (("assistant", [{"type": "tool_use", "id": "1", "name": "n", "input": {"a": None}}]),),
    (("assistant", [{"type": "tool_use", "id": "1", "name": "n", "input": {"a": 1}}]),),
    (("assistant", [{"type": "tool_use", "id": "1", "name": "n", "input": {"a": "1"}}]),),
    (("assistant", [{"type": "tool_use", "id": "1", "name": "n", "input": {"a": True}}]),),
]


def test_different_conversations_have_different_keys() -> None:
    keys = [said(*turns) for turns in DIFFERENT]
    assert len(set(keys)) == len(keys)


def test_the_salt_separates_equal_conversations() -> None:
    message = [Message("user", "hi")]
    assert len({history_key(message, salt) for salt in ("", "org_a", "org_b")}) == 3


def test_a_number_that_javascript_cannot_tell_apart_is_the_same() -> None:
    def call(number: float) -> str:
        return said(("assistant", [{"type": "tool_use", "id": "1", "name": "n", "input": {"a": [number]}}]))

    assert call(1.0) == call(1)
    assert call(1.5) != call(1)


@pytest.mark.parametrize(
    ("roles", "start"),
    [([], 0), (["user"], 0), (["user", "assistant", "user"], 2), (["user", "assistant", "user", "system"], 2)],
)
def test_new_messages_begin_after_the_last_assistant_turn(roles: list[Any], start: int) -> None:
    assert new_messages_start([Message(role, "x") for role in roles]) == start
