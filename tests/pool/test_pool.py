"""The async shell over scripted processes, in virtual time: nothing here waits for real."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from claude_wrapper.errors import Conflict, Draining, NotFound, PoolOverloaded, PoolTimeout, SpawnFailed
from claude_wrapper.pool import Claim, ClaimRequest, Keep, Kind, Pool, Reason
from pool.conftest import MakePool
from pool.doubles import FakeProcess, Notebook, ScriptedFactory, broken_cli
from pool.profiles import AGENT, CHAT

pytestmark = pytest.mark.anyio

_serial = iter(range(10**9))


def request(session: str, org: str = "a", principal: str = "p", **more: Any) -> ClaimRequest:
    return ClaimRequest(f"claim{next(_serial)}", session, org, principal, more.pop("profile", CHAT), **more)


async def started(pool: Pool[FakeProcess]) -> Pool[FakeProcess]:
    """With its spares ready."""
    await pool.start()
    await asyncio.sleep(10)
    return pool


async def idle(pool: Pool[FakeProcess], session: str, org: str = "a", **more: Any) -> str:
    claim = await pool.claim(request(session, org, **more))
    await claim.release(Keep.SESSION)
    return claim.slot


def now() -> float:
    return asyncio.get_running_loop().time()


# Claims ----------------------------------------------------------------------------------------------------------------


async def test_a_spare_is_handed_over_at_once_and_a_warm_process_too(make_pool: MakePool) -> None:
    pool = await started(make_pool())
    at = now()
    first = await pool.claim(request("s"))
    await first.release(Keep.SESSION)
    second = await pool.claim(request("s"))
    assert (first.kind, second.kind) == (Kind.SPARE, Kind.WARM)
    assert second.process is first.process
    assert (now(), second.waited_seconds) == (at, 0.0)


async def test_a_claim_without_a_spare_waits_for_its_own_start_and_no_longer(make_pool: MakePool) -> None:
    pool = make_pool(spares={})
    await pool.start()
    claim = await pool.claim(request("s"))
    assert (claim.kind, claim.waited_seconds, now()) == (Kind.COLD, 1.0, 1.0)


async def test_a_slow_start_delays_nobody_else(make_pool: MakePool, factory: ScriptedFactory) -> None:
    pool = await started(make_pool(spares={CHAT: 2}))
    await idle(pool, "s")
    factory.spawn_seconds = 20.0
    slow = asyncio.create_task(pool.claim(request("t", profile=AGENT)))
    await asyncio.sleep(0.1)
    at = now()
    assert (await pool.claim(request("s"))).kind is Kind.WARM
    assert (await pool.claim(request("u"))).kind is Kind.SPARE
    assert now() == at
    assert (await slow).waited_seconds == 20.0


async def test_the_launch_data_of_a_claim_reaches_the_factory_and_the_claim(
    make_pool: MakePool, factory: ScriptedFactory
) -> None:
    pool = await started(make_pool())
    claim = await pool.claim(request("s", resume={"uuid": "u"}))
    assert (claim.kind, claim.resume) == (Kind.COLD, {"uuid": "u"})
    assert (claim.slot, CHAT, {"uuid": "u"}) in factory.started
    await claim.release(Keep.SESSION)
    assert (await pool.claim(request("s", resume={"uuid": "u"}))).resume is None, "warm: it was not started for this"


async def test_a_claim_that_waited_for_a_hibernation_resumes_from_what_was_kept(
    make_pool: MakePool, notebook: Notebook
) -> None:
    pool = await started(make_pool())
    await idle(pool, "s")
    notebook.resume = "kept"
    await pool.end_session("s", hibernate=True)
    claim = await pool.claim(request("s"))
    assert (claim.kind, claim.resume) == (Kind.COLD, "kept")


async def test_claims_of_one_session_are_served_one_after_the_other(make_pool: MakePool) -> None:
    pool = await started(make_pool())
    order: list[int] = []
    inside = 0

    async def turn(number: int) -> Claim[FakeProcess]:
        nonlocal inside
        claim = await pool.claim(request("s"))
        inside += 1
        assert inside == 1
        order.append(number)
        await asyncio.sleep(1)
        inside -= 1
        await claim.release(Keep.SESSION)
        return claim

    claims = await asyncio.gather(*(turn(n) for n in range(5)))
    assert order == list(range(5))
    assert len({claim.slot for claim in claims}) == 1


async def test_releasing_twice_does_nothing_the_second_time(make_pool: MakePool) -> None:
    pool = await started(make_pool())
    first = await pool.claim(request("s"))
    await first.release(Keep.SESSION)
    second = await pool.claim(request("s"))
    await first.release(Keep.DISCARD)
    assert pool.stats().by_state["bound_busy"] == 1
    await second.release(Keep.DISCARD)


async def test_a_claims_id_can_be_used_once_at_a_time(make_pool: MakePool) -> None:
    pool = await started(make_pool())
    asked = request("s")
    claim = await pool.claim(asked)
    with pytest.raises(Conflict, match="outstanding already"):
        await pool.claim(asked)
    await claim.release(Keep.SESSION)
    await (await pool.claim(asked)).release(Keep.SESSION)


# Refusals --------------------------------------------------------------------------------------------------------------


async def test_a_claim_fails_after_the_queueing_time_and_says_what_it_waited_for(make_pool: MakePool) -> None:
    pool = await started(make_pool(max_processes=1, queue_seconds=30.0))
    busy = await pool.claim(request("s"))
    at = now()
    outcomes = await asyncio.gather(pool.claim(request("s")), pool.claim(request("t", "b")), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [PoolTimeout, PoolTimeout]
    assert "earlier turn of this session" in str(outcomes[0])
    assert now() == at + 30
    assert pool.stats().outstanding == 1
    await busy.release(Keep.SESSION)


async def test_a_full_queue_refuses_at_once(make_pool: MakePool) -> None:
    pool = await started(make_pool(max_processes=1, queue_length=1))
    busy = await pool.claim(request("s"))
    waiting = asyncio.create_task(pool.claim(request("t")))
    await asyncio.sleep(0)
    with pytest.raises(PoolOverloaded, match="1 claims wait") as refused:
        await pool.claim(request("u"))
    assert refused.value.retry_after
    await busy.release(Keep.DISCARD)
    await waiting


async def test_a_session_of_another_organisation_does_not_exist(make_pool: MakePool) -> None:
    pool = await started(make_pool())
    await idle(pool, "s", "a")
    with pytest.raises(NotFound):
        await pool.claim(request("s", "b"))


async def test_a_start_that_fails_is_repeated_and_then_told(make_pool: MakePool, factory: ScriptedFactory) -> None:
    pool = make_pool(spares={}, spawn_attempts=3)
    factory.failures = [broken_cli(), broken_cli()]
    assert (await pool.claim(request("s"))).kind is Kind.COLD
    factory.failures = [broken_cli() for _ in range(3)]
    with pytest.raises(SpawnFailed, match="exited at once"):
        await pool.claim(request("t"))
    assert pool.stats().spawn_failures == 5


async def test_an_unexpected_error_of_the_factory_is_told_as_a_failed_start(
    make_pool: MakePool, factory: ScriptedFactory
) -> None:
    pool = make_pool(spares={}, spawn_attempts=1)
    factory.failures = [OSError("no space left on device")]
    with pytest.raises(SpawnFailed, match="no space left"):
        await pool.claim(request("s"))


async def test_a_start_that_hangs_is_given_up(make_pool: MakePool, factory: ScriptedFactory) -> None:
    pool = make_pool(spares={}, spawn_attempts=1, spawn_seconds=10.0)
    factory.spawn_seconds = 1000.0
    with pytest.raises(SpawnFailed, match="within 10 s"):
        await pool.claim(request("s"))
    assert now() == 10.0


# Cancellation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0.0, 0.5, 1.0, 1.5])
async def test_a_cancelled_claim_holds_nothing_whenever_it_is_cancelled(make_pool: MakePool, after: float) -> None:
    pool = make_pool(spares={})
    await pool.start()
    task = asyncio.create_task(pool.claim(request("s")))
    await asyncio.sleep(after)
    task.cancel()
    outcome = (await asyncio.gather(task, return_exceptions=True))[0]
    if isinstance(outcome, Claim):
        await outcome.release(Keep.SESSION)
    else:
        assert isinstance(outcome, asyncio.CancelledError)
    await asyncio.sleep(5)
    stats = pool.stats()
    assert (stats.outstanding, stats.by_state["bound_busy"]) == (0, 0)


async def test_a_claimer_cancelled_between_grant_and_acceptance_returns_the_process_in_that_step(
    make_pool: MakePool,
) -> None:
    pool = await started(make_pool(spares={CHAT: 1}, max_processes=1))
    busy = await pool.claim(request("s"))
    first = asyncio.create_task(pool.claim(request("s")))
    await asyncio.sleep(1)
    second = asyncio.create_task(pool.claim(request("s")))
    await asyncio.sleep(1)
    await busy.release(Keep.SESSION)  # grants to the first, which has not run yet
    assert pool.stats().by_state["bound_busy"] == 1
    first.cancel()
    claim = await second
    assert claim.kind is Kind.WARM
    assert first.cancelled()
    assert pool.stats().withdrawn == 1


async def test_a_spare_that_a_cancelled_claimer_never_accepted_serves_another_organisation(make_pool: MakePool) -> None:
    pool = make_pool(spares={}, max_processes=1)
    first = asyncio.create_task(pool.claim(request("s", "a")))
    second = asyncio.create_task(pool.claim(request("t", "b")))
    await asyncio.sleep(0.9)

    def cancel_when_granted() -> None:
        if pool.stats().by_state["bound_busy"]:
            first.cancel()
        else:
            asyncio.get_running_loop().call_soon(cancel_when_granted)

    asyncio.get_running_loop().call_at(1.0, cancel_when_granted)
    claim = await second
    assert first.cancelled()
    assert claim.waited_seconds == 1.0
    assert pool.stats().spawn_count == 1


async def test_storms_of_cancellation_leave_the_pool_whole(make_pool: MakePool) -> None:
    pool = await started(make_pool(spares={CHAT: 1}, max_processes=3, parallel_spawns=2))

    async def caller(number: int) -> None:
        claim = await pool.claim(request(f"s{number % 7}", f"o{number % 7 % 3}"))
        try:
            await asyncio.sleep(0.3)
        finally:
            await claim.release(Keep.SESSION if number % 3 else Keep.DETACH)

    tasks = [asyncio.create_task(caller(n)) for n in range(60)]
    for n, task in enumerate(tasks):
        if n % 2:
            await asyncio.sleep(0.05 * (n % 5))
            task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(o) for o in outcomes} <= {type(None), asyncio.CancelledError}
    assert pool.stats().outstanding == 0
    assert (await pool.claim(request("last", "z"))).process.alive


# Idle processes --------------------------------------------------------------------------------------------------------


async def test_an_idle_process_is_frozen_and_thawed_for_the_next_turn(
    make_pool: MakePool, factory: ScriptedFactory
) -> None:
    pool = await started(make_pool(freeze_after_seconds=5.0))
    slot = await idle(pool, "s")
    await asyncio.sleep(4.9)
    assert not pool.stats().slots[0].frozen
    await asyncio.sleep(0.2)
    assert pool.stats().slots[0].frozen
    claim = await pool.claim(request("s"))
    assert not claim.process.frozen
    assert [entry for entry in factory.log if entry[1] == slot] == [("freeze", slot), ("thaw", slot)]


async def test_an_idle_process_is_thawed_and_hibernated_before_it_is_stopped(
    make_pool: MakePool, factory: ScriptedFactory, notebook: Notebook
) -> None:
    pool = await started(make_pool(idle_seconds=300.0, sweep_seconds=60.0))
    slot = await idle(pool, "s")
    await asyncio.sleep(361)
    assert [entry[0] for entry in factory.log if entry[1] == slot] == ["freeze", "thaw", "hibernate", "stop"]
    assert notebook.kept == [("s", slot, Reason.IDLE)]
    assert slot not in {entry.slot for entry in pool.stats().slots}


async def test_a_state_that_cannot_be_kept_does_not_keep_the_process(
    make_pool: MakePool, notebook: Notebook, factory: ScriptedFactory
) -> None:
    pool = await started(make_pool(hibernate_seconds=20.0))
    for error, seconds in ((OSError("disk full"), 0.0), (None, 1000.0)):
        notebook.error, notebook.seconds = error, seconds
        slot = await idle(pool, "s")
        await pool.end_session("s", hibernate=True)
        await asyncio.sleep(25)
        assert ("stop", slot, "asked") in factory.log
    assert pool.stats().hibernate_failures == 2


async def test_reuse_hibernates_then_rewinds_the_principals_process(
    make_pool: MakePool, factory: ScriptedFactory, notebook: Notebook
) -> None:
    pool = await started(make_pool())
    slot = await idle(pool, "s")
    claim = await pool.claim(request("t", reuse_idle=True))
    assert (claim.slot, claim.kind) == (slot, Kind.REUSED)
    assert notebook.kept == [("s", slot, Reason.REUSE)]
    assert [entry[0] for entry in factory.log] == ["hibernate", "rewind"]


@pytest.mark.parametrize("how", ["unclean", "raises", "hangs"])
async def test_a_process_whose_rewind_fails_is_stopped(make_pool: MakePool, factory: ScriptedFactory, how: str) -> None:
    pool = await started(make_pool())
    claim = await pool.claim(request("s"))
    claim.process.clean = how != "unclean"
    factory.rewind_error = RuntimeError("no answer") if how == "raises" else None
    factory.rewind_seconds = 1000.0 if how == "hangs" else 0.1
    await claim.release(Keep.DETACH)
    await asyncio.sleep(10)
    assert ("stop", claim.slot, "not_clean") in factory.log
    assert pool.stats().rewinds_failed == 1


async def test_what_is_too_large_is_recycled(make_pool: MakePool, factory: ScriptedFactory) -> None:
    pool = await started(make_pool(max_resident_bytes=500))
    claim = await pool.claim(request("s"))
    claim.process.resident = 501
    await claim.release(Keep.SESSION)
    await asyncio.sleep(2)
    assert ("stop", claim.slot, "resident") in factory.log


async def test_the_sweep_measures_memory_and_keeps_the_sum_in_bounds(
    make_pool: MakePool, factory: ScriptedFactory
) -> None:
    pool = await started(make_pool(spares={}, memory_limit_bytes=1000, sweep_seconds=60.0))
    slot = await idle(pool, "s")
    for process in factory.running:
        process.resident = 2000
    await asyncio.sleep(61)
    assert ("stop", slot, "memory") in factory.log


# Crashes ---------------------------------------------------------------------------------------------------------------


async def test_the_owner_of_an_idle_session_learns_that_its_process_died(
    make_pool: MakePool, notebook: Notebook, factory: ScriptedFactory
) -> None:
    pool = await started(make_pool())
    slot = await idle(pool, "s")
    next(p for p in factory.running if p.slot == slot).crash()
    assert notebook.lost == [("s", slot)]
    assert (await pool.claim(request("s"))).slot != slot
    await asyncio.sleep(2)
    assert ("stop", slot, "crashed") in factory.log, "its place must be cleaned up"


async def test_a_process_found_dead_at_hand_over_is_replaced(
    make_pool: MakePool, factory: ScriptedFactory, notebook: Notebook
) -> None:
    pool = await started(make_pool(freeze_after_seconds=1.0))
    slot = await idle(pool, "s")
    await asyncio.sleep(2)
    next(p for p in factory.running if p.slot == slot).crash(silently=True)
    claim = await pool.claim(request("s"))
    assert claim.process.alive
    assert claim.slot != slot
    assert notebook.lost == [("s", slot)]


async def test_a_process_that_died_under_its_holder_is_not_given_to_anybody(
    make_pool: MakePool, factory: ScriptedFactory
) -> None:
    pool = await started(make_pool())
    claim = await pool.claim(request("s"))
    claim.process.crash()
    await claim.release(Keep.SESSION)
    assert (await pool.claim(request("s"))).slot != claim.slot
    assert ("stop", claim.slot, "crashed") in factory.log


async def test_a_stop_that_fails_is_tried_again_and_then_counted(make_pool: MakePool, factory: ScriptedFactory) -> None:
    pool = await started(make_pool(spares={}))
    factory.stop_errors = [OSError("busy")]
    claim = await pool.claim(request("s"))
    await claim.release(Keep.DISCARD)
    await asyncio.sleep(1)
    assert not factory.running
    assert pool.stats().stop_failures == 0
    claim = await pool.claim(request("s"))
    factory.stop_errors = [OSError("busy"), OSError("busy")]
    await claim.release(Keep.DISCARD)
    await asyncio.sleep(1)
    assert (pool.stats().stop_failures, pool.stats().processes) == (1, 0)
    factory.running.clear()


# The end ---------------------------------------------------------------------------------------------------------------


async def test_a_draining_pool_takes_nothing_new_and_finishes_what_it_has(make_pool: MakePool) -> None:
    pool = await started(make_pool(max_processes=1))
    busy = await pool.claim(request("s"))
    waiting = asyncio.create_task(pool.claim(request("t")))
    await asyncio.sleep(0)
    await pool.drain()
    with pytest.raises(Draining):
        await pool.claim(request("s"))
    await busy.release(Keep.SESSION)
    await (await waiting).release(Keep.SESSION)
    assert pool.stats().draining


async def test_closing_stops_all_in_parallel_and_keeps_idle_sessions(
    make_pool: MakePool, factory: ScriptedFactory, notebook: Notebook
) -> None:
    pool = await started(make_pool(max_processes=8))
    for n in range(6):
        await idle(pool, f"s{n}")
    at = now()
    await pool.close(60.0)
    assert sorted(session for session, _, _ in notebook.kept) == [f"s{n}" for n in range(6)]
    assert now() == pytest.approx(at + notebook.seconds + factory.stop_seconds)
    assert not factory.running
    with pytest.raises(Draining):
        await pool.claim(request("s"))


async def test_closing_refuses_waiting_claims_and_gives_busy_ones_time(make_pool: MakePool) -> None:
    pool = await started(make_pool(max_processes=1))
    busy = await pool.claim(request("s"))
    waiting = asyncio.create_task(pool.claim(request("t")))
    await asyncio.sleep(0)
    closing = asyncio.create_task(pool.close(60.0))
    with pytest.raises(Draining):
        await waiting
    await asyncio.sleep(10)
    assert not closing.done()
    await busy.release(Keep.SESSION)
    await closing
    assert now() < 30


async def test_a_holder_that_does_not_let_go_loses_its_process_at_the_deadline(
    make_pool: MakePool, factory: ScriptedFactory
) -> None:
    pool = await started(make_pool())
    busy = await pool.claim(request("s"))
    at = now()
    await pool.close(5.0)
    assert now() == pytest.approx(at + 5.0 + factory.stop_seconds)
    assert not busy.process.alive
    await busy.release(Keep.SESSION)
    assert pool.stats().outstanding == 0


@pytest.mark.parametrize("after", [0.0, 0.1, 0.4, 3.0])
async def test_closing_under_cancellation_leaves_nothing(
    make_pool: MakePool, factory: ScriptedFactory, notebook: Notebook, after: float
) -> None:
    pool = await started(make_pool(max_processes=4, parallel_spawns=3))
    await idle(pool, "s")
    await pool.claim(request("t"))
    starting = asyncio.create_task(pool.claim(request("u", profile=AGENT)))
    await asyncio.sleep(0)
    closing = asyncio.create_task(pool.close(1000.0))
    await asyncio.sleep(after)
    closing.cancel()
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert not factory.running
    assert pool.stats().processes == 0
    with pytest.raises(Draining):
        await starting


async def test_a_start_that_ignores_its_cancellation_is_stopped_when_it_ends(
    make_pool: MakePool, factory: ScriptedFactory
) -> None:
    pool = make_pool(spares={CHAT: 1}, stop_seconds=2.0)
    factory.ignores_cancellation_for = 3.0
    await pool.start()
    await asyncio.sleep(0.5)
    await pool.close(0.0)
    await asyncio.sleep(10)
    assert not factory.running


async def test_closing_twice_at_once_is_closing_once(make_pool: MakePool) -> None:
    pool = await started(make_pool())
    await asyncio.gather(pool.close(1.0), pool.close(1.0))
    await pool.close(1.0)
    assert pool.stats().processes == 0


# Statistics ------------------------------------------------------------------------------------------------------------


async def test_statistics_tell_who_holds_what_since_when(make_pool: MakePool) -> None:
    pool = await started(make_pool(max_processes=2))
    claim = await pool.claim(request("s", principal="me"))
    await asyncio.sleep(3)
    await claim.release(Keep.SESSION)
    waiting = asyncio.create_task(pool.claim(request("t", "b", profile=AGENT)))
    await asyncio.sleep(0)
    stats = pool.stats()
    entry = next(slot for slot in stats.slots if slot.session == "s")
    assert (entry.org, entry.principal, entry.pid, entry.turns) == ("a", "me", claim.process.pid, 1)
    assert (entry.profile, entry.alive, entry.frozen) == ("chat", True, False)
    assert entry.uptime_seconds == pytest.approx(13.0)
    assert (entry.last_used - entry.created_at).total_seconds() == pytest.approx(13.0)
    assert entry.idle_seconds == 0.0
    assert (stats.waiting, stats.waiting_per_org, stats.held_per_org) == (1, {"b": 1}, {"a": 1})
    assert stats.claims == {"warm": 0, "reused": 0, "spare": 1, "cold": 0}
    assert stats.spares_wanted == {"chat": 1}
    assert stats.evictions["capacity"] == 1
    assert stats.spawn_seconds_sum == pytest.approx(stats.spawn_count * 1.0)
    assert set(stats.evictions) == {reason.value for reason in Reason}
    await (await waiting).release(Keep.DISCARD)
    assert pool.stats().claim_seconds_sum > 0


async def test_slot_names_are_short_enough_for_socket_paths_and_differ_between_pools(make_pool: MakePool) -> None:
    claim = await (await started(make_pool())).claim(request("s"))
    assert len(claim.slot) <= 24
    assert claim.slot.startswith("slot_")
