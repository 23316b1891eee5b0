"""Outcomes of a session: how far each is, and what is done next. Pure.

An outcome is defined by an event that waits in the queue like a message (`pending`). Its turn begins it (`running`);
once the agent has ended its turn and no message of the client waits, a grader looks at what was made (`evaluating`). Its
verdict ends the outcome, or is said to the agent as the next turn. At most one outcome is open at a time.

An outcome is an object in the session's row, changed in the transaction that writes the events which tell of it, so a
server that dies leaves a state from which the next one goes on, and no event is written twice. Clients see the fields of
`shown`; the server keeps beside them `seq` (number of the defining event, which has the rubric), `max_iterations`,
`start` (id of the start event of the evaluation that runs) and `unsaid` (what the agent has not been told yet).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from claude_wrapper.errors import IllegalTransition
from claude_wrapper.sessions.eventlog import Stored, rfc3339
from claude_wrapper.wire.usage import Usage

DEFINED: Final = "user.define_outcome"
START: Final = "span.outcome_evaluation_start"
ONGOING: Final = "span.outcome_evaluation_ongoing"
END: Final = "span.outcome_evaluation_end"
DEFAULT_ITERATIONS: Final = 3

Outcome = Mapping[str, Any]


class Result(enum.StrEnum):
    """Where an outcome is; the last four are its end."""

    PENDING = "pending"
    RUNNING = "running"
    EVALUATING = "evaluating"
    SATISFIED = "satisfied"
    MAX_ITERATIONS = "max_iterations_reached"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


NEEDS_REVISION: Final = "needs_revision"
"""A verdict that ends an evaluation and not the outcome."""

_R = Result
TRANSITIONS: Final[Mapping[Result, frozenset[Result]]] = {
    _R.PENDING: frozenset({_R.RUNNING, _R.FAILED}),
    _R.RUNNING: frozenset({_R.EVALUATING, _R.INTERRUPTED}),
    _R.EVALUATING: frozenset({_R.RUNNING, _R.SATISFIED, _R.MAX_ITERATIONS, _R.FAILED, _R.INTERRUPTED}),
    _R.SATISFIED: frozenset(),
    _R.MAX_ITERATIONS: frozenset(),
    _R.FAILED: frozenset(),
    _R.INTERRUPTED: frozenset(),
}
OPEN: Final = frozenset({_R.RUNNING, _R.EVALUATING})
"""The agent works on it, or its work is being judged."""


class Step(enum.Enum):
    """What a session does next."""

    TURN = enum.auto()
    """Answer the first message of the queue."""
    REVISE = enum.auto()
    """Tell the agent what the grader said."""
    EVALUATE = enum.auto()
    """Ask the grader, or ask it again after its server died."""
    REST = enum.auto()


def defined(events: Iterable[Stored]) -> list[dict[str, Any]]:
    """The new outcomes of these events, which were written just now."""
    found = ((one.seq, one.json()) for one in events if one.type == DEFINED)
    return [
        {
            "type": "outcome_evaluation",
            "outcome_id": event["outcome_id"],
            "description": event["description"],
            "iteration": 0,
            "result": Result.PENDING.value,
            "explanation": None,
            "completed_at": None,
            "seq": seq,
            "max_iterations": event["max_iterations"],
            "start": None,
            "unsaid": None,
        }
        for seq, event in found
    ]


def shown(outcome: Outcome) -> dict[str, Any]:
    """The API's object."""
    return {name: outcome[name] for name in _SHOWN}


_SHOWN: Final = ("type", "outcome_id", "description", "iteration", "result", "explanation", "completed_at")


def current(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The outcome that is open."""
    return next((one for one in outcomes if one["result"] in OPEN), None)


def next_step(outcomes: Sequence[Outcome], queue: Sequence[str], *, goes_on: bool) -> Step:
    """`queue`: types of the client's events that wait, in order. `goes_on`: the session is at work, or was stopped by a
    budget that has been raised; else it has ended its last turn badly, and waits for its client."""
    one = current(outcomes)
    if one is not None and one["result"] == Result.EVALUATING:
        return Step.EVALUATE
    if goes_on and unsaid(outcomes) is not None:
        return Step.REVISE
    if goes_on and one is not None and (not queue or queue[0] == DEFINED):
        return Step.EVALUATE
    return Step.TURN if queue else Step.REST


def more_to_do(outcomes: Sequence[Outcome]) -> bool:
    """Whether the session goes on by itself after a turn that ended well."""
    return current(outcomes) is not None or unsaid(outcomes) is not None


def unsaid(outcomes: Sequence[Outcome]) -> str | None:
    """What the grader said and the agent is to be told."""
    return next((str(one["unsaid"]) for one in outcomes if one["unsaid"] is not None), None)


# Changes: the outcomes as they are then ------------------------------------------------------------------------------


def begun(outcomes: Sequence[Outcome], seq: int, now: datetime) -> list[dict[str, Any]]:
    """The turn of the outcome that the event `seq` defined begins; one that is still open is over."""
    closed, _ = interrupted(outcomes, now)
    return _changed(closed, lambda one: one["seq"] == seq, Result.RUNNING)


def told(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The turn that tells the agent what the grader said begins."""
    return [{**one, "unsaid": None} for one in outcomes]


def evaluating(outcomes: Sequence[Outcome], start: str) -> list[dict[str, Any]]:
    """The evaluation with this start event begins."""
    return _changed(outcomes, _is_open, Result.EVALUATING, start=start)


def judged(outcomes: Sequence[Outcome], verdict: str, explanation: str, now: datetime) -> list[dict[str, Any]]:
    """The evaluation has ended with this verdict (`final` of what the grader said)."""
    changes: dict[str, Any] = {"explanation": explanation, "start": None}
    if verdict == NEEDS_REVISION:
        one = current(outcomes)
        iteration = 0 if one is None else int(one["iteration"]) + 1
        return _changed(outcomes, _is_open, Result.RUNNING, iteration=iteration, unsaid=explanation, **changes)
    if verdict == Result.MAX_ITERATIONS:
        changes["unsaid"] = explanation  # one more turn, which nobody judges
    return _changed(outcomes, _is_open, Result(verdict), completed_at=rfc3339(now), **changes)


def final(outcome: Outcome, verdict: str) -> str:
    """The verdict that is written: nothing is revised after the last iteration."""
    last = int(outcome["iteration"]) + 1 >= int(outcome["max_iterations"])
    return Result.MAX_ITERATIONS.value if verdict == NEEDS_REVISION and last else verdict


def refused(outcomes: Sequence[Outcome], seqs: Iterable[int], why: str, now: datetime) -> list[dict[str, Any]]:
    """The turns of these outcomes could not begin."""
    gone = set(seqs)
    return _changed(outcomes, lambda one: one["seq"] in gone, Result.FAILED, explanation=why, completed_at=rfc3339(now))


def interrupted(outcomes: Sequence[Outcome], now: datetime) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The client (or the session's end) stops what is open: the outcomes then, and the events that tell of it."""
    one = current(outcomes)
    events = []
    if one is not None and one["result"] == Result.EVALUATING:
        events.append(end_event(one, Result.INTERRUPTED.value, "It was interrupted.", Usage()))
    changed = _changed(outcomes, _is_open, Result.INTERRUPTED, completed_at=rfc3339(now), start=None)
    return told(changed), events


def _is_open(one: Outcome) -> bool:
    return one["result"] in OPEN


def _changed(
    outcomes: Sequence[Outcome], which: Callable[[Outcome], bool], result: Result, **changes: Any
) -> list[dict[str, Any]]:
    return [{**one, **changes, "result": _moved(one, result)} if which(one) else dict(one) for one in outcomes]


def _moved(one: Outcome, result: Result) -> str:
    """Raises IllegalTransition for what an outcome there cannot become."""
    if result not in TRANSITIONS[Result(one["result"])]:
        raise IllegalTransition(f"an outcome that is {one['result']} cannot become {result}")
    return result.value


# Events --------------------------------------------------------------------------------------------------------------


def start_event(outcome: Outcome) -> dict[str, Any]:
    """An evaluation begins."""
    return {"type": START, **_cycle(outcome)}


def ongoing_event(outcome: Outcome) -> dict[str, Any]:
    """It is alive."""
    return {"type": ONGOING, **_cycle(outcome)}


def end_event(outcome: Outcome, verdict: str, explanation: str, usage: Usage) -> dict[str, Any]:
    """It has ended; `outcome` as it was before."""
    return {
        "type": END,
        **_cycle(outcome),
        "outcome_evaluation_start_id": outcome["start"],
        "result": verdict,
        "explanation": explanation,
        "usage": {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cache_creation_input_tokens": usage.cache_write_5m_tokens + usage.cache_write_1h_tokens,
            "cache_read_input_tokens": usage.cache_read_tokens,
        },
    }


def _cycle(outcome: Outcome) -> dict[str, Any]:
    return {"outcome_id": outcome["outcome_id"], "iteration": outcome["iteration"]}
