"""The pool's decisions: `plan(state, event, now)` changes the state and returns what is to be done.

No clock, no I/O, no randomness. It is called for every event, one after the other; whatever a decision gives to
somebody is given when it returns, so that no other decision can give it again. The shell carries the actions out and
reports back with further events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from claude_wrapper.errors import IllegalTransition
from claude_wrapper.pool.matching import match, match_ready, own_process
from claude_wrapper.pool.messages import (
    Accepted,
    Action,
    Asked,
    CloseAsked,
    DrainAsked,
    Event,
    Exited,
    Hibernated,
    Lost,
    Measured,
    Refuse,
    Released,
    Revoke,
    Rewound,
    SessionEnded,
    SpawnBroke,
    SpawnReady,
    Started,
    StopEnded,
    Ticked,
    Withdrawn,
)
from claude_wrapper.pool.requests import Keep, Kind, Refusal
from claude_wrapper.pool.slot import Reason, Slot, SlotEvent, SlotState
from claude_wrapper.pool.state import (
    Outstanding,
    PoolState,
    enqueue,
    enter_line,
    evict,
    grant,
    hibernate,
    leave_line,
    move,
    refuse,
    rewind,
    set_memory,
    stop,
    unbind_org,
    unbind_principal,
    unbind_session,
    wait_again,
)
from claude_wrapper.pool.upkeep import expire_claims, follow, freeze_idle, relieve_memory, sweep, worn_out

_Decider = Callable[[PoolState, Any, float, list[Action]], None]


def plan(state: PoolState, event: Event, now: float) -> list[Action]:
    """Decide what `event` means at `now` (monotonic seconds). Raises `IllegalTransition` on an event out of place."""
    state.step += 1
    out: list[Action] = []
    _DECIDERS[type(event)](state, event, now, out)
    return out


# Claims ----------------------------------------------------------------------------------------------------------------


def _asked(state: PoolState, event: Asked, now: float, out: list[Action]) -> None:
    request = event.request
    if request.claim in state.claims:
        raise IllegalTransition(f"claim {request.claim} is outstanding already")
    if state.draining:
        _turn_away(state, request.claim, Refusal.DRAINING, out)
        return
    if _is_foreign(state, request.session, request.org):
        _turn_away(state, request.claim, Refusal.FOREIGN, out)
        return
    state.weights[request.org] = max(1, request.weight)
    claim = Outstanding(request, now, now + state.settings.queue_seconds)
    if enter_line(state, claim):
        own = own_process(state, claim)
        if own is not None and not state.queue.starving():
            grant(state, claim, own, now, out, kind=Kind.WARM)
            return
        enqueue(state, claim)
    if len(state.waiting) > state.settings.queue_length:
        # Only what is ready now can save it: nothing is started or evicted for a claim that is about to be refused.
        match_ready(state, now, out)
    if len(state.waiting) > state.settings.queue_length:
        _shed(state, now, out)
    else:
        match(state, now, out)


def _turn_away(state: PoolState, claim: str, refusal: Refusal, out: list[Action]) -> None:
    state.tally.refusals[refusal] += 1
    out.append(Refuse(claim, refusal))


def _is_foreign(state: PoolState, session: str, org: str) -> bool:
    slot = state.sessions.get(session)
    if slot is not None and slot.org != org:
        return True
    line = state.lines.get(session)
    return line is not None and line[0].request.org != org


def _shed(state: PoolState, now: float, out: list[Action]) -> None:
    """The queue is too long: the newest claim of the organisation that waits for most (by weight) is refused."""
    per_org = state.waiting_per_org
    org = max(per_org, key=lambda name: per_org[name] / state.weights.get(name, 1))
    newest = next(claim for claim in reversed(state.waiting.values()) if claim.request.org == org)
    _advance_line(state, refuse(state, newest, Refusal.OVERLOADED, out), now, out)


def _accepted(state: PoolState, event: Accepted, now: float, out: list[Action]) -> None:
    claim, slot = _granted(state, event.claim)
    claim.accepted = True
    slot.virgin = False
    if claim.kind is not None:
        state.tally.claims[claim.kind] += 1
        state.tally.claim_seconds += now - claim.asked_at


def _granted(state: PoolState, key: str) -> tuple[Outstanding, Slot]:
    claim = state.claims.get(key)
    slot = state.slots.get(claim.slot) if claim is not None and claim.slot is not None else None
    if claim is None or slot is None:
        raise IllegalTransition(f"claim {key} holds no slot")
    return claim, slot


def _withdrawn(state: PoolState, event: Withdrawn, now: float, out: list[Action]) -> None:
    """A claimer is gone. A slot that it was granted meanwhile goes back in this very step."""
    claim = state.claims.get(event.claim)
    if claim is None:
        return
    if claim.accepted:
        raise IllegalTransition(f"claim {event.claim} was accepted: it is released, not withdrawn")
    state.tally.withdrawn += 1
    slot = state.slots.get(claim.slot) if claim.slot is not None else None
    if slot is not None and slot.state is SlotState.BUSY:
        _hand_back(state, slot, claim.kind, now, out)
    _advance_line(state, leave_line(state, claim), now, out)


def _hand_back(state: PoolState, slot: Slot, kind: Kind | None, now: float, out: list[Action]) -> None:
    """Nobody has touched the process since it was granted: it becomes again what it was."""
    slot.claim = None
    if kind is Kind.WARM:
        _settle_down(state, slot, slot.on_release or Keep.SESSION, now, out)
    elif state.closing or slot.dedicated:
        stop(state, slot, Reason.CLOSED if state.closing else Reason.UNCLAIMED, now, out)
    elif slot.virgin:
        unbind_session(state, slot)
        unbind_org(state, slot)
        move(state, slot, SlotEvent.HAND_BACK_VIRGIN, now, out)
    else:
        unbind_session(state, slot)
        unbind_principal(state, slot)
        move(state, slot, SlotEvent.HAND_BACK_CLEAN, now, out)


def _released(state: PoolState, event: Released, now: float, out: list[Action]) -> None:
    claim = state.claims.get(event.claim)
    if claim is None or not claim.accepted:
        raise IllegalTransition(f"claim {event.claim} holds no slot")
    slot = state.slots.get(claim.slot) if claim.slot is not None else None
    # A forced close may have stopped the process under its holder; then only the claim is left to forget.
    if slot is not None and slot.state is SlotState.BUSY and slot.claim == event.claim:
        slot.claim = None
        slot.turns += 1
        if event.memory is not None:
            set_memory(state, slot, event.memory)
        _settle_down(state, slot, slot.on_release or event.keep, now, out)
    _advance_line(state, leave_line(state, claim), now, out)


def _settle_down(state: PoolState, slot: Slot, keep: Keep, now: float, out: list[Action]) -> None:
    """What becomes of a process whose claim has ended."""
    if slot.exited or keep is Keep.DISCARD:
        stop(state, slot, Reason.CRASHED if slot.exited else Reason.DISCARDED, now, out)
        return
    reason = Reason.CLOSED if state.closing else worn_out(state, slot, now)
    if reason is None and slot.hibernate_on_release:
        reason = Reason.ASKED
    slot.on_release, slot.hibernate_on_release = None, False
    if keep is Keep.DETACH:
        if reason is not None:
            stop(state, slot, reason, now, out)
        else:
            rewind(state, slot, now, out)
        return
    move(state, slot, SlotEvent.KEEP, now, out)
    if reason is not None:
        hibernate(state, slot, reason, now, out)


def _advance_line(state: PoolState, first: Outstanding | None, now: float, out: list[Action]) -> None:
    """Serve the session's next claim from its own process, unless somebody else was passed over too often."""
    if first is not None and first.slot is None:
        own = own_process(state, first)
        if own is not None and not state.queue.starving():
            grant(state, first, own, now, out, kind=Kind.WARM)
            state.queue.note_grant(first.request.org)
        else:
            enqueue(state, first)
    _prune_weights(state)
    match(state, now, out)


def _prune_weights(state: PoolState) -> None:
    """Weights of organisations that neither hold nor wait are forgotten; only looked at when they are many."""
    if len(state.weights) > 64 + 2 * (len(state.held) + len(state.waiting_per_org)):
        active = set(state.held) | set(state.waiting_per_org)
        state.weights = {org: weight for org, weight in state.weights.items() if org in active}


def _session_ended(state: PoolState, event: SessionEnded, now: float, out: list[Action]) -> None:
    slot = state.sessions.get(event.session)
    if slot is None:
        return
    if slot.state is SlotState.BUSY:
        if event.hibernate:
            slot.hibernate_on_release = True
        else:
            slot.on_release = Keep.DETACH
    elif slot.state is SlotState.IDLE:
        if event.hibernate:
            hibernate(state, slot, Reason.ASKED, now, out)
        else:
            move_on = worn_out(state, slot, now)
            if move_on is not None:
                stop(state, slot, move_on, now, out)
            else:
                rewind(state, slot, now, out)
    match(state, now, out)


# Processes -------------------------------------------------------------------------------------------------------------


def _spawn_ready(state: PoolState, event: SpawnReady, now: float, out: list[Action]) -> None:
    slot = state.slots.get(event.slot)
    if slot is None or slot.state is not SlotState.SPAWNING:
        return  # it was told to stop meanwhile; the shell stops what came of it
    state.tally.spawns += 1
    state.tally.spawn_seconds += now - slot.created_at
    set_memory(state, slot, event.memory)
    slot.ready_at = now
    slot.ready_step = state.step
    move(state, slot, SlotEvent.READY, now, out)
    if slot.dedicated:
        claim = state.claims.get(slot.spawned_for or "")
        if claim is None or claim.slot is not None:
            stop(state, slot, Reason.UNCLAIMED, now, out)
        else:
            grant(state, claim, slot, now, out, kind=Kind.COLD)
            state.queue.note_grant(claim.request.org)
    match(state, now, out)


def _spawn_broke(state: PoolState, event: SpawnBroke, now: float, out: list[Action]) -> None:
    slot = state.slots.get(event.slot)
    if slot is None or slot.state is not SlotState.SPAWNING:
        return
    state.tally.spawn_failures += 1
    state.backoff(slot.profile).fail(now)
    move(state, slot, SlotEvent.FAIL, now, out)
    claim = _blamed(state, slot)
    if claim is not None:
        claim.failures += 1
        claim.cause = event.cause
        if claim.failures >= state.settings.spawn_attempts:
            follow(state, refuse(state, claim, Refusal.SPAWN_FAILED, out, cause=event.cause))
    match(state, now, out)


def _blamed(state: PoolState, slot: Slot) -> Outstanding | None:
    """The claim whose attempt this was: the one it was started for, or else the first that waits for such a process."""
    claim = state.claims.get(slot.spawned_for or "")
    if claim is not None and claim.slot is None:
        return claim
    if slot.dedicated:
        return None
    same = (c for c in state.waiting.values() if c.request.profile == slot.profile and c.request.claim in state.queue)
    return next((c for c in same if c.request.resume is None), None)


def _hibernated(state: PoolState, event: Hibernated, now: float, out: list[Action]) -> None:
    slot = state.slots.get(event.slot)
    if slot is None or slot.state is not SlotState.HIBERNATING:
        return
    if event.resume is not None and slot.session is not None:
        for claim in state.lines.get(slot.session, ()):
            claim.request = replace(claim.request, resume=event.resume)
    if slot.exited:
        stop(state, slot, Reason.CRASHED, now, out)
    elif slot.then_rewind:
        slot.then_rewind = False
        rewind(state, slot, now, out)
    else:
        stop(state, slot, slot.reason or Reason.CAPACITY, now, out)
    match(state, now, out)


def _rewound(state: PoolState, event: Rewound, now: float, out: list[Action]) -> None:
    slot = state.slots.get(event.slot)
    if slot is None or slot.state is not SlotState.REWINDING:
        return
    if slot.exited or not event.clean:
        state.tally.rewinds_failed += 1
        stop(state, slot, Reason.CRASHED if slot.exited else Reason.NOT_CLEAN, now, out)
    else:
        claim = state.claims.get(slot.awaited_by or "")
        if claim is not None:
            claim.awaits = None
        slot.awaited_by = None
        move(state, slot, SlotEvent.CLEAN, now, out)
    match(state, now, out)


def _stop_ended(state: PoolState, event: StopEnded, now: float, out: list[Action]) -> None:
    slot = state.slots.get(event.slot)
    if slot is None:
        return
    move(state, slot, SlotEvent.STOPPED, now, out)
    match(state, now, out)


def _exited(state: PoolState, event: Exited, now: float, out: list[Action]) -> None:
    """A process ended by itself. What was bound to it learns of it; it is still cleaned up."""
    slot = state.slots.get(event.slot)
    if slot is None or slot.exited or slot.state in {SlotState.STOPPING, SlotState.SPAWNING}:
        return
    slot.exited = True
    state.tally.crashes += 1
    if slot.state is SlotState.SPARE:
        state.backoff(slot.profile).fail(now)
    claim = state.claims.get(slot.claim or "")
    if slot.state in {SlotState.HIBERNATING, SlotState.REWINDING} or (claim is not None and claim.accepted):
        return  # whoever works with it finds out and reports back
    if slot.session is not None and (claim is None or claim.kind is Kind.WARM):
        out.append(Lost(slot.session, slot.id))
    slot.claim = None
    stop(state, slot, Reason.CRASHED, now, out)
    if claim is not None:
        claim.slot = claim.kind = None
        out.append(Revoke(claim.request.claim))
        wait_again(state, claim)
    match(state, now, out)


# Time and the end ------------------------------------------------------------------------------------------------------


def _started(state: PoolState, _: Started, now: float, out: list[Action]) -> None:
    state.started = True
    state.sweep_at = now + state.settings.sweep_seconds
    match(state, now, out)


def _ticked(state: PoolState, _: Ticked, now: float, out: list[Action]) -> None:
    expire_claims(state, now, out)
    freeze_idle(state, now, out)
    sweep(state, now, out)
    match(state, now, out)


def _measured(state: PoolState, event: Measured, now: float, out: list[Action]) -> None:
    for name, memory in event.memory.items():
        slot = state.slots.get(name)
        if slot is not None:
            set_memory(state, slot, memory)
    relieve_memory(state, now, out)
    match(state, now, out)


def _drain_asked(state: PoolState, _: DrainAsked, now: float, out: list[Action]) -> None:
    """New claims are refused; those that wait are still served, but no spare is started any more."""
    state.draining = True
    match(state, now, out)


def _close_asked(state: PoolState, event: CloseAsked, now: float, out: list[Action]) -> None:
    """Whoever waits is refused; idle sessions are kept; the rest is stopped, busy processes only when forced."""
    state.draining = state.closing = True
    for claim in list(state.waiting.values()):
        refuse(state, claim, Refusal.DRAINING, out)
    for slot in list(state.slots.values()):
        if slot.state is SlotState.STOPPING:
            continue
        if event.force:
            _take_away(state, slot, out)
            stop(state, slot, Reason.CLOSED, now, out)
        elif slot.state not in {SlotState.BUSY, SlotState.HIBERNATING}:
            evict(state, slot, Reason.CLOSED, now, out)
    for slot in state.by_state[SlotState.HIBERNATING].values():
        slot.then_rewind = False
        slot.reason = slot.reason or Reason.CLOSED
    state.sweep_at = state.retry_at = None


def _take_away(state: PoolState, slot: Slot, out: list[Action]) -> None:
    """A forced close: a claimer that has not accepted is refused; a holder finds out by its process."""
    claim = state.claims.get(slot.claim or "")
    slot.claim = None
    if claim is not None and not claim.accepted:
        out.append(Revoke(claim.request.claim))
        refuse(state, claim, Refusal.DRAINING, out)


_DECIDERS: dict[type[Event], _Decider] = {
    Started: _started,
    Asked: _asked,
    Accepted: _accepted,
    Withdrawn: _withdrawn,
    Released: _released,
    SessionEnded: _session_ended,
    SpawnReady: _spawn_ready,
    SpawnBroke: _spawn_broke,
    Hibernated: _hibernated,
    Rewound: _rewound,
    StopEnded: _stop_ended,
    Exited: _exited,
    Measured: _measured,
    Ticked: _ticked,
    DrainAsked: _drain_asked,
    CloseAsked: _close_asked,
}
