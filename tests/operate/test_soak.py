"""The soak: its plan follows from its seed, its invariants notice what they are there for, and a short one passes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from claude_wrapper.sessions.takeover import UNSURE
from claude_wrapper.testing.soak import outcomes, plan, report
from claude_wrapper.testing.soak.logs import summarize
from claude_wrapper.testing.soak.outcomes import Followed, Outcome, UpstreamRequest
from claude_wrapper.testing.soak.pace import Pace
from claude_wrapper.testing.soak.run import SoakSettings, soak

SEED = 600
"""Its first four callers are an untouched one, a touched one and a session of each kind; its faults begin with the database, Redis and the server."""
NONCE = "n00007x00xabcdef"
GOOD = Outcome(7, "plain", True, NONCE, 100.0, 1.0, "answered", 200, f"{NONCE} is the answer")
SENT = UpstreamRequest("req_1", 200, True, 100.0, 10, 5)
ROW = {"upstream_request_id": "req_1", "input_tokens": 10, "output_tokens": 5}


def test_the_same_seed_makes_the_same_soak_and_another_seed_another_one() -> None:
    def begin(seed: int) -> list[plan.ConversationPlan]:
        return list(itertools.islice(plan.conversations(seed), 50))

    assert begin(1) == begin(1) != begin(2)

    def struck(seed: int) -> list[plan.FaultPlan]:
        return list(itertools.islice(plan.process_faults(seed, 3.0), 50))

    def broken(seed: int, stores: tuple[str, ...] = plan.STORE_FAULTS) -> list[plan.FaultPlan]:
        return list(itertools.islice(plan.large_faults(seed, 12.0, stores=stores), 24))

    assert struck(1) == struck(1) != struck(2)
    assert broken(1) == broken(1) != broken(2)
    many = list(itertools.islice(plan.conversations(1), 500))
    assert {turn.kind for one in many for turn in one.turns} == {kind for kind, _ in plan.TURN_KINDS} | {"shell"}
    assert {one.door for one in many} == {plan.MESSAGES, plan.SESSIONS}
    assert not [turn for one in many if one.calm for turn in one.turns if turn.fault]
    assert not [one for one in many if one.calm and one.stream_cuts]
    assert Counter(one.kind for one in broken(1)) == Counter(
        dict.fromkeys(plan.STORE_FAULTS, 4) | dict.fromkeys(plan.SERVER_FAULTS, 4)
    ), "each comes as often as the others of its kind"
    assert {one.kind for one in broken(1, ())} == set(plan.SERVER_FAULTS)


def test_the_load_follows_the_machine() -> None:
    pace = Pace(6, 4)
    assert [pace.after([0.5, 0.6, 9.0]) for _ in range(3)] == [5, 6, 6]
    assert pace.after([2.0]) == 6
    assert [pace.after([5.0]) for _ in range(5)] == [5, 4, 3, 2, 2]
    assert pace.after([]) == 2, "no answer at all is slow"


@pytest.mark.parametrize(
    ("outcome", "downs", "holds"),
    [
        (GOOD, [], True),
        (replace(GOOD, how="refused", status=529), [], True),
        (replace(GOOD, how="unclear"), [(100.5, 102.0)], False),
        (replace(GOOD, how="lost"), [], False),
        (replace(GOOD, how="lost"), [(100.5, 102.0)], True),
        (replace(GOOD, how="lost"), [(90.0, 110.0)], True),
        (replace(GOOD, how="lost"), [(50.0, 60.0), (500.0, 510.0)], False),
    ],
)
def test_a_request_without_an_answer_is_noticed(
    outcome: Outcome, downs: list[tuple[float, float]], holds: bool
) -> None:
    assert outcomes.answered_once([outcome], downs).holds is holds


LOG = ((1, "a"), (2, "b"), (4, "d"))


@pytest.mark.parametrize(
    ("followed", "holds"),
    [
        (Followed("s", LOG, 3, to_the_end=True), True),
        (Followed("s", LOG[:2], 3, to_the_end=False), True),
        (Followed("s", LOG[:2], 3, to_the_end=True), False),
        (Followed("s", (LOG[0], *LOG), 3, to_the_end=True), False),
        (Followed("s", (LOG[0], LOG[2]), 3, to_the_end=False), False),
        (Followed("s", LOG, 1, to_the_end=False, caught_up=False), False),
        (Followed("unknown", LOG, 1, to_the_end=True), False),
    ],
)
def test_a_stream_with_a_gap_a_repeat_or_no_end_is_noticed(followed: Followed, holds: bool) -> None:
    assert outcomes.streams_complete([followed], {"s": LOG}).holds is holds


def test_a_server_that_grows_does_not_rest_or_cannot_explain_itself_is_noticed() -> None:
    def life(*megabytes: int) -> list[dict[str, float]]:
        return [{"at": at * 30.0, "life": 0.0, "resident_bytes": mb * 2**20} for at, mb in enumerate(megabytes)]

    def creeps(*megabytes: int) -> bool:
        return not outcomes.no_creep(life(*megabytes), growth_most=50 * 2**20).holds

    assert not creeps(100, 150, 150, 160, 150, 155, 170, 160)
    assert not creeps(100, 150, 150, 160, 400, 455, 170, 160), "what is given back is no growth"
    assert creeps(100, 150, 150, 200, 250, 300, 350, 400)
    assert not creeps(100, 900), "too short a life to tell"
    assert outcomes.at_rest({"turns_in_flight": 0.0}, []).holds
    assert not outcomes.at_rest({"turns_in_flight": 1.0}, []).holds
    assert not outcomes.at_rest({"turns_in_flight": 0.0}, ["database"]).holds
    assert not outcomes.no_bugs([replace(GOOD, how="refused", status=500, detail="internal_error")]).holds
    assert outcomes.no_bugs([replace(GOOD, how="refused", status=500, detail="upstream_error")]).holds
    assert not outcomes.enough(3, 4).holds
    assert not outcomes.files_kept(["file_1"], 3).holds


@pytest.mark.parametrize(
    ("outcome", "holds"),
    [
        (GOOD, True),
        (replace(GOOD, text=f"{NONCE} n00008x00x000000"), False),
        (replace(GOOD, text="something else"), False),
        (replace(GOOD, text=""), False),
        (replace(GOOD, text=f"Tool said: {UNSURE}"), True),
        (replace(GOOD, how="hung up", text=""), True),
    ],
)
def test_an_answer_of_another_conversation_and_one_that_is_not_whole_are_noticed(outcome: Outcome, holds: bool) -> None:
    assert (outcomes.not_crossed([outcome]).holds and outcomes.answered_whole([outcome]).holds) is holds


@pytest.mark.parametrize(
    ("sent", "rows", "kills", "holds"),
    [
        ([SENT], [ROW], [], True),
        ([SENT], [], [], False),
        ([SENT], [], [101.0], True),
        ([SENT], [ROW, ROW], [], False),
        ([SENT], [{**ROW, "output_tokens": 6}], [], False),
        ([], [ROW], [], False),
        ([replace(SENT, status=529)], [], [], True),
    ],
)
def test_a_ledger_that_differs_from_the_upstream_is_noticed(
    sent: list[UpstreamRequest], rows: list[dict[str, object]], kills: list[float], holds: bool
) -> None:
    assert outcomes.ledger_is_upstreams(sent, rows, kills).holds is holds


def test_gaps_slowness_growth_and_leftovers_are_noticed() -> None:
    assert outcomes.gapless([("s", 3, 1, 3)]).holds
    assert not outcomes.gapless([("s", 2, 1, 3)]).holds
    assert outcomes.calm_latency([GOOD], 2.0).holds
    assert not outcomes.calm_latency([GOOD], 0.5).holds
    assert not outcomes.calm_latency([], 2.0).holds
    sample = {"resident_bytes": 10.0, "descriptors": 5.0}
    assert outcomes.bounded([sample], bytes_most=10, descriptors_most=5).holds
    assert not outcomes.bounded([sample], bytes_most=9, descriptors_most=5).holds
    assert outcomes.nothing_left({"processes": []}).holds
    assert not outcomes.nothing_left({"processes": [1]}).holds


def test_the_log_is_summed_up_and_errors_that_no_fault_explains_are_found() -> None:
    def error(event: str, chain: list[dict[str, str]], **fields: str) -> str:
        return json.dumps({"level": "error", "event": event, "exception": {"chain": chain}, **fields})

    away = [{"type": "StorageUnavailable", "code": "storage_unavailable"}]
    explained = [
        error("background.failed", away),
        error("library.logged", [{"type": "CancelledError"}], module="uvicorn.error"),
    ]
    unexplained = [
        error("request.failed", away),
        error("background.failed", [{"type": "KeyError"}]),
        error("library.logged", [{"type": "RuntimeError"}, *away], module="uvicorn.error"),
    ]
    found = summarize([*explained, *unexplained, '{"level":"warning","event":"a"}', "Traceback", ""])
    assert found.counts["error background.failed"] == 2
    assert found.counts["warning a"] == 1
    assert found.errors == [*explained, *unexplained]
    assert found.unexpected == unexplained
    assert found.unreadable == ["Traceback"]
    aborted = (
        "/lib/sqlalchemy/util/concurrency.py:139: RuntimeWarning: coroutine 'connect' was never awaited",
        "  awaitable.close()",
        "RuntimeWarning: Enable tracemalloc to get the object allocation traceback",
    )
    assert summarize(aborted).unreadable == []
    assert outcomes.no_surprises([], []).holds
    assert not outcomes.no_surprises([], found.unreadable).holds
    assert not outcomes.no_surprises(found.unexpected, []).holds


@pytest.mark.anyio
@pytest.mark.real_cli
@pytest.mark.timeout(300)
async def test_twenty_seconds_of_faults_leave_everything_in_order(reachable_tmp_path: Path) -> None:
    settings = SoakSettings(
        seconds=20.0,
        seed=SEED,
        callers=4,
        max_processes=6,
        process_fault_every=2.0,
        large_fault_every=3.0,
        faults_least=4,
        calm_p99_seconds=80.0,  # this machine may be busy with other tests
    )
    done = await soak(settings, reachable_tmp_path)
    figures = report.summary(done)
    assert [one for one in figures["invariants"] if not one["holds"]] == []
    assert figures["surroundings"].startswith("Postgres, shared state in Redis")
    assert figures["requests"] > 5
    assert done.record.downs
    page = report.to_html(done)
    assert page.count("<svg") == 9
    assert "<script" not in page
