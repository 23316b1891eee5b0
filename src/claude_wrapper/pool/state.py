"""The state that decisions are made on: slots, claims, and the indexes that keep a decision cheap.

Everything here is plain data. The functions below are the only ones that move a slot; each keeps the indexes true and
adds to `out` what the shell has to do. `check` recomputes every index from scratch, for tests.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from claude_wrapper.pool.backoff import Backoff
from claude_wrapper.pool.fairqueue import FairQueue
from claude_wrapper.pool.messages import Action, Grant, Hibernate, Refuse, Rewind, Spawn, Stop, Thaw
from claude_wrapper.pool.requests import ClaimRequest, Kind, Refusal
from claude_wrapper.pool.settings import PoolSettings, Profile
from claude_wrapper.pool.slot import FREEZABLE, Reason, Slot, SlotEvent, SlotState

PrincipalKey = tuple[str, str]
"""Organisation and principal: principals of two organisations are never the same one."""


@dataclass(slots=True)
class Outstanding:
    """One claim, from the request until its slot is given back."""

    request: ClaimRequest
    asked_at: float
    deadline: float
    slot: str | None = None
    kind: Kind | None = None
    accepted: bool = False
    awaits: str | None = None
    """The slot that is being rewound for this claim."""
    no_reuse: bool = False
    """A rewind for this claim failed: it takes something else."""
    failures: int = 0
    cause: BaseException | None = None
    """Of the last failed start."""

    @property
    def principal_key(self) -> PrincipalKey:
        return (self.request.org, self.request.principal)


@dataclass(slots=True)
class Tally:
    """What happened so far; see `PoolStats` for the meaning."""

    claims: Counter[Kind] = field(default_factory=Counter)
    refusals: Counter[Refusal] = field(default_factory=Counter)
    evictions: Counter[Reason] = field(default_factory=Counter)
    withdrawn: int = 0
    claim_seconds: float = 0.0
    spawns: int = 0
    spawn_seconds: float = 0.0
    spawn_failures: int = 0
    rewinds_failed: int = 0
    crashes: int = 0


@dataclass(slots=True)
class PoolState:
    """Everything that `plan` knows."""

    settings: PoolSettings
    slot_prefix: str = "slot_"
    next_slot: int = 1
    step: int = 0
    """Number of the decision that is being made."""
    started: bool = False
    draining: bool = False
    closing: bool = False
    slots: dict[str, Slot] = field(default_factory=dict)
    by_state: dict[SlotState, dict[str, Slot]] = field(default_factory=lambda: {state: {} for state in SlotState})
    """Slots by state, each in the order in which they entered it: the first idle one is the least recently used."""
    spares: dict[Profile, dict[str, Slot]] = field(default_factory=dict)
    thawed: dict[str, Slot] = field(default_factory=dict)
    """Slots that may be frozen and are not, the one that waits longest first."""
    sessions: dict[str, Slot] = field(default_factory=dict)
    held: Counter[str] = field(default_factory=Counter)
    """Slots per organisation, those that stop included."""
    held_by: Counter[PrincipalKey] = field(default_factory=Counter)
    memory: int = 0
    claims: dict[str, Outstanding] = field(default_factory=dict)
    waiting: dict[str, Outstanding] = field(default_factory=dict)
    """Claims without a slot, the earliest deadline first."""
    waiting_per_org: Counter[str] = field(default_factory=Counter)
    lines: dict[str, deque[Outstanding]] = field(default_factory=dict)
    """Claims per session in order: the first one holds the process or waits for one, the others wait for the first."""
    queue: FairQueue[Outstanding] = field(default_factory=FairQueue)
    """The first claim of each line that has no process yet."""
    weights: dict[str, int] = field(default_factory=dict)
    backoffs: dict[Profile, Backoff] = field(default_factory=dict)
    refill_at: dict[Profile, float] = field(default_factory=dict)
    retry_at: float | None = None
    """When something that only waits for time (a back-off, a refill) can go on."""
    sweep_at: float | None = None
    tally: Tally = field(default_factory=Tally)

    def count(self, state: SlotState) -> int:
        return len(self.by_state[state])

    def backoff(self, profile: Profile) -> Backoff:
        return self.backoffs.setdefault(profile, Backoff())


# Slots -----------------------------------------------------------------------------------------------------------------


def move(state: PoolState, slot: Slot, event: SlotEvent, now: float, out: list[Action]) -> None:
    """Take one transition and keep the indexes true. A frozen process is thawed before anybody talks to it."""
    before = slot.apply(event)
    after = slot.state
    del state.by_state[before][slot.id]
    if before is SlotState.SPARE:
        del state.spares[slot.profile][slot.id]
    if after not in FREEZABLE:
        state.thawed.pop(slot.id, None)
        if slot.frozen:
            slot.frozen = False
            out.append(Thaw(slot.id))
    if after is SlotState.GONE:
        _forget(state, slot)
        return
    state.by_state[after][slot.id] = slot
    if after is SlotState.SPARE:
        state.spares.setdefault(slot.profile, {})[slot.id] = slot
    if after in FREEZABLE and (after is not SlotState.SPARE or state.settings.freeze_spares):
        slot.last_used = now
        state.thawed[slot.id] = slot


def _forget(state: PoolState, slot: Slot) -> None:
    unbind_session(state, slot)
    unbind_org(state, slot)
    set_memory(state, slot, None)
    del state.slots[slot.id]


def spawn(state: PoolState, profile: Profile, now: float, out: list[Action], *, claim: Outstanding | None) -> None:
    """Start a process: for one claim's special launch, because of a claim's demand, or as a spare."""
    resume: Any = claim.request.resume if claim else None
    slot = Slot(
        id=f"{state.slot_prefix}{state.next_slot}",
        profile=profile,
        created_at=now,
        resume=resume,
        spawned_for=claim.request.claim if claim else None,
        last_used=now,
    )
    state.next_slot += 1
    state.slots[slot.id] = slot
    state.by_state[SlotState.SPAWNING][slot.id] = slot
    if claim is not None and resume is not None:
        bind_org(state, slot, claim.request.org, claim.request.principal)
    out.append(Spawn(slot.id, profile, resume))


def stop(state: PoolState, slot: Slot, reason: Reason, now: float, out: list[Action]) -> None:
    """End a slot's process; its session, if any, is no longer bound to it."""
    unbind_session(state, slot)
    _disappoint(state, slot)
    if slot.reason is None:
        slot.reason = reason
        state.tally.evictions[reason] += 1
    move(state, slot, SlotEvent.STOP, now, out)
    out.append(Stop(slot.id, slot.reason))


def hibernate(
    state: PoolState, slot: Slot, reason: Reason, now: float, out: list[Action], *, claim: Outstanding | None = None
) -> None:
    """Keep the idle session's state; afterwards the process is rewound for `claim`, or stopped."""
    if slot.session is None:
        raise ValueError(f"{slot.id} has no session to hibernate")
    slot.then_rewind = claim is not None
    if claim is not None:
        slot.awaited_by = claim.request.claim
        claim.awaits = slot.id
    else:
        slot.reason = reason
    state.tally.evictions[reason] += 1
    move(state, slot, SlotEvent.HIBERNATE, now, out)
    out.append(Hibernate(slot.id, slot.session, reason))


def rewind(state: PoolState, slot: Slot, now: float, out: list[Action]) -> None:
    """Wipe a slot whose session is over or kept."""
    unbind_session(state, slot)
    unbind_principal(state, slot)
    move(state, slot, SlotEvent.REWIND, now, out)
    out.append(Rewind(slot.id))


def evict(state: PoolState, slot: Slot, reason: Reason, now: float, out: list[Action]) -> None:
    """Make an idle, detached or spare slot go."""
    if slot.state is SlotState.IDLE:
        hibernate(state, slot, reason, now, out)
    else:
        stop(state, slot, reason, now, out)


def _disappoint(state: PoolState, slot: Slot) -> None:
    """The claim that waited for this slot's rewind must take something else."""
    if slot.awaited_by is not None:
        claim = state.claims.get(slot.awaited_by)
        slot.awaited_by = None
        if claim is not None and claim.awaits == slot.id:
            claim.awaits = None
            claim.no_reuse = True


def set_memory(state: PoolState, slot: Slot, memory: int | None) -> None:
    state.memory += (memory or 0) - (slot.memory or 0)
    slot.memory = memory


def bind_org(state: PoolState, slot: Slot, org: str, principal: str) -> None:
    """The slot counts for this organisation and principal from now on."""
    if slot.org is None:
        slot.org = org
        state.held[org] += 1
    elif slot.org != org:
        raise ValueError(f"{slot.id} belongs to another organisation")
    if slot.principal is None:
        slot.principal = principal
        state.held_by[org, principal] += 1


def unbind_org(state: PoolState, slot: Slot) -> None:
    unbind_principal(state, slot)
    if slot.org is not None:
        _decrease(state.held, slot.org)
        slot.org = None


def unbind_principal(state: PoolState, slot: Slot) -> None:
    if slot.org is not None and slot.principal is not None:
        _decrease(state.held_by, (slot.org, slot.principal))
        slot.principal = None


def unbind_session(state: PoolState, slot: Slot) -> None:
    if slot.session is not None:
        del state.sessions[slot.session]
        slot.session = None


def _decrease(counter: Counter[Any], key: Any) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


# Claims ----------------------------------------------------------------------------------------------------------------


def enter_line(state: PoolState, claim: Outstanding) -> bool:
    """Put a new claim at the end of its session's line; says whether it is the first."""
    request = claim.request
    state.claims[request.claim] = claim
    wait(state, claim)
    line = state.lines.get(request.session)
    if line is None:
        line = state.lines[request.session] = deque()
    line.append(claim)
    return len(line) == 1


def wait(state: PoolState, claim: Outstanding) -> None:
    state.waiting[claim.request.claim] = claim
    state.waiting_per_org[claim.request.org] += 1


def wait_again(state: PoolState, claim: Outstanding) -> None:
    """A granted process died before it was accepted: the claim goes back to where it was."""
    wait(state, claim)
    state.waiting = dict(sorted(state.waiting.items(), key=lambda item: item[1].deadline))
    enqueue(state, claim, front=True)


def enqueue(state: PoolState, claim: Outstanding, *, front: bool = False) -> None:
    request = claim.request
    state.queue.push(request.org, request.claim, claim, weight=request.weight, front=front)


def grant(state: PoolState, claim: Outstanding, slot: Slot, now: float, out: list[Action], *, kind: Kind) -> None:
    """Flip the slot to the claim, here and now: nobody else can be given it any more."""
    request = claim.request
    move(state, slot, SlotEvent.CLAIM, now, out)
    if kind is not Kind.WARM:
        bind_org(state, slot, request.org, request.principal)
        slot.session = request.session
        state.sessions[request.session] = slot
        state.backoff(slot.profile).succeed()
    slot.claim = request.claim
    slot.awaited_by = None
    slot.last_used = now
    claim.slot = slot.id
    claim.kind = kind
    claim.awaits = None
    _stop_waiting(state, claim)
    waited = now - claim.asked_at
    resume = slot.resume if slot.virgin else None
    out.append(Grant(request.claim, slot.id, kind, waited, resume))


def _stop_waiting(state: PoolState, claim: Outstanding) -> None:
    key = claim.request.claim
    if state.waiting.pop(key, None) is not None:
        _decrease(state.waiting_per_org, claim.request.org)
    if key in state.queue:
        state.queue.remove(key)


def leave_line(state: PoolState, claim: Outstanding) -> Outstanding | None:
    """Forget a claim. Returns the claim that is now the first of its session, if that is a change."""
    request = claim.request
    del state.claims[request.claim]
    _stop_waiting(state, claim)
    if claim.awaits is not None:
        slot = state.slots.get(claim.awaits)
        if slot is not None and slot.awaited_by == request.claim:
            slot.awaited_by = None
        claim.awaits = None
    line = state.lines[request.session]
    was_first = line[0] is claim
    line.remove(claim)
    if not line:
        del state.lines[request.session]
        return None
    return line[0] if was_first else None


def refuse(
    state: PoolState, claim: Outstanding, refusal: Refusal, out: list[Action], *, cause: BaseException | None = None
) -> Outstanding | None:
    """Forget a claim and tell its claimer; returns the next first claim of its session."""
    behind = state.lines[claim.request.session][0] is not claim
    state.tally.refusals[refusal] += 1
    out.append(Refuse(claim.request.claim, refusal, cause, behind_own_session=behind))
    return leave_line(state, claim)
