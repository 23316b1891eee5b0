"""The soak: its plan follows from its seed, its invariants notice what they are there for, and a short one passes."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from claude_wrapper.sessions.takeover import UNSURE
from claude_wrapper.testing.soak import canary, outcomes, page, plan, plots, report
from claude_wrapper.testing.soak.fleet import Fleet, Seen
from claude_wrapper.testing.soak.logs import summarize
from claude_wrapper.testing.soak.outcomes import CanaryLook, Down, Followed, Loss, Outcome, UpstreamRequest
from claude_wrapper.testing.soak.pace import Pace
from claude_wrapper.testing.soak.run import soak
from claude_wrapper.testing.soak.served import Served
from claude_wrapper.testing.soak.settings import SoakSettings

SEED = 600
"""Its first four callers are an untouched one, a touched one and a session of each kind; its faults begin with the database and a replica."""
NONCE = "n00007x00xabcdef"
GOOD = Outcome(7, "plain", True, NONCE, 100.0, 1.0, "answered", 200, f"{NONCE} is the answer", replica=0)
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
    several = itertools.islice(plan.large_faults(1, 12.0, stores=plan.STORE_FAULTS, replicas=2), 32)
    assert Counter(one.kind for one in several) == Counter(
        dict.fromkeys(plan.STORE_FAULTS, 4) | dict.fromkeys(plan.REPLICA_FAULTS, 4)
    )
    reads = list(itertools.islice(plan.reads(1), 500))
    assert reads == list(itertools.islice(plan.reads(1), 500))
    assert 20 < sum(one.kind == plan.SLOW_READ for one in reads) < 100, "fewer than may be asked twice"
    assert len({one.nonce for one in reads}) == 500


def test_the_load_follows_the_machine() -> None:
    pace = Pace(6, 4)
    assert [pace.after([0.5, 0.6, 9.0]) for _ in range(3)] == [5, 6, 6]
    assert pace.after([2.0]) == 6
    assert [pace.after([5.0]) for _ in range(5)] == [5, 4, 3, 2, 2]
    assert pace.after([]) == 2, "no answer at all is slow"


def test_the_balancer_asks_those_that_are_ready_in_turn_and_another_one_when_a_connection_breaks() -> None:
    first, second = (Served(Path(f"/nowhere/{number}"), "http://upstream", number=number) for number in range(2))
    fleet = Fleet((first, second), [])
    fleet.saw(first, Seen.READY)
    assert fleet.another(first) is None, "nobody else is ready"
    fleet.saw(second, Seen.READY)
    assert [fleet.choose() for _ in range(4)] == [first, second, first, second]
    assert fleet.another(first) is second
    fleet.lost(first, 1.0, "broken")
    assert [fleet.choose() for _ in range(2)] == [second, second]
    assert [(one.replica, one.what) for one in fleet.losses] == [(0, "broken")]
    fleet.saw(second, Seen.UNWELL)
    assert fleet.choose() is second, "where none is ready, one that answers is tried"
    assert fleet.up.is_set()
    fleet.saw(second, Seen.GONE)
    assert not fleet.up.is_set()


DOWN = Down(0, 100.5, 102.0)


@pytest.mark.parametrize(
    ("outcome", "downs", "holds"),
    [
        (GOOD, [], True),
        (replace(GOOD, how="refused", status=529), [], True),
        (replace(GOOD, how="unclear"), [DOWN], False),
        (replace(GOOD, how="lost"), [], False),
        (replace(GOOD, how="lost"), [DOWN], True),
        (replace(GOOD, how="lost", replica=1), [DOWN], False),
        (replace(GOOD, how="lost"), [Down(0, 90.0, 110.0)], True),
        (replace(GOOD, how="lost"), [Down(0, 50.0, 60.0), Down(0, 500.0, 510.0)], False),
    ],
)
def test_a_request_without_an_answer_is_noticed(outcome: Outcome, downs: list[Down], holds: bool) -> None:
    assert outcomes.answered_once([outcome], downs).holds is holds


def test_a_connection_that_breaks_to_a_replica_that_went_on_and_a_turn_answered_twice_are_noticed() -> None:
    loss = Loss(0, 100.0, 101.0, "stream")
    assert outcomes.lost_with_the_killed([loss], [DOWN]).holds
    assert not outcomes.lost_with_the_killed([replace(loss, replica=1)], [DOWN]).holds
    assert not outcomes.lost_with_the_killed([loss], []).holds
    assert outcomes.said_once({NONCE: 1}).holds
    assert not outcomes.said_once({NONCE: 2}).holds


READ = replace(GOOD, kind="count")
BOOKED = {"upstream_request_id": "a"}, {"upstream_request_id": "b"}


@pytest.mark.parametrize(
    ("sent", "ledger", "counted", "downs", "holds"),
    [
        (["a"], [], 0, [], True),
        (["a", "b"], [], 1, [], True),
        (["a", "b"], [], 0, [], False),
        (["a", "b"], [], 0, [DOWN], True),
        (["a", "b"], [], 2, [], False),
        (["a", "b"], BOOKED[:1], 1, [], True),
        (["a", "b"], BOOKED, 1, [], False),
        (["a", "b", "c"], [], 2, [], False),
    ],
)
def test_a_read_that_is_asked_too_often_booked_twice_or_not_counted_is_noticed(
    sent: list[str], ledger: list[dict[str, str]], counted: float, downs: list[Down], holds: bool
) -> None:
    assert outcomes.reads_hedged([READ], {NONCE: sent}, ledger, counted, downs).holds is holds
    repeated = replace(READ, attempts=2)
    assert outcomes.reads_hedged([repeated], {NONCE: ["a", "b", "c"]}, [], 1.0, []).holds


RUNNING = CanaryLook(10.0, 0, "running", "", 9, 1, False)
BACK = CanaryLook(20.0, 0, "rolled_back", "5 of 9 turns failed", 9, 5, True)
HEARD = replace(BACK, replica=1, reason="by another replica")


@pytest.mark.parametrize(
    ("looks", "must", "holds"),
    [
        ([RUNNING, BACK, HEARD], True, True),
        ([RUNNING, BACK], True, False),
        ([replace(BACK, at=14.0), replace(HEARD, at=14.0), BACK, HEARD], True, False),
        ([RUNNING, BACK, replace(HEARD, state="running")], True, False),
        ([RUNNING, HEARD, replace(HEARD, replica=0)], True, False),
        ([RUNNING, replace(RUNNING, at=20.0)], False, True),
        ([RUNNING, replace(RUNNING, at=20.0)], True, False),
        ([RUNNING, replace(RUNNING, at=20.0, worse=True)], False, False),
        ([RUNNING, replace(BACK, reason="by the operator")], True, False),
    ],
)
def test_a_bad_version_that_stays_is_noticed(looks: list[CanaryLook], must: bool, holds: bool) -> None:
    assert outcomes.canary_taken_back(looks, 15.0, replicas=2, told=True, must=must).holds is holds


@pytest.mark.anyio
async def test_the_bad_version_starts_and_dies_when_somebody_speaks_to_it(tmp_path: Path) -> None:
    made = canary.Canary(tmp_path / "canary")
    made.prepare()
    assert made.path.samefile(tmp_path / "canary" / "good")
    bad = tmp_path / "canary" / "bad"
    assert canary.said_version(bad) == canary.said_version(made.path), "replicas agree by its version"
    process = await asyncio.create_subprocess_exec(
        bad, "--print", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate(
        b'{"type":"control_request","request_id":"r1"}\n{"type":"user"}\n{"type":"x"}\n'
    )
    assert json.loads(said)["response"] == {"subtype": "success", "request_id": "r1", "response": {}}
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("length", "step"), [(600.0, 100.0), (75.0, 10.0), (8.0, 1.0), (0.9, 0.2)])
def test_axes_have_round_steps(length: float, step: float) -> None:
    assert plots.nice_step(length, 8) == pytest.approx(step)


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
        return [
            {"at": at * 30.0, "replica": 0.0, "life": 1.0, "resident_bytes": mb * 2**20}
            for at, mb in enumerate(megabytes)
        ]

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
    assert figures["surroundings"] == "Postgres, shared state in Redis, blobs in a directory, 2 replicas"
    assert figures["requests"] > 5
    assert done.record.downs or done.record.pauses
    shown = page.to_html(done, ["server-0.log"])
    assert shown.count("<svg") == 8
    assert 'href="server-0.log"' in shown
    assert "<script" not in shown
