"""The directives inside prompts."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claude_wrapper.testing import script
from claude_wrapper.testing.script import Part, minimal_value, parse, received


def test_the_table_names_exactly_the_directives_there_are() -> None:
    named = set(re.findall(r"`\[\[([a-z-]+)", script.directives_markdown()))
    assert named == script.NAMES


def test_a_text_without_directives_is_left_alone() -> None:
    assert parse("  hello [[ [[wiki link]] ]] ")[0].text == "  hello [[ [[wiki link]] ]] "


def test_steps_hold_their_own_parts_times_and_faults() -> None:
    first, second = parse('a [[tool Bash {"x": [[1]]}]] [[tool Read]] [[delay 20]] [[then]] [[say done]] [[cut 3]]')
    assert first.parts == [Part("tool", {"x": [[1]]}, "Bash"), Part("tool", {}, "Read")]
    assert (first.text, first.delay, first.cut_after) == ("a", 0.02, None)
    assert (second.parts, second.cut_after) == ([Part("say", "done")], 3)


def test_a_json_string_may_hold_anything() -> None:
    assert parse('[[say "a ]] b\\n[[c]]"]]')[0].parts == [Part("say", "a ]] b\n[[c]]")]


@settings(deadline=None)
@given(st.text(max_size=30), st.sampled_from(sorted(script.NAMES)), st.text(max_size=10))
def test_any_prompt_can_be_parsed(before: str, name: str, argument: str) -> None:
    assert parse(f"{before}[[{name} {argument}]]")
    assert parse(f"{before}[[{name} {argument}")


def user(*texts: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}


def test_the_driving_text_is_the_last_thing_that_the_user_said() -> None:
    reminder = "<system-reminder>\nbe nice\n</system-reminder>"
    system = {"role": "system", "content": [{"type": "text", "text": "env"}]}
    assert received([user("old"), user(reminder, "failed before\n", "new"), system]).text == "new"
    assert received([user("asked"), user("[Request interrupted by user]", reminder)]).text == "asked"
    assert received([]).text == ""


def test_rounds_since_the_driving_text_are_counted() -> None:
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "n", "input": {}}]}
    done = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "ok"}]}
    heard = received([user("go"), call, done, call, done])
    assert (heard.text, heard.round, heard.results) == ("go", 2, "ok")


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]}, {"a": 0}),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [False, False]),
        ({"enum": ["x", "y"]}, "x"),
        ({"const": 5}, 5),
        ({"type": "string", "minLength": 2}, "xx"),
        ({"type": ["number", "null"], "minimum": 3}, 3),
        ({"type": "integer", "exclusiveMinimum": 4}, 5),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string", "format": "date"}}}, "2026-01-01"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, None),
    ],
)
def test_the_smallest_value_fits_the_schema(schema: dict[str, Any], value: Any) -> None:
    assert minimal_value(schema) == value
