"""Thousands of interleavings of everything that can happen to a pool; the promises are in `audit` and `simulator`."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from claude_wrapper.pool import messages as m
from claude_wrapper.pool.requests import Keep
from claude_wrapper.pool.settings import PoolSettings
from claude_wrapper.pool.slot import SlotState
from pool.profiles import AGENT, CHAT
from pool.simulator import World

ORGS = ("a", "b", "c")
picks = st.integers(0, 10**6)
memory_sizes = st.sampled_from([None, 50, 100, 200])
pool_settings = st.builds(
    PoolSettings,
    spares=st.sampled_from([{}, {CHAT: 1}, {CHAT: 2}, {CHAT: 1, AGENT: 1}]),
    max_processes=st.integers(2, 6),
    max_processes_per_org=st.sampled_from([None, 1, 2, 3]),
    max_processes_per_principal=st.sampled_from([None, 1, 2]),
    parallel_spawns=st.integers(1, 3),
    refill_delay_seconds=st.sampled_from([0.0, 0.2]),
    idle_seconds=st.just(20.0),
    sweep_seconds=st.just(10.0),
    freeze_after_seconds=st.sampled_from([None, 2.0]),
    freeze_spares=st.booleans(),
    queue_seconds=st.sampled_from([0.0, 5.0, 10**6]),
    queue_length=st.sampled_from([0, 2, 50]),
    spawn_attempts=st.integers(1, 3),
    max_age_seconds=st.sampled_from([None, 60.0]),
    max_turns=st.sampled_from([None, 1, 3]),
    max_resident_bytes=st.sampled_from([None, 150]),
    memory_limit_bytes=st.sampled_from([None, 400]),
)


class Interleavings(RuleBasedStateMachine):
    @initialize(chosen=pool_settings)
    def begin(self, chosen: PoolSettings) -> None:
        self.world = World(chosen)

    def pick(self, things: Any, index: int) -> Any:
        names = list(things)
        return names[index % len(names)]

    @rule(
        org=st.sampled_from(ORGS),
        session=st.integers(0, 3),
        principal=st.sampled_from("xy"),
        profile=st.sampled_from([CHAT, CHAT, AGENT]),
        reuse_idle=st.booleans(),
        resume=st.sampled_from([None, None, None, "transcript"]),
        weight=st.integers(1, 3),
    )
    def ask(self, org: str, session: int, **more: Any) -> None:
        self.world.ask(f"{org}{session}", org, **more)

    @rule(org=st.sampled_from(ORGS), index=picks)
    def ask_for_any_session(self, org: str, index: int) -> None:
        if self.world.state.lines:
            session = self.pick(self.world.state.lines, index)
            claim = self.world.ask(session, org)
            if session[0] != org:
                refused = self.world.refused[claim].refusal
                assert refused in {m.Refusal.FOREIGN, m.Refusal.DRAINING}

    @precondition(lambda self: self.world.granted)
    @rule(index=picks)
    def accept(self, index: int) -> None:
        self.world.accept(self.pick(self.world.granted, index))

    @precondition(lambda self: any(not c.accepted for c in self.world.state.claims.values()))
    @rule(index=picks)
    def withdraw(self, index: int) -> None:
        claims = self.world.state.claims
        self.world.withdraw(self.pick([key for key, claim in claims.items() if not claim.accepted], index))

    @precondition(lambda self: self.world.held)
    @rule(index=picks, keep=st.sampled_from([Keep.SESSION, Keep.SESSION, Keep.DETACH, Keep.DISCARD]), size=memory_sizes)
    def release(self, index: int, keep: Keep, size: int | None) -> None:
        self.world.release(self.pick(self.world.held, index), keep, size)

    @precondition(lambda self: self.world.spawning)
    @rule(index=picks, size=memory_sizes)
    def spawn_ends_well(self, index: int, size: int | None) -> None:
        self.world.ready(self.pick(self.world.spawning, index), size)

    @precondition(lambda self: self.world.spawning)
    @rule(index=picks)
    def spawn_breaks(self, index: int) -> None:
        self.world.broke(self.pick(self.world.spawning, index))

    @precondition(lambda self: self.world.hibernating)
    @rule(index=picks, resume=st.sampled_from([None, "transcript"]))
    def hibernation_ends(self, index: int, resume: str | None) -> None:
        slot = self.pick(self.world.hibernating, index)
        session = self.world.hibernating[slot].session
        self.world.hibernated(slot, resume)
        if resume is not None:
            for key, request in self.world.requests.items():
                if request.session == session and key in self.world.state.claims:
                    self.world.requests[key] = self.world.state.claims[key].request

    @precondition(lambda self: self.world.rewinding)
    @rule(index=picks, clean=st.booleans())
    def rewind_ends(self, index: int, clean: bool) -> None:
        self.world.rewound(self.pick(self.world.rewinding, index), clean=clean)

    @precondition(lambda self: self.world.stopping)
    @rule(index=picks)
    def stop_ends(self, index: int) -> None:
        self.world.stopped(self.pick(self.world.stopping, index))

    @precondition(lambda self: self.world.state.slots)
    @rule(index=picks)
    def process_exits(self, index: int) -> None:
        slot = self.pick(self.world.state.slots, index)
        if slot not in self.world.spawning:
            self.world.exited(slot)

    @rule(seconds=st.sampled_from([0.05, 0.3, 3.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(org=st.sampled_from(ORGS), session=st.integers(0, 3), hibernate=st.booleans())
    def session_ends(self, org: str, session: int, hibernate: bool) -> None:
        self.world.send(m.SessionEnded(f"{org}{session}", hibernate))

    @precondition(lambda self: self.world.state.slots)
    @rule(index=picks, size=st.sampled_from([50, 150, 400]))
    def memory_is_measured(self, index: int, size: int) -> None:
        self.world.send(m.Measured({self.pick(self.world.state.slots, index): size, "slot_gone": 1}))

    @rule(dice=st.integers(0, 60))
    def drain_or_close(self, dice: int) -> None:
        if dice == 1:
            self.world.send(m.DrainAsked())
        elif dice == 2:
            self.world.send(m.CloseAsked())
        elif dice == 3:
            self.world.send(m.CloseAsked(force=True))
            for slot in self.world.state.slots.values():
                assert slot.state is SlotState.STOPPING

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


Interleavings.TestCase.settings = settings(
    max_examples=500, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
test_every_promise_holds_in_every_interleaving = Interleavings.TestCase
