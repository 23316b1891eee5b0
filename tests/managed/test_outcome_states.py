"""How an outcome moves, what a session does next, and how a grader's answer is read: nothing here does I/O."""

from __future__ import annotations

import contextlib
import itertools
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from claude_wrapper.errors import IllegalTransition
from claude_wrapper.sessions import outcomes, verdicts
from claude_wrapper.sessions.eventlog import Stored
from claude_wrapper.sessions.outcomes import DEFINED, OPEN, TRANSITIONS, Result, Step, next_step
from claude_wrapper.sessions.verdicts import Made, Verdict
from claude_wrapper.wire.usage import Usage

NOW = datetime(2026, 11, 27, tzinfo=UTC)
MESSAGE = "user.message"


def one(result: str = "pending", **changes: Any) -> dict[str, Any]:
    event = {
        "type": DEFINED,
        "outcome_id": "outc_a",
        "description": "a poem",
        "rubric": {"type": "text", "content": "It rhymes."},
        "max_iterations": 3,
    }
    [made] = outcomes.defined([Stored(7, "sevt_a", DEFINED, None, json.dumps(event).encode())])
    return {**made, "result": result, **changes}


def moved(before: str, after: Result) -> dict[str, Any]:
    """An outcome, changed by what brings it from one state to the other."""
    made = [one(before, start="sevt_s" if before == "evaluating" else None)]
    match after:
        case Result.PENDING:
            raise IllegalTransition("nothing makes an outcome wait again")
        case Result.RUNNING if before == "evaluating":
            changed = outcomes.judged(made, "needs_revision", "why", NOW)
        case Result.RUNNING:
            changed = outcomes.begun(made, 7, NOW)
        case Result.EVALUATING:
            changed = outcomes.evaluating(made, "sevt_s")
        case Result.INTERRUPTED:
            changed, _ = outcomes.interrupted(made, NOW)
        case Result.FAILED if before == "pending":
            changed = outcomes.refused(made, [7], "no credential", NOW)
        case _:
            changed = outcomes.judged(made, after.value, "why", NOW)
    return changed[0]


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Result, Result)))
def test_an_outcome_moves_as_the_table_says_and_in_no_other_way(before: Result, after: Result) -> None:
    if after in TRANSITIONS[before]:
        assert moved(before.value, after)["result"] == after
        return
    with contextlib.suppress(IllegalTransition):
        assert moved(before.value, after)["result"] == before, "what is not open is left as it is"


def test_an_end_is_an_end() -> None:
    for result, following in TRANSITIONS.items():
        assert bool(following) == (result in OPEN or result is Result.PENDING)


@pytest.mark.parametrize(
    ("known", "queue", "goes_on", "step"),
    [
        ([], [], True, Step.REST),
        ([], [MESSAGE], False, Step.TURN),
        ([one()], [DEFINED], False, Step.TURN),
        ([one("running")], [], True, Step.EVALUATE),
        ([one("running")], [], False, Step.REST),
        ([one("running")], [MESSAGE], True, Step.TURN),
        ([one("running"), one()], [DEFINED], True, Step.EVALUATE),
        ([one("running", unsaid="mend it")], [MESSAGE], True, Step.REVISE),
        ([one("running", unsaid="mend it")], [], False, Step.REST),
        ([one("evaluating")], [MESSAGE], True, Step.EVALUATE),
        ([one("evaluating")], [], False, Step.EVALUATE),
        ([one("satisfied")], [], True, Step.REST),
        ([one("max_iterations_reached", unsaid="why")], [DEFINED], True, Step.REVISE),
        ([one("satisfied"), one()], [DEFINED], True, Step.TURN),
    ],
)
def test_what_is_done_next(known: list[dict[str, Any]], queue: list[str], goes_on: bool, step: Step) -> None:
    assert next_step(known, queue, goes_on=goes_on) is step


def test_a_revision_is_the_next_iteration_and_the_last_one_is_not_revised() -> None:
    now = [one("running", max_iterations=2)]
    verdict = []
    for start in ("sevt_1", "sevt_2"):
        now = outcomes.told(outcomes.evaluating(now, start))
        verdict.append(outcomes.final(now[0], "needs_revision"))
        assert outcomes.end_event(now[0], verdict[-1], "why", Usage())["outcome_evaluation_start_id"] == start
        now = outcomes.judged(now, verdict[-1], "why", NOW)
        assert outcomes.unsaid(now) == "why"
    assert verdict == ["needs_revision", "max_iterations_reached"]
    assert (now[0]["iteration"], now[0]["completed_at"] is None) == (1, False)
    assert not outcomes.more_to_do(outcomes.told(now))


def test_only_the_apis_fields_are_shown() -> None:
    assert outcomes.shown(one("evaluating", start="sevt_s", unsaid="x")) == {
        "type": "outcome_evaluation",
        "outcome_id": "outc_a",
        "description": "a poem",
        "iteration": 0,
        "result": "evaluating",
        "explanation": None,
        "completed_at": None,
    }


def test_a_new_outcome_ends_one_that_was_left_open() -> None:
    before = [one("running"), one(seq=9, outcome_id="outc_b")]
    assert [each["result"] for each in outcomes.begun(before, 9, NOW)] == ["interrupted", "running"]


def message(text: str) -> bytes:
    return json.dumps({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}]}).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"content": 3}',
        message("It is fine."),
        message("[1]"),
        message('{"result": "fine", "explanation": "x"}'),
        message('{"result": "satisfied"}'),
        message('{"result": "satisfied", "explanation": " "}'),
        message('{"result": "satisfied", "explanation": "x", "criteria": [{"met": 1}]}'),
        message('{"result": "satis'),
    ],
)
def test_what_is_no_verdict_is_none(body: bytes) -> None:
    assert verdicts.read(body) is None


def test_a_verdict_names_the_criteria_that_are_not_met() -> None:
    criteria = [
        {"criterion": "rhymes", "met": True, "reason": "it does"},
        {"criterion": "is long", "met": False, "reason": "two lines"},
    ]
    said = {"result": "needs_revision", "explanation": "Too short.", "criteria": criteria}
    assert verdicts.read(message(json.dumps(said))) == Verdict("needs_revision", "Too short.\n- is long: two lines")


def test_the_grader_is_shown_no_more_than_fits_and_is_told_what_is_left_out() -> None:
    event = {"description": "a poem", "rubric": {"content": "It rhymes."}}
    big = "x" * (verdicts.MAX_FILE + 1)
    files = [Made(f"{number}.txt", len(big), big) for number in range(6)]
    files.append(Made("song.mp3", 9, None))
    body = verdicts.question(event, "y" * (verdicts.MAX_ANSWER + 5), files, "claude-sonnet-5-5")
    texts = [block["text"] for block in body["messages"][0]["content"]]
    assert sum(map(len, texts)) < verdicts.MAX_ANSWER + verdicts.MAX_FILES + 2_000
    assert f"(cut after {verdicts.MAX_ANSWER} characters: there is more)" in texts[1]
    assert [name for name in ("4.txt", "5.txt") if any(f"{name} (" in text and "not shown" in text for text in texts)]
    assert any("song.mp3" in text and "is no text" in text for text in texts)
    assert texts[-1].endswith("It rhymes.")
