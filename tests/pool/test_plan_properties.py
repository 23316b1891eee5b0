"""Thousands of interleavings of everything that can happen to a pool; the promises are in `audit` and `simulator`.

Two drivers over the same events: a Hypothesis state machine, which shrinks what it finds, and a long weighted random
walk, which gets to states that need many steps in a row.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from claude_wrapper.pool import messages as m
from claude_wrapper.pool.requests import Keep, Refusal
from claude_wrapper.pool.settings import PoolSettings
from claude_wrapper.pool.slot import SlotState
from pool.profiles import AGENT, CHAT
from pool.simulator import World

ORGS = ("a", "b", "c")
picks = st.integers(0, 10**6)
KEEPS = [Keep.SESSION, Keep.SESSION, Keep.DETACH, Keep.DETACH, Keep.DISCARD]
keeps = st.sampled_from(KEEPS)
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
    queue_seconds=st.sampled_from([10**6, 10**6, 5.0, 0.0]),
    queue_length=st.sampled_from([50, 50, 3, 0]),
    spawn_attempts=st.integers(1, 3),
    max_age_seconds=st.sampled_from([None, None, 60.0]),
    max_turns=st.sampled_from([None, None, 3]),
    max_resident_bytes=st.sampled_from([None, None, 150]),
    memory_limit_bytes=st.sampled_from([None, None, 400]),
)


class Happenings:
    """Everything that can happen, with a choice of what it happens to."""

    def __init__(self, world: World) -> None:
        self.world = world

    @staticmethod
    def pick(things: Iterable[str], index: int) -> str | None:
        names = list(things)
        return names[index % len(names)] if names else None

    def accept(self, index: int) -> None:
        claim = self.pick(self.world.granted, index)
        if claim is not None:
            self.world.accept(claim)

    def withdraw(self, index: int) -> None:
        claims = self.world.state.claims
        claim = self.pick([key for key, claim in claims.items() if not claim.accepted], index)
        if claim is not None:
            self.world.withdraw(claim)

    def release(self, index: int, keep: Keep, size: int | None) -> None:
        claim = self.pick(self.world.held, index)
        if claim is not None:
            self.world.release(claim, keep, size)

    def io_succeeds(self, index: int, size: int | None) -> None:
        world = self.world
        under_way = [*world.spawning, *world.hibernating, *world.rewinding, *world.stopping]
        slot = self.pick(under_way, index)
        if slot in world.spawning:
            world.ready(slot, size)
        elif slot in world.hibernating:
            self.hibernated(slot, None)
        elif slot in world.rewinding:
            world.rewound(slot)
        elif slot is not None:
            world.stopped(slot)

    def hibernated(self, slot: str, resume: str | None) -> None:
        world = self.world
        session = world.hibernating[slot].session
        if resume is not None:
            for claim in world.state.lines.get(session, ()):
                key = claim.request.claim
                world.requests[key] = dataclasses.replace(world.requests[key], resume=resume)
        world.hibernated(slot, resume)

    def io_fails(self, index: int) -> None:
        world = self.world
        slot = self.pick([*world.spawning, *world.hibernating, *world.rewinding], index)
        if slot in world.spawning:
            world.broke(slot)
        elif slot in world.hibernating:
            self.hibernated(slot, "transcript")
        elif slot is not None:
            world.rewound(slot, clean=False)

    def exits(self, index: int) -> None:
        slot = self.pick([name for name in self.world.state.slots if name not in self.world.spawning], index)
        if slot is not None:
            self.world.exited(slot)

    def measured(self, index: int, size: int) -> None:
        slot = self.pick(self.world.state.slots, index)
        if slot is not None:
            self.world.send(m.Measured({slot: size, "slot_gone": 1}))

    def foreign_claim(self, index: int, org: str) -> None:
        state = self.world.state
        session = self.pick([s for s in [*state.lines, *state.sessions] if s[0] != org], index)
        if session is not None:
            claim = self.world.ask(session, org)
            assert self.world.refused[claim].refusal in {Refusal.FOREIGN, Refusal.DRAINING}


class Interleavings(RuleBasedStateMachine):
    @initialize(chosen=pool_settings)
    def begin(self, chosen: PoolSettings) -> None:
        self.world = World(chosen)
        self.happen = Happenings(self.world)

    @rule(
        org=st.sampled_from(ORGS),
        session=st.integers(0, 2),
        principal=st.sampled_from("xy"),
        profile=st.sampled_from([CHAT, CHAT, AGENT]),
        reuse_idle=st.booleans(),
        resume=st.sampled_from([None, None, None, "transcript"]),
        resume_on_spare=st.booleans(),
        weight=st.integers(1, 3),
    )
    def ask(self, org: str, session: int, **more: Any) -> None:
        self.world.ask(f"{org}{session}", org, **more)

    @rule(index=picks, org=st.sampled_from(ORGS))
    def ask_for_a_foreign_session(self, index: int, org: str) -> None:
        self.happen.foreign_claim(index, org)

    @rule(index=picks)
    def accept(self, index: int) -> None:
        self.happen.accept(index)

    @rule(index=picks, keep=keeps, size=memory_sizes)
    def accept_and_release(self, index: int, keep: Keep, size: int | None) -> None:
        self.happen.accept(index)
        self.happen.release(index, keep, size)

    @rule(index=picks)
    def withdraw(self, index: int) -> None:
        self.happen.withdraw(index)

    @rule(index=picks, count=st.integers(1, 4), size=memory_sizes)
    def io_succeeds(self, index: int, count: int, size: int | None) -> None:
        for _ in range(count):
            self.happen.io_succeeds(index, size)

    @rule(index=picks)
    def io_fails(self, index: int) -> None:
        self.happen.io_fails(index)

    @rule(index=picks)
    def process_exits(self, index: int) -> None:
        self.happen.exits(index)

    @rule(seconds=st.sampled_from([0.05, 0.3, 3.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(org=st.sampled_from(ORGS), session=st.integers(0, 2), hibernate=st.booleans())
    def session_ends(self, org: str, session: int, hibernate: bool) -> None:
        self.world.send(m.SessionEnded(f"{org}{session}", hibernate))

    @rule(index=picks, size=st.sampled_from([50, 150, 400]))
    def memory_is_measured(self, index: int, size: int) -> None:
        self.happen.measured(index, size)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


Interleavings.TestCase.settings = settings(
    max_examples=300, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
test_every_promise_holds_in_every_interleaving = Interleavings.TestCase


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(chosen=pool_settings, seed=st.integers(0, 2**32), end=st.sampled_from(["close", "drain", "force"]))
def test_every_promise_holds_on_a_long_walk(chosen: PoolSettings, seed: int, end: str) -> None:
    world = World(chosen)
    happen = Happenings(world)
    dice = random.Random(seed)

    def ask() -> None:
        org = dice.choice(ORGS)
        world.ask(
            f"{org}{dice.randrange(4)}",
            org,
            principal=dice.choice("xy"),
            profile=dice.choice([CHAT, CHAT, CHAT, AGENT]),
            reuse_idle=dice.random() < 0.3,
            resume="transcript" if dice.random() < 0.1 else None,
            resume_on_spare=dice.random() < 0.5,
            weight=dice.randrange(1, 4),
        )

    def number() -> int:
        return dice.randrange(10**6)

    size = functools.partial(dice.choice, [None, 50, 100, 200])
    happenings: dict[Callable[[], None], int] = {
        ask: 30,
        lambda: happen.accept(number()): 30,
        lambda: happen.release(number(), dice.choice(KEEPS), size()): 25,
        lambda: happen.io_succeeds(number(), size()): 60,
        lambda: happen.withdraw(number()): 6,
        lambda: happen.io_fails(number()): 4,
        lambda: happen.exits(number()): 2,
        lambda: happen.foreign_claim(number(), dice.choice(ORGS)): 1,
        lambda: happen.measured(number(), dice.choice([50, 150, 400])): 1,
        lambda: world.pass_time(dice.choice([0.05, 0.3, 3.0, 12.0])): 10,
        lambda: world.send(m.SessionEnded(f"{dice.choice(ORGS)}{dice.randrange(4)}", dice.random() < 0.5)) and None: 2,
    }
    choices = dice.choices(list(happenings), list(happenings.values()), k=600)
    for happening in choices:
        happening()
    if end == "drain":
        world.send(m.DrainAsked())
    elif end == "force":
        world.send(m.CloseAsked())
        for happening in choices[:30]:
            happening()
        world.send(m.CloseAsked(force=True))
        assert all(slot.state is SlotState.STOPPING for slot in world.state.slots.values())
        for happening in choices[:30]:
            happening()
    world.finish()
