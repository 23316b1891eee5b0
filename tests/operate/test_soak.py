"""The soak: its plan follows from its seed, its invariants notice what they are there for, and a short one passes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from claude_wrapper.testing.soak import outcomes, plan, report
from claude_wrapper.testing.soak.outcomes import Outcome, UpstreamRequest
from claude_wrapper.testing.soak.run import SoakSettings, soak

NONCE = "n00007x00xabcdef"
GOOD = Outcome(7, "plain", True, NONCE, 100.0, 1.0, "answered", 200, f"{NONCE} is the answer")
SENT = UpstreamRequest("req_1", 200, True, 100.0, 10, 5)
ROW = {"upstream_request_id": "req_1", "input_tokens": 10, "output_tokens": 5}


def test_the_same_seed_makes_the_same_soak_and_another_seed_another_one() -> None:
    def begin(seed: int) -> list[plan.ConversationPlan]:
        return list(itertools.islice(plan.conversations(seed), 50))

    assert begin(1) == begin(1) != begin(2)
    assert plan.faults(1, 600) == plan.faults(1, 600) != plan.faults(2, 600)
    kinds = {turn.kind for one in itertools.islice(plan.conversations(1), 500) for turn in one.turns}
    assert kinds == {kind for kind, _ in plan.TURN_KINDS}
    assert not [turn for one in begin(1) if one.calm for turn in one.turns if turn.fault]
    assert max(one.at for one in plan.faults(1, 600)) < 480


@pytest.mark.parametrize(
    ("outcome", "kills", "holds"),
    [
        (GOOD, [], True),
        (replace(GOOD, how="refused", status=529), [], True),
        (replace(GOOD, how="unclear"), [100.5], False),
        (replace(GOOD, how="lost"), [], False),
        (replace(GOOD, how="lost"), [100.5], True),
        (replace(GOOD, how="lost"), [500.0], False),
    ],
)
def test_a_request_without_an_answer_is_noticed(outcome: Outcome, kills: list[float], holds: bool) -> None:
    assert outcomes.answered_once([outcome], kills).holds is holds


@pytest.mark.parametrize(
    ("outcome", "holds"),
    [
        (GOOD, True),
        (replace(GOOD, text=f"{NONCE} n00008x00x000000"), False),
        (replace(GOOD, text="something else"), False),
        (replace(GOOD, how="hung up", text=""), True),
    ],
)
def test_an_answer_of_another_conversation_is_noticed(outcome: Outcome, holds: bool) -> None:
    assert outcomes.not_crossed([outcome]).holds is holds


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


@pytest.mark.anyio
@pytest.mark.real_cli
async def test_twenty_seconds_of_faults_leave_everything_in_order(reachable_tmp_path: Path) -> None:
    settings = SoakSettings(
        seconds=20.0,
        seed=34,  # two of the first four callers are untouched, and the server is killed once
        callers=4,
        max_processes=6,
        process_fault_every=2.0,
        server_fault_every=8.0,
        calm_p99_seconds=60.0,  # this machine may be busy with other tests
    )
    done = await soak(settings, reachable_tmp_path)
    figures = report.summary(done)
    assert [one for one in figures["invariants"] if not one["holds"]] == []
    assert figures["requests"] > 5
    assert figures["faults"] > 3
    assert done.record.kills
    page = report.to_html(done)
    assert page.count("<svg") == 5
    assert "<script" not in page
