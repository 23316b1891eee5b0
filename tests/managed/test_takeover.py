"""How a turn goes on after its server died, for every point at which it can have died. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.sessions.askers import asking, noted
from claude_wrapper.sessions.spec import Message
from claude_wrapper.sessions.takeover import ONWARD, How, continuation
from claude_wrapper.sessions.transcript import calls_in
from claude_wrapper.tenancy.principal import user_principal
from claude_wrapper.tenancy.scopes import Role


@dataclass(frozen=True)
class Call:
    tool_use_id: str
    kind: str = "tool"
    answer: dict[str, Any] | None = None


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def use(number: int) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"t{number}", "name": "Bash", "input": {}}


def result(number: int) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": f"t{number}", "content": [text(f"r{number}")], "is_error": False}


def ran(number: int) -> Call:
    return Call(f"t{number}", answer={"output": {"content": [text(f"r{number}")], "is_error": False}})


ASKED = Message("user", [text("do it")])
BOTH = Message("assistant", [text("I look"), use(1), use(2)])


def test_before_the_models_first_word_the_message_is_sent_again() -> None:
    found = continuation([ASKED], [], texts=0)
    assert (found.how, found.position, found.content) == (How.AGAIN, 0, ASKED.content)
    assert continuation([ASKED], [], texts=None).how is How.AGAIN


def test_what_an_earlier_turn_left_unanswered_is_sent_again_with_it() -> None:
    said = Message("assistant", [text("done")])
    messages = [ASKED, said, Message("user", "and this"), Message("user", [text("and that")])]
    found = continuation(messages, [], texts=0)
    assert (found.how, found.position) == (How.AGAIN, 2)
    assert list(found.history) == [ASKED, said], "a process takes a past that ends with the model's message"
    assert found.content == [text("and this"), text("and that")]


def test_a_question_after_a_turn_that_failed_at_a_call_is_not_taken_for_that_calls_result() -> None:
    """The new question carries the result that the failed turn lacked; its server dies before the model's first word."""
    lost = {"type": "tool_result", "tool_use_id": "t1", "content": "lost", "is_error": True}
    messages = [ASKED, Message("assistant", [use(1)]), Message("user", [lost, text("and now this")])]
    for call in (Call("t1"), Call("t1", "custom", {"cancelled": True}), ran(1)):
        found = continuation(messages, [call], texts=None, start=2)
        assert (found.how, found.position) == (How.AGAIN, 2)
        assert list(found.history) == messages[:2]
        assert found.content == [lost, text("and now this")]


def test_a_whole_answer_is_not_asked_for_twice() -> None:
    assert continuation([ASKED, Message("assistant", [text("done")])], [], texts=None).how is How.FINISHED


def test_what_the_log_has_of_a_message_in_flight_stays_and_the_rest_is_asked_for() -> None:
    ahead = [ASKED, Message("assistant", [{"type": "thinking", "thinking": "…"}, text("one"), text("two")])]
    found = continuation(ahead, [], texts=1)
    assert found.how is How.ONWARD
    assert found.last is not None
    assert found.last.content == [{"type": "thinking", "thinking": "…"}, text("one")]
    assert found.content == [text(ONWARD)]


@pytest.mark.parametrize("begun", [[{"type": "thinking", "thinking": "…"}], [text("not in the log")]])
def test_what_nobody_saw_of_a_message_in_flight_is_dropped(begun: list[dict[str, Any]]) -> None:
    found = continuation([ASKED, Message("assistant", begun)], [], texts=0)
    assert (found.how, found.position) == (How.AGAIN, 0)


def test_calls_that_ran_are_answered_and_those_that_may_have_run_are_not_run_again() -> None:
    calls = [
        ran(1),
        Call("t2"),
        Call("t3", "approval", {"result": "allow", "given": True}),
        Call("t4", "approval", {"result": "allow"}),
        Call("t5", "custom", {"content": []}),
    ]
    said = Message("assistant", [use(n) for n in range(1, 6)])
    found = continuation([ASKED, said, Message("user", [result(1)])], calls, texts=None)
    assert (found.how, found.position) == (How.REPLAY, 2)
    assert found.replayed == said.content
    assert set(found.ran) == {"t1"}
    assert found.unsure == {"t2", "t3"}, "t4 was never told to run, t5 is the client's own"


def test_when_all_results_are_known_the_model_is_asked_for_its_next_message() -> None:
    messages = [ASKED, BOTH, Message("user", [result(1), result(2)])]
    found = continuation(messages, [ran(1), ran(2)], texts=0)
    assert (found.how, found.position, found.content) == (How.AGAIN, 2, messages[2].content)
    assert list(found.history) == messages[:2]
    # The transcript may be a moment ahead of the log: the client has not seen that result yet.
    behind = continuation(messages, [ran(1), Call("t2")], texts=None)
    assert behind.how is How.REPLAY
    assert set(behind.ran) == {"t1", "t2"}
    assert not behind.unsure


@given(st.data())
def test_nothing_that_was_said_is_lost_and_nothing_is_asked_for_twice(data: st.DataObject) -> None:
    """Any turn, cut anywhere: what stays in the transcript is exactly what the log has."""
    messages: list[Message] = [ASKED]
    calls: list[Call] = []
    number = 0
    for _ in range(data.draw(st.integers(0, 3), label="model messages before")):
        mine = [number + 1 + n for n in range(data.draw(st.integers(1, 2)))]
        number = mine[-1]
        messages += [
            Message("assistant", [text("s"), *map(use, mine)]),
            Message("user", [result(n) for n in mine]),
        ]
        calls += map(ran, mine)
    blocks = data.draw(st.lists(st.sampled_from(["text", "thinking", "call"]), max_size=4), label="the last message")
    last: list[dict[str, Any]] = []
    for kind in blocks:
        number += kind == "call"
        last.append(
            use(number) if kind == "call" else text(f"x{len(last)}") if kind == "text" else {"type": kind, kind: ""}
        )
    logged = data.draw(st.integers(0, len(last)), label="blocks that the log has")
    open_ = data.draw(st.booleans(), label="in flight") or logged < len(last) or not last
    if last:
        messages.append(Message("assistant", last))
    calls += [Call(str(block["id"])) for block in last[:logged] if block["type"] == "tool_use"]
    texts = sum(block["type"] == "text" for block in last[:logged]) if open_ else None
    found = continuation(messages, calls, texts=texts)
    kept: Sequence[Message] = [*messages[: found.position]]
    if found.last is not None:
        kept = [*kept[:-1], found.last]
    shown = [b["text"] for one in kept[1:] if one.role == "assistant" for b in one.content if b["type"] == "text"]
    in_log = [
        b["text"]
        for one in messages[1:]
        if one.role == "assistant"
        for b in (last[:logged] if one.content is last else one.content)
        if b["type"] == "text"
    ]
    assert shown == in_log
    published = {call.tool_use_id for call in calls}
    assert {call for one in kept for call in calls_in(one)} == published
    assert {call for call in published if not call.startswith("x")} >= set(found.ran) | found.unsure
    if found.how is How.REPLAY:
        assert set(found.ran).isdisjoint(found.unsure)
        assert set(calls_in(kept[-1])) == set(found.ran) | found.unsure


@pytest.mark.parametrize("models", [None, frozenset({"claude-haiku-4-5", "claude-sonnet-*"})])
def test_whoever_goes_on_has_no_right_of_the_asker_and_is_bound_to_their_models(models: frozenset[str] | None) -> None:
    asker = replace(user_principal("org_1", "user_1", Role.ADMIN, workspace="wrkspc_1"), allowed_models=models)
    assert asking("org_1", json.loads(json.dumps(noted(asker)))) == replace(asker, role=Role.VIEWER, scopes=frozenset())
