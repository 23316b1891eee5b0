"""What time alone brings about: claims that waited too long, freezing, the sweep, recycling."""

from __future__ import annotations

import zlib

from claude_wrapper.pool.matching import choose_victim
from claude_wrapper.pool.messages import Action, Freeze
from claude_wrapper.pool.requests import Refusal
from claude_wrapper.pool.slot import Reason, Slot, SlotState
from claude_wrapper.pool.state import Outstanding, PoolState, enqueue, evict, refuse, stop

_PROVEN_SECONDS = 30.0
"""A spare that lived so long shows that starting works; one that dies at once must not be replaced at once for ever."""

_AGE_JITTER = 0.1
"""Share of the maximal age by which processes differ, so that those started together do not all go together."""


def wake_at(state: PoolState) -> float | None:
    """When time alone will next change something; `None` while nothing waits for time."""
    times = [state.sweep_at, state.retry_at]
    if state.waiting:
        times.append(next(iter(state.waiting.values())).deadline)
    if state.thawed and state.settings.freeze_after_seconds is not None:
        times.append(next(iter(state.thawed.values())).last_used + state.settings.freeze_after_seconds)
    return min((at for at in times if at is not None), default=None)


def worn_out(state: PoolState, slot: Slot, now: float) -> Reason | None:
    """Why a process should not serve again, if so."""
    settings = state.settings
    if settings.max_turns is not None and slot.turns >= settings.max_turns:
        return Reason.TURNS
    if settings.max_resident_bytes is not None and (slot.memory or 0) > settings.max_resident_bytes:
        return Reason.RESIDENT
    return Reason.AGE if _too_old(state, slot, now) else None


def _too_old(state: PoolState, slot: Slot, now: float) -> bool:
    limit = state.settings.max_age_seconds
    if limit is None:
        return False
    share = zlib.crc32(slot.id.encode()) / 2**32
    return now - slot.created_at >= limit * (1 - _AGE_JITTER * share)


def expire_claims(state: PoolState, now: float, out: list[Action]) -> None:
    """Refuse the claims whose time is up; each is told what it waited for."""
    while state.waiting:
        claim = next(iter(state.waiting.values()))
        if claim.deadline > now:
            return
        refusal = Refusal.TIMEOUT if claim.cause is None else Refusal.SPAWN_FAILED
        follow(state, refuse(state, claim, refusal, out, cause=claim.cause))


def follow(state: PoolState, first: Outstanding | None) -> None:
    """The claim that became the first of its session now waits for a process, not for another claim."""
    if first is not None and first.slot is None:
        enqueue(state, first)


def freeze_idle(state: PoolState, now: float, out: list[Action]) -> None:
    """Take the CPU from processes that nobody has talked to for a while."""
    after = state.settings.freeze_after_seconds
    if after is None:
        return
    while state.thawed:
        slot = next(iter(state.thawed.values()))
        if now - slot.last_used < after:
            return
        del state.thawed[slot.id]
        slot.frozen = True
        out.append(Freeze(slot.id))


def sweep(state: PoolState, now: float, out: list[Action]) -> None:
    """Let go of what was idle too long, of old and superfluous spares, and of memory above the limit."""
    if state.sweep_at is None or now < state.sweep_at:
        return
    settings = state.settings
    state.sweep_at = now + settings.sweep_seconds
    for slot_state in (SlotState.IDLE, SlotState.DETACHED):
        for slot in list(state.by_state[slot_state].values()):
            if now - slot.last_used >= settings.idle_seconds:
                evict(state, slot, Reason.IDLE, now, out)
    for profile, spares in state.spares.items():
        surplus = len(spares) - settings.spares.get(profile, 0)
        for slot in list(spares.values()):
            ready_at = slot.ready_at if slot.ready_at is not None else now
            if now - ready_at >= _PROVEN_SECONDS:
                state.backoff(profile).succeed()
            if _too_old(state, slot, now):
                stop(state, slot, Reason.AGE, now, out)
            elif surplus > 0 and now - ready_at >= settings.idle_seconds:
                surplus -= 1
                stop(state, slot, Reason.SURPLUS, now, out)
    relieve_memory(state, now, out)


def relieve_memory(state: PoolState, now: float, out: list[Action]) -> None:
    """Hibernate idle processes until what stays is within the limit for the sum."""
    limit = state.settings.memory_limit_bytes
    if limit is None:
        return
    leaving = [*state.by_state[SlotState.STOPPING].values(), *state.by_state[SlotState.HIBERNATING].values()]
    excess = state.memory - sum(slot.memory or 0 for slot in leaving) - limit
    while excess > 0:
        spares = state.by_state[SlotState.SPARE].values()
        idle = [*state.by_state[SlotState.DETACHED].values(), *state.by_state[SlotState.IDLE].values()]
        victim = next((slot for slot in spares if slot.memory), None) or choose_victim(
            state, [slot for slot in idle if slot.memory]
        )
        if victim is None:
            return
        excess -= victim.memory or 0
        evict(state, victim, Reason.MEMORY, now, out)
