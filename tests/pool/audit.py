"""What must hold after every decision, recomputed from scratch."""

from __future__ import annotations

from collections import Counter

from claude_wrapper.pool.slot import FREEZABLE, SlotState
from claude_wrapper.pool.state import PoolState

WITH_SESSION = {SlotState.BUSY, SlotState.IDLE, SlotState.HIBERNATING}
UNOWNED = {SlotState.SPAWNING, SlotState.SPARE}


def audit(state: PoolState) -> None:
    """Fail on the first broken promise about `state`."""
    _audit_slots(state)
    _audit_claims(state)
    _audit_bounds(state)


def _audit_slots(state: PoolState) -> None:
    slots = state.slots.values()
    for slot_state, members in state.by_state.items():
        assert set(members) == {s.id for s in slots if s.state is slot_state}, f"index of {slot_state} is wrong"
    assert not state.by_state[SlotState.GONE]
    assert {s.id for group in state.spares.values() for s in group.values()} == set(state.by_state[SlotState.SPARE])
    assert state.held == Counter(s.org for s in slots if s.org is not None)
    assert state.held_by == Counter((s.org, s.principal) for s in slots if s.org and s.principal)
    assert state.memory == sum(s.memory or 0 for s in slots)
    assert state.sessions == {s.session: s for s in slots if s.session is not None}
    assert len(state.sessions) == sum(s.session is not None for s in slots), "two processes for one session"
    for slot in slots:
        assert (slot.session is not None) == (slot.state in WITH_SESSION), slot
        assert (slot.claim is not None) == (slot.state is SlotState.BUSY), slot
        if slot.state in UNOWNED and not slot.dedicated:
            assert slot.org is None, slot
            assert slot.virgin, slot
        if slot.state in WITH_SESSION | {SlotState.DETACHED, SlotState.REWINDING}:
            assert slot.org is not None, slot
        assert not slot.frozen or slot.state in FREEZABLE, slot
        assert (slot.id in state.thawed) <= (slot.state in FREEZABLE), slot


def _audit_claims(state: PoolState) -> None:
    waiting = {key for key, claim in state.claims.items() if claim.slot is None}
    assert set(state.waiting) == waiting
    assert state.waiting_per_org == Counter(state.claims[key].request.org for key in waiting)
    assert {c.request.claim for line in state.lines.values() for c in line} == set(state.claims)
    heads = {line[0].request.claim for line in state.lines.values() if line[0].slot is None}
    assert {key for key in state.claims if key in state.queue} == heads, "first of a line neither waits nor holds"
    assert len(state.queue) == len(heads)
    assert list(state.waiting.values()) == sorted(state.waiting.values(), key=lambda c: c.deadline)
    for session, line in state.lines.items():
        for place, claim in enumerate(line):
            assert claim.request.session == session
            assert place == 0 or claim.slot is None, "two holders in one session"
    holders: Counter[str] = Counter()
    for key, claim in state.claims.items():
        slot = state.slots.get(claim.slot or "")
        if slot is not None and slot.state is SlotState.BUSY:
            assert slot.claim == key
            assert slot.org == claim.request.org
            assert slot.session == claim.request.session
            assert slot.profile == claim.request.profile
            holders[slot.id] += 1
    assert all(count == 1 for count in holders.values()), "two owners"
    assert set(holders) == set(state.by_state[SlotState.BUSY]), "busy without a holder"


def _audit_bounds(state: PoolState) -> None:
    settings = state.settings
    assert len(state.slots) <= settings.max_processes
    assert state.count(SlotState.SPAWNING) <= settings.parallel_spawns
    if settings.max_processes_per_org is not None:
        assert max(state.held.values(), default=0) <= settings.max_processes_per_org
    if settings.max_processes_per_principal is not None:
        assert max(state.held_by.values(), default=0) <= settings.max_processes_per_principal
