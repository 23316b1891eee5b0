"""Single decisions: who gets what, what makes room, what is told to whom."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from claude_wrapper.errors import IllegalTransition
from claude_wrapper.pool import messages as m
from claude_wrapper.pool.requests import Keep, Kind, Refusal
from claude_wrapper.pool.settings import PoolSettings
from claude_wrapper.pool.slot import Reason, SlotState
from pool.profiles import AGENT, CHAT
from pool.simulator import World

BASE = PoolSettings(
    spares={CHAT: 1},
    max_processes=6,
    parallel_spawns=2,
    refill_delay_seconds=0.0,
    max_age_seconds=None,
    max_turns=None,
    freeze_after_seconds=None,
)


def world(**changes: Any) -> World:
    made = World(dataclasses.replace(BASE, **changes))
    made.settle()
    return made


def actions_of(it: World, kind: type[m.Action]) -> list[Any]:
    return [action for action in it.actions if isinstance(action, kind)]


# The order of a claim ---------------------------------------------------------------------------------------------------


def test_a_session_gets_its_own_process_back() -> None:
    it = world()
    slot = it.keep_idle("s")
    claim = it.ask("s")
    assert (it.granted[claim].slot, it.granted[claim].kind) == (slot, Kind.WARM)


def test_a_new_session_takes_a_spare_and_the_spare_is_replaced() -> None:
    it = world()
    claim = it.ask("s")
    assert it.granted[claim].kind is Kind.SPARE
    assert len(it.spawning) == 1


def test_the_replacement_of_a_spare_waits_so_that_it_does_not_disturb_the_first_turn() -> None:
    it = world(refill_delay_seconds=0.5)
    it.ask("s")
    assert not it.spawning
    it.pass_time(0.4)
    assert not it.spawning
    it.pass_time(0.1)
    assert len(it.spawning) == 1


def test_without_a_spare_a_claim_starts_a_process_of_its_own() -> None:
    it = world(spares={})
    claim = it.ask("s")
    assert claim not in it.granted
    it.settle()
    assert it.granted[claim].kind is Kind.COLD


def test_a_spare_that_becomes_ready_first_is_taken_by_the_claim_that_started_another_process() -> None:
    it = world(spares={}, parallel_spawns=2)
    first = it.ask("s1")
    second = it.ask("s2")
    slots = list(it.spawning)
    it.withdraw(first)
    it.ready(slots[0])
    assert it.granted[second].slot == slots[0]


def test_a_clean_process_of_the_organisation_goes_before_a_spare() -> None:
    it = world()
    claim = it.obtain("s1", "a")
    slot = it.held[claim].slot
    it.release(claim, Keep.DETACH)
    assert slot in it.rewinding
    it.settle()
    other = it.ask("s2", "b")
    assert it.granted[other].kind is Kind.SPARE
    it.settle()
    own = it.ask("s3", "a", principal="somebody else")
    assert (it.granted[own].slot, it.granted[own].kind) == (slot, Kind.REUSED)


def test_a_process_that_cannot_be_made_clean_is_stopped() -> None:
    it = world()
    claim = it.obtain("s1")
    slot = it.held[claim].slot
    it.release(claim, Keep.DETACH)
    it.rewound(slot, clean=False)
    assert it.stopping[slot].reason is Reason.NOT_CLEAN


def test_reuse_takes_the_principals_least_recently_used_process_after_hibernating_it() -> None:
    it = world(spares={CHAT: 1})
    oldest = it.keep_idle("s1", principal="p")
    it.now += 1
    it.keep_idle("s2", principal="p")
    it.keep_idle("s3", principal="q")
    claim = it.ask("s4", principal="p", reuse_idle=True)
    assert it.hibernating[oldest].reason is Reason.REUSE
    it.hibernated(oldest)
    assert it.rewinding == {oldest}
    it.rewound(oldest)
    assert (it.granted[claim].slot, it.granted[claim].kind) == (oldest, Kind.REUSED)


def test_a_claim_whose_reuse_fails_takes_a_spare() -> None:
    it = world()
    slot = it.keep_idle("s1")
    it.settle()
    claim = it.ask("s2", reuse_idle=True)
    it.hibernated(slot)
    it.rewound(slot, clean=False)
    assert it.granted[claim].kind is Kind.SPARE


def test_special_launch_data_never_takes_a_spare_and_arrives_at_the_spawn() -> None:
    it = world()
    claim = it.ask("s", resume="transcript")
    spawn = next(iter(it.spawning.values()))
    assert spawn.resume == "transcript"
    it.settle()
    assert (it.granted[claim].kind, it.granted[claim].resume) == (Kind.COLD, "transcript")


def test_launch_data_that_can_be_given_later_takes_a_spare_that_waits() -> None:
    it = world(spares={CHAT: 1})
    it.settle()
    claim = it.ask("s", resume="transcript", resume_on_spare=True)
    assert (it.granted[claim].kind, it.granted[claim].resume) == (Kind.SPARE, None)


def test_without_a_spare_a_process_is_started_with_it_and_no_spare_is_taken_meanwhile() -> None:
    it = world(spares={CHAT: 1})
    it.settle()
    it.ask("other")
    claim = it.ask("s", resume="transcript", resume_on_spare=True)
    own = next(slot for slot, spawn in it.spawning.items() if spawn.resume is not None)
    for slot in list(it.spawning):
        if slot != own:
            it.ready(slot)
    assert claim not in it.granted
    it.ready(own)
    assert (it.granted[claim].kind, it.granted[claim].resume) == (Kind.COLD, "transcript")


def test_a_process_with_special_launch_data_whose_claimer_is_gone_is_stopped() -> None:
    it = world(spares={})
    claim = it.ask("s", resume="transcript")
    slot = next(iter(it.spawning))
    it.withdraw(claim)
    it.ready(slot)
    assert it.stopping[slot].reason is Reason.UNCLAIMED


def test_launch_data_of_a_hibernation_reaches_the_claim_that_waited_for_it() -> None:
    it = world()
    slot = it.keep_idle("s")
    it.send(m.SessionEnded("s", hibernate=True))
    claim = it.ask("s")
    assert claim not in it.granted
    it.hibernating.pop(slot)
    it.requests[claim] = dataclasses.replace(it.requests[claim], resume="kept")
    it.send(m.Hibernated(slot, "kept"))
    it.settle()
    assert it.granted[claim].resume == "kept"


def test_a_session_that_needs_another_profile_leaves_its_process_after_its_state_was_kept() -> None:
    it = world(spares={CHAT: 1, AGENT: 1})
    slot = it.keep_idle("s", profile=CHAT)
    it.settle()
    claim = it.ask("s", profile=AGENT)
    assert it.hibernating[slot].reason is Reason.PROFILE
    assert claim not in it.granted
    it.hibernated(slot)
    assert it.granted[claim].kind is Kind.SPARE


# One turn at a time ----------------------------------------------------------------------------------------------------


def test_claims_of_one_session_are_served_in_order_from_one_process() -> None:
    it = world()
    claims = [it.ask("s") for _ in range(3)]
    served = []
    for claim in claims:
        assert list(it.granted) == [claim]
        served.append(it.accept(claim))
        it.release(claim)
    assert len({grant.slot for grant in served}) == 1
    assert [grant.kind for grant in served] == [Kind.SPARE, Kind.WARM, Kind.WARM]


def test_the_next_claim_of_a_session_takes_over_when_the_first_gives_up() -> None:
    it = world(spares={})
    first, second, third = (it.ask("s") for _ in range(3))
    it.withdraw(second)
    it.withdraw(first)
    it.settle()
    assert list(it.granted) == [third]


def test_a_session_of_another_organisation_is_refused() -> None:
    it = world()
    it.keep_idle("s", "a")
    claim = it.ask("s", "b")
    assert it.refused[claim].refusal is Refusal.FOREIGN
    waiting = it.ask("t", "a")
    assert it.refused[it.ask("t", "b")].refusal is Refusal.FOREIGN
    assert waiting in it.granted


# Hand-over -------------------------------------------------------------------------------------------------------------


def test_a_spare_that_nobody_accepted_is_a_spare_again() -> None:
    it = world()
    claim = it.ask("s", "a")
    slot = it.granted[claim].slot
    it.withdraw(claim)
    other = it.ask("t", "b")
    assert it.granted[other].slot == slot


def test_a_clean_process_that_nobody_accepted_stays_with_its_organisation() -> None:
    it = world(spares={})
    claim = it.obtain("s", "a")
    slot = it.held[claim].slot
    it.release(claim, Keep.DETACH)
    it.settle()
    it.withdraw(it.ask("t", "a"))
    assert it.state.slots[slot].state is SlotState.DETACHED
    assert it.state.slots[slot].org == "a"


def test_a_process_that_dies_before_it_is_accepted_is_replaced() -> None:
    it = world(spares={CHAT: 2}, parallel_spawns=3)
    claim = it.ask("s")
    slot = it.granted[claim].slot
    it.exited(slot)
    assert it.granted[claim].slot != slot
    assert it.stopping[slot].reason is Reason.CRASHED


def test_an_outstanding_claims_id_cannot_be_used_again_and_strangers_cannot_release() -> None:
    it = world()
    claim = it.ask("s")
    with pytest.raises(IllegalTransition, match="outstanding already"):
        it.send(m.Asked(it.requests[claim]))
    with pytest.raises(IllegalTransition, match="holds no slot"):
        it.send(m.Released(claim, Keep.SESSION))
    with pytest.raises(IllegalTransition, match="holds no slot"):
        it.send(m.Accepted("unknown"))
    it.accept(claim)
    with pytest.raises(IllegalTransition, match="released, not withdrawn"):
        it.send(m.Withdrawn(claim))
    it.send(m.Withdrawn("unknown"))


# Room ------------------------------------------------------------------------------------------------------------------


def test_when_full_the_organisation_that_holds_most_above_its_share_gives_up_its_least_recently_used() -> None:
    it = world(spares={}, max_processes=4)
    it.keep_idle("b1", "b")
    hog = [it.keep_idle(f"a{n}", "a") for n in range(3)]
    claim = it.ask("c1", "c")
    assert list(it.hibernating) == [hog[0]]
    assert it.hibernating[hog[0]].reason is Reason.CAPACITY
    it.settle()
    assert it.granted[claim].kind is Kind.COLD


def test_weight_raises_the_share() -> None:
    it = world(spares={}, max_processes=4)
    for n in range(3):
        it.keep_idle(f"a{n}", "a", weight=6)
    it.keep_idle("b0", "b")
    it.ask("c0", "c")
    assert [action.session for action in it.hibernating.values()] == ["b0"]


def test_when_full_a_spare_of_another_profile_goes_before_anybodys_idle_process() -> None:
    it = world(spares={AGENT: 1}, max_processes=2)
    it.keep_idle("s1", profile=CHAT)
    claim = it.ask("s2", "b", profile=CHAT)
    assert not it.hibernating
    assert [stop.reason for stop in it.stopping.values()] == [Reason.CAPACITY]
    it.settle()
    assert claim in it.granted
    assert it.state.count(SlotState.SPARE) == 0


def test_exactly_as_much_room_is_made_as_is_needed() -> None:
    it = world(spares={}, max_processes=4, parallel_spawns=4)
    for n in range(4):
        it.keep_idle(f"a{n}", "a")
    it.ask("b0", "b")
    assert len(it.hibernating) == 1
    it.ask("b1", "b")
    assert len(it.hibernating) == 2
    it.settle()
    assert it.state.count(SlotState.IDLE) == 2


def test_an_organisation_at_its_limit_makes_room_itself() -> None:
    it = world(max_processes_per_org=1)
    slot = it.keep_idle("a0", "a")
    it.keep_idle("b0", "b")
    claim = it.ask("a1", "a")
    assert it.hibernating[slot].reason is Reason.ORG_LIMIT
    it.settle()
    assert claim in it.granted


def test_a_principal_at_its_limit_makes_room_itself_and_does_not_block_its_organisation() -> None:
    it = world(max_processes_per_principal=1)
    busy = it.obtain("x0", principal="x")
    waiting = it.ask("x1", principal="x")
    it.settle()
    assert waiting not in it.granted
    other = it.ask("y0", principal="y")
    assert other in it.granted
    it.release(busy)
    assert [a.reason for a in it.hibernating.values()] == [Reason.PRINCIPAL_LIMIT]
    it.settle()
    assert waiting in it.granted


def test_a_full_queue_refuses_the_newest_claim_of_whoever_waits_for_most() -> None:
    it = world(spares={}, max_processes=1, queue_length=3)
    it.obtain("a0", "a")
    hog = [it.ask(f"a{n}", "a") for n in range(1, 4)]
    late = it.ask("b0", "b")
    assert it.refused[hog[-1]].refusal is Refusal.OVERLOADED
    assert late in it.state.waiting
    assert it.refused[it.ask("a9", "a")].refusal is Refusal.OVERLOADED


def test_a_full_queue_does_not_refuse_what_can_be_had_at_once_and_evicts_nothing_for_what_it_refuses() -> None:
    it = world(spares={}, max_processes=1, queue_length=0)
    claim = it.ask("s")
    assert it.refused[claim].refusal is Refusal.OVERLOADED
    assert not it.spawning
    it = world(spares={CHAT: 1}, queue_length=0)
    assert it.ask("s") in it.granted


def test_a_claim_that_waited_too_long_is_told_for_what() -> None:
    it = world(spares={}, max_processes=1, queue_seconds=30.0)
    it.obtain("s")
    follower, stranger = it.ask("s"), it.ask("t", "b")
    it.pass_time(29.9)
    assert not it.refused
    it.pass_time(0.1)
    assert it.refused[follower] == m.Refuse(follower, Refusal.TIMEOUT, None, behind_own_session=True)
    assert it.refused[stranger] == m.Refuse(stranger, Refusal.TIMEOUT, None, behind_own_session=False)


def test_a_starved_organisation_takes_the_process_that_others_hand_on_among_themselves() -> None:
    """One session's claims in a row would keep the only process for ever."""
    it = world(spares={}, max_processes=1)
    claim = it.obtain("a0", "a")
    starved = it.ask("b0", "b")
    turns = 0
    while not it.hibernating:
        turns += 1
        assert turns <= 14  # the patience of two lanes, and a turn to notice
        it.ask("a0", "a")
        it.release(claim)
        if not it.hibernating:
            claim = next(iter(it.granted))
            it.accept(claim)
    it.settle()
    assert starved in it.granted


# Starting fails --------------------------------------------------------------------------------------------------------


def test_a_claim_is_told_when_starting_failed_so_often_on_its_behalf() -> None:
    it = world(spares={}, spawn_attempts=2)
    claim = it.ask("s")
    it.broke(next(iter(it.spawning)))
    assert not it.spawning
    it.pass_time(0.1)
    it.broke(next(iter(it.spawning)))
    assert it.refused[claim].refusal is Refusal.SPAWN_FAILED
    assert str(it.refused[claim].cause) == "no such binary"


def test_a_time_out_after_a_failed_start_says_that_starting_failed() -> None:
    it = world(spares={}, queue_seconds=5.0)
    claim = it.ask("s")
    it.broke(next(iter(it.spawning)))
    it.pass_time(5.0)
    assert it.refused[claim].refusal is Refusal.SPAWN_FAILED


def test_spares_that_do_not_start_are_tried_less_and_less_often() -> None:
    it = World(BASE)
    starts = []
    for _ in range(3000):
        if it.spawning:
            starts.append(it.now)
            it.broke(next(iter(it.spawning)))
        it.pass_time(0.1)
    gaps = [round(later - earlier) for earlier, later in itertools.pairwise(starts)]
    assert gaps == sorted(gaps)
    assert 59.0 < gaps[-1] < 61.0
    claim = it.ask("s")
    it.pass_time(1.0)
    assert it.spawning, "a claim does not wait for the long delays of spares"
    it.settle()
    assert claim in it.granted


def test_a_spare_that_dies_at_once_counts_as_a_failed_start() -> None:
    it = world()
    for _ in range(2):
        spare = next(iter(it.state.by_state[SlotState.SPARE]))
        it.exited(spare)
        it.stopped(spare)
        assert not it.spawning
        it.pass_time(1.0)
        it.settle()
    assert it.state.backoff(CHAT).failures == 2
    it.pass_time(60.0)
    assert it.state.backoff(CHAT).failures == 0


def test_one_start_stays_free_for_claims_while_spares_are_refilled() -> None:
    it = World(dataclasses.replace(BASE, spares={AGENT: 4}, parallel_spawns=2))
    assert len(it.spawning) == 1
    it.ask("s", profile=CHAT)
    assert [spawn.profile for spawn in it.spawning.values()] == [AGENT, CHAT]


# Crashes ---------------------------------------------------------------------------------------------------------------


def test_the_session_of_an_idle_process_that_dies_is_told() -> None:
    it = world()
    slot = it.keep_idle("s")
    it.exited(slot)
    assert it.lost == [m.Lost("s", slot)]
    assert it.stopping[slot].reason is Reason.CRASHED
    it.exited(slot)
    assert len(it.lost) == 1


def test_a_process_that_died_under_its_holder_is_stopped_at_release_whatever_the_holder_says() -> None:
    it = world()
    claim = it.obtain("s")
    slot = it.held[claim].slot
    it.exited(slot)
    assert not it.lost
    it.release(claim, Keep.SESSION)
    assert it.stopping[slot].reason is Reason.CRASHED
    assert "s" not in it.state.sessions


@pytest.mark.parametrize("while_rewinding", [False, True])
def test_a_process_that_dies_while_it_is_emptied_serves_nobody(while_rewinding: bool) -> None:
    it = world(spares={})
    slot = it.keep_idle("s")
    claim = it.ask("t", reuse_idle=True)
    if while_rewinding:
        it.hibernated(slot)
        it.exited(slot)
        it.rewound(slot)
    else:
        it.exited(slot)
        it.hibernated(slot)
    assert it.stopping[slot].reason is Reason.CRASHED
    it.settle()
    assert it.granted[claim].slot != slot


# Upkeep ----------------------------------------------------------------------------------------------------------------


def test_an_idle_process_is_frozen_after_a_while_and_thawed_before_it_is_handed_over() -> None:
    it = world(freeze_after_seconds=5.0)
    slot = it.keep_idle("s")
    it.pass_time(4.9)
    assert not it.frozen
    it.pass_time(0.1)
    assert it.frozen == {slot}
    claim = it.ask("s")
    assert it.actions[0] == m.Thaw(slot)
    assert it.granted[claim].slot == slot


def test_spares_are_frozen_only_when_the_settings_say_so() -> None:
    it = world(freeze_after_seconds=5.0)
    it.pass_time(50.0)
    assert not it.frozen
    it = world(freeze_after_seconds=5.0, freeze_spares=True)
    it.pass_time(50.0)
    assert it.frozen == set(it.state.by_state[SlotState.SPARE])


def test_the_sweep_hibernates_what_was_idle_too_long_and_stops_what_is_detached() -> None:
    it = world(spares={}, idle_seconds=300.0, sweep_seconds=60.0)
    idle = it.keep_idle("s")
    claim = it.obtain("t")
    detached = it.held[claim].slot
    it.release(claim, Keep.DETACH)
    it.settle()
    it.pass_time(299.0)
    assert not it.hibernating
    it.pass_time(60.0)
    assert it.hibernating[idle].reason is Reason.IDLE
    assert it.stopping[detached].reason is Reason.IDLE


def test_superfluous_and_old_spares_go() -> None:
    it = world(spares={CHAT: 1}, idle_seconds=100.0, sweep_seconds=10.0, max_age_seconds=1000.0)
    claims = [it.ask(f"s{n}") for n in range(3)]
    for claim in claims:
        it.withdraw(claim)
    it.settle()
    assert it.state.count(SlotState.SPARE) == 3
    it.pass_time(100.0)
    assert [stop.reason for stop in it.stopping.values()] == [Reason.SURPLUS] * 2
    it.settle()
    it.pass_time(1000.0)
    assert [stop.reason for stop in it.stopping.values()] == [Reason.AGE]
    it.settle()
    assert it.state.count(SlotState.SPARE) == 1


@pytest.mark.parametrize(
    ("changes", "memory", "reason"),
    [
        ({"max_turns": 1}, None, Reason.TURNS),
        ({"max_resident_bytes": 100}, 101, Reason.RESIDENT),
        ({"max_age_seconds": 50.0}, None, Reason.AGE),
    ],
)
def test_a_worn_out_process_is_recycled_when_it_is_given_back(
    changes: dict[str, Any], memory: int | None, reason: Reason
) -> None:
    it = world(**changes)
    kept = it.obtain("s")
    detached = it.obtain("t")
    it.now += 50.0
    slots = it.held[kept].slot, it.held[detached].slot
    it.release(kept, Keep.SESSION, memory)
    assert it.hibernating[slots[0]].reason is reason
    it.release(detached, Keep.DETACH, memory)
    assert it.stopping[slots[1]].reason is reason


def test_processes_that_started_together_are_not_recycled_together() -> None:
    it = world(spares={}, max_processes=40, parallel_spawns=40, max_age_seconds=1000.0)
    for n in range(40):
        it.keep_idle(f"s{n}")
    it.now += 950.0
    recycled = 0
    for n in range(40):
        claim = it.ask(f"s{n}")
        it.accept(claim)
        it.release(claim)
        recycled += bool(it.actions and isinstance(it.actions[0], m.Hibernate))
    assert 5 < recycled < 35


def test_above_the_memory_limit_nothing_starts_and_idle_processes_go() -> None:
    it = world(spares={}, memory_limit_bytes=250)
    slots = [it.keep_idle(f"s{n}") for n in range(2)]
    it.send(m.Measured(dict.fromkeys(slots, 100)))
    assert not it.hibernating
    claim = it.ask("t", "b")
    assert it.hibernating.keys() == {slots[0]}
    assert not it.spawning
    it.settle()
    assert claim in it.granted
    it.send(m.Measured(dict.fromkeys([slots[1], it.granted[claim].slot], 200)))
    assert it.hibernating[slots[1]].reason is Reason.MEMORY


# The end ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hibernate", [False, True])
def test_an_ended_session_leaves_its_process_at_once_or_at_release(hibernate: bool) -> None:
    it = world(spares={})
    slot = it.keep_idle("s")
    it.send(m.SessionEnded("s", hibernate))
    assert (slot in it.hibernating, slot in it.rewinding) == (hibernate, not hibernate)
    it.settle()
    claim = it.obtain("t")
    slot = it.held[claim].slot
    it.send(m.SessionEnded("t", hibernate))
    assert not it.hibernating
    it.release(claim)
    assert (slot in it.hibernating, slot in it.rewinding) == (hibernate, not hibernate)
    it.send(m.SessionEnded("unknown"))


def test_a_worn_out_process_of_an_ended_session_is_stopped() -> None:
    it = world(max_turns=1)
    claim = it.obtain("s")
    it.release(claim)
    it.settle()
    it = world(max_age_seconds=10.0)
    slot = it.keep_idle("s")
    it.now += 10.0
    it.send(m.SessionEnded("s"))
    assert it.stopping[slot].reason is Reason.AGE


def test_draining_refuses_new_claims_serves_waiting_ones_and_refills_nothing() -> None:
    it = world(spares={CHAT: 1}, max_processes=1)
    busy = it.obtain("s")
    waiting = it.ask("t")
    it.send(m.DrainAsked())
    assert it.refused[it.ask("u")].refusal is Refusal.DRAINING
    it.release(busy)
    it.settle()
    assert waiting in it.granted
    it.accept(waiting)
    it.release(waiting, Keep.DISCARD)
    it.settle()
    assert not it.state.slots


def test_closing_keeps_idle_sessions_and_waits_for_busy_processes() -> None:
    it = world(spares={CHAT: 1})
    idle = it.keep_idle("s")
    busy = it.obtain("t")
    unaccepted = it.ask("u")
    detaching = it.obtain("v")
    it.settle()
    it.send(m.CloseAsked())
    assert it.hibernating[idle].reason is Reason.CLOSED
    it.withdraw(unaccepted)
    it.release(busy)
    it.release(detaching, Keep.DETACH)
    it.settle()
    assert not it.state.slots


def test_a_forced_close_stops_busy_processes_and_a_late_release_does_no_harm() -> None:
    it = world()
    busy, unaccepted = it.obtain("s"), it.ask("t")
    it.send(m.CloseAsked(force=True))
    assert it.refused[unaccepted].refusal is Refusal.DRAINING
    it.settle()
    assert not it.state.slots
    it.release(busy)
    assert not it.state.claims


def test_reports_about_slots_that_are_gone_or_told_to_stop_change_nothing() -> None:
    it = world(spares={})
    it.ask("s")
    slot = next(iter(it.spawning))
    it.send(m.CloseAsked(force=True))
    for event in (
        m.SpawnReady(slot),
        m.SpawnBroke(slot),
        m.Hibernated(slot),
        m.Rewound(slot, True),
        m.Exited(slot),
        m.StopEnded("slot_unknown"),
    ):
        assert it.send(event) == []
    it.settle()
    assert not it.state.slots


def test_weights_of_organisations_that_are_gone_are_forgotten() -> None:
    it = world(spares={}, max_processes=1)
    for n in range(300):
        it.withdraw(it.ask(f"s{n}", f"org{n}"))
        it.settle()
    assert len(it.state.weights) < 100
