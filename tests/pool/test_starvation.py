"""Closed-loop load: organisations that always ask for more, processes that come and go, and nobody is forgotten."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from claude_wrapper.pool.requests import Keep
from claude_wrapper.pool.settings import PoolSettings
from pool.profiles import AGENT, CHAT
from pool.simulator import World


class Load:
    """`callers` per organisation, each of which asks, holds for a while, gives back, and asks again at once."""

    def __init__(self, world: World, callers: dict[str, int], stubborn: str, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.callers = callers
        self.stubborn = stubborn
        """This organisation gives its processes back far less often than the others."""
        self.serial = 0
        self.grants_at: dict[str, int] = {}
        self.longest: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        for org, count in callers.items():
            for caller in range(count):
                self.ask(org, caller)

    def ask(self, org: str, caller: int) -> None:
        """Half of the callers stay with one session, the others begin a new one each time."""
        self.serial += 1
        session = f"{org}-{caller}" if caller % 2 else f"{org}-{caller}-{self.serial}"
        before = len(self.world.grants)
        claim = self.world.ask(session, org, principal=f"p{caller % 3}", profile=AGENT if caller % 5 == 4 else CHAT)
        self.grants_at[claim] = before

    def step(self) -> None:
        world = self.world
        for claim in list(world.granted):
            org = world.requests[claim].org
            waited = len(world.grants) - self.grants_at.pop(claim)
            self.longest[org] = max(self.longest[org], waited)
            self.served[org] += 1
            world.accept(claim)
        for waiting in self.world.state.waiting:
            org = world.requests[waiting].org
            self.longest[org] = max(self.longest[org], len(world.grants) - self.grants_at[waiting])
        if self.random.random() < 0.7 and world.one_io():
            return
        if not world.held:
            assert world.one_io(), "claims wait, nothing is held and nothing is under way"
            return
        claim = self.random.choice(list(world.held))
        if world.requests[claim].org == self.stubborn and self.random.random() < 0.8:
            return
        request = world.requests[claim]
        world.release(claim, self.random.choice([Keep.SESSION, Keep.SESSION, Keep.DETACH, Keep.DISCARD]))
        self.ask(request.org, int(request.session.split("-")[1]))


@settings(max_examples=15, deadline=None)
@given(
    callers=st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([1, 2, 5, 15]), min_size=2),
    limits=st.fixed_dictionaries(
        {
            "max_processes": st.integers(2, 8),
            "parallel_spawns": st.integers(1, 3),
            "max_processes_per_org": st.sampled_from([None, 3]),
            "max_processes_per_principal": st.sampled_from([None, 1]),
        }
    ),
    seed=st.integers(0, 2**32),
)
def test_everybody_is_served_within_a_bounded_number_of_grants_to_others(
    callers: dict[str, int], limits: dict[str, Any], seed: int
) -> None:
    world = World(
        PoolSettings(
            spares={CHAT: 1},
            **limits,
            refill_delay_seconds=0.0,
            queue_seconds=10**6,
            freeze_after_seconds=None,
            max_age_seconds=None,
        )
    )
    load = Load(world, callers, min(callers), seed)
    for _ in range(800):
        load.step()
    assert set(load.served) == set(callers)
    lanes = len(callers)
    # A claim waits for those before it in its own lane, each of which is passed over at most `patience + lanes` times
    # while it contends; what is granted while its room is being made and its process started comes on top.
    under_way = 4 * (limits["max_processes"] + limits["parallel_spawns"])
    for org, count in callers.items():
        if org != min(callers):
            assert load.longest[org] <= count * (8 + 3 * lanes + under_way), (org, load.longest, load.served)


def test_equal_organisations_get_equal_shares_whatever_they_ask_for() -> None:
    world = World(PoolSettings(max_processes=6, parallel_spawns=3, queue_seconds=10**6, max_age_seconds=None))
    load = Load(world, {"hog": 40, "small": 6}, "nobody", seed=1)
    held: Counter[str] = Counter()
    for _ in range(3000):
        load.step()
        held.update(world.requests[claim].org for claim in world.held)
    assert 0.4 < held["small"] / held.total() < 0.6


def test_weights_divide_the_pool_in_their_proportion() -> None:
    world = World(PoolSettings(max_processes=8, parallel_spawns=3, queue_seconds=10**6, max_age_seconds=None))
    for n in range(60):
        world.ask(f"gold-{n}", "gold", weight=3)
        world.ask(f"tin-{n}", "tin", weight=1)
    served: Counter[str] = Counter()
    for _ in range(40):
        world.settle()
        for claim in list(world.granted):
            world.accept(claim)
        claim = next(iter(world.held))
        served[world.requests[claim].org] += 1
        world.release(claim, Keep.DISCARD)
    assert 0.65 < served["gold"] / served.total() < 0.85
