"""Which waiting claim gets which process, what is started and who makes room: the heart of every decision.

One round walks the waiting claims in fair order three times:

1. organisations that were passed over too often: whatever they need, also at the cost of others' idle processes;
2. everybody, as far as something is ready: own process, clean process of the organisation, the principal's idle one
   (to be rewound), a spare;
3. everybody left: is something on its way already (a start, a rewind, a process that ends)? Else start a process, or,
   when the pool is full, make exactly as much room as is needed.

Nothing that is on its way is reserved: whoever is first in fair order when it becomes ready takes it. The exception
are processes with special launch data and processes that are rewound at one claim's request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from claude_wrapper.pool.messages import Action
from claude_wrapper.pool.requests import Kind
from claude_wrapper.pool.settings import Profile
from claude_wrapper.pool.slot import Reason, Slot, SlotState
from claude_wrapper.pool.state import (
    Outstanding,
    PoolState,
    PrincipalKey,
    evict,
    grant,
    hibernate,
    spawn,
)


def match(state: PoolState, now: float, out: list[Action]) -> None:
    """One round: grants, starts, evictions and the refill of spares."""
    state.retry_at = None
    coming: Counter[Profile] | None = None
    if len(state.queue):
        round_ = _Round(state, now, out)
        round_.run()
        coming = round_.coming
    if state.started and not state.draining:
        _refill(state, now, out, coming if coming is not None else _undedicated(state))


def match_ready(state: PoolState, now: float, out: list[Action]) -> None:
    """Grant what can be had at once; start no process and make no room for the rest."""
    _Round(state, now, out).grant_ready()


def own_process(state: PoolState, claim: Outstanding) -> Slot | None:
    """The session's own idle process, when it fits."""
    slot = state.sessions.get(claim.request.session)
    fits = slot is not None and slot.state is SlotState.IDLE and slot.profile == claim.request.profile
    return slot if fits else None


def choose_victim(state: PoolState, slots: Iterable[Slot], *, asking: str | None = None) -> Slot | None:
    """The least recently used of `slots` (in that order) of the organisation that holds most above its share.

    `asking` counts as if it held one more already: so an organisation makes room for itself before it takes from one
    that holds as much.
    """
    first: dict[str, Slot] = {}
    for slot in slots:
        if slot.org is not None:
            first.setdefault(slot.org, slot)
    if not first:
        return None
    active = set(state.held) | set(state.queue.lanes)
    weight = sum(state.weights.get(org, 1) for org in active)

    def excess(org: str) -> float:
        share = state.settings.max_processes * state.weights.get(org, 1) / weight
        return state.held[org] + (org == asking) - share

    return first[max(first, key=excess)]


def memory_is_full(state: PoolState) -> bool:
    """Whether one more process of average size would pass the limit. A start that was not measured counts as average."""
    limit = state.settings.memory_limit_bytes
    if limit is None or not state.slots:
        return False
    measured = sum(1 for slot in state.slots.values() if slot.memory is not None)
    average = state.memory / measured if measured else 0.0
    return state.memory + average * (len(state.slots) - measured + 1) > limit


def _undedicated(state: PoolState) -> Counter[Profile]:
    return Counter(slot.profile for slot in state.by_state[SlotState.SPAWNING].values() if not slot.dedicated)


def _later(state: PoolState, at: float) -> None:
    state.retry_at = at if state.retry_at is None else min(state.retry_at, at)


def _refill(state: PoolState, now: float, out: list[Action], coming: Counter[Profile]) -> None:
    """Start what is missing to the wanted number of spares, after and never instead of what claims need.

    One start stays free for claims (unless only one is allowed at all), so that a claim never waits for a refill.
    """
    settings = state.settings
    limit = max(1, settings.parallel_spawns - 1)
    for profile, wanted in settings.spares.items():
        missing = wanted - len(state.spares.get(profile, ())) - coming[profile]
        if missing <= 0:
            continue
        not_before = max(
            state.backoff(profile).ready_at(somebody_waits=False),
            state.refill_at.get(profile, float("-inf")),
        )
        if not_before > now:
            _later(state, not_before)
            continue
        while (
            missing > 0
            and state.count(SlotState.SPAWNING) < limit
            and len(state.slots) < settings.max_processes
            and not memory_is_full(state)
        ):
            spawn(state, profile, now, out, claim=None)
            missing -= 1


@dataclass(slots=True)
class _Round:
    """What one round has to remember: what is on its way and not yet meant for anybody."""

    state: PoolState
    now: float
    out: list[Action]
    coming: Counter[Profile] = field(init=False)
    cleaning: Counter[tuple[str | None, Profile]] = field(default_factory=Counter)
    leaving: int = 0
    """Processes that end and whose room is not counted on yet."""
    leaving_at_start: int = 0
    leaving_org: Counter[str | None] = field(default_factory=Counter)
    leaving_principal: Counter[tuple[str | None, str | None]] = field(default_factory=Counter)
    planned_org: Counter[str] = field(default_factory=Counter)
    """Slots that organisations will get from what is on its way."""
    planned_principal: Counter[PrincipalKey] = field(default_factory=Counter)
    dedicated: set[str | None] = field(default_factory=set)
    settled: set[str] = field(default_factory=set)
    """Claims that need nothing more in this round."""
    served: set[str] = field(default_factory=set)
    contending: set[str] = field(default_factory=set)
    """Organisations with a claim that waits for others, not for its own limits."""

    def __post_init__(self) -> None:
        by_state = self.state.by_state
        self.coming = _undedicated(self.state)
        self.dedicated = {slot.spawned_for for slot in by_state[SlotState.SPAWNING].values() if slot.dedicated}
        for slot in by_state[SlotState.STOPPING].values():
            self._count_leaving(slot)
        for slot in by_state[SlotState.HIBERNATING].values():
            if slot.then_rewind:
                self._count_cleaning(slot)
            else:
                self._count_leaving(slot)
        for slot in by_state[SlotState.REWINDING].values():
            self._count_cleaning(slot)

    def _count_leaving(self, slot: Slot) -> None:
        self.leaving += 1
        self.leaving_at_start += 1
        self.leaving_org[slot.org] += 1
        self.leaving_principal[slot.org, slot.principal] += 1

    def _count_cleaning(self, slot: Slot) -> None:
        if slot.awaited_by is None:
            self.cleaning[slot.org, slot.profile] += 1

    def run(self) -> None:
        queue = self.state.queue
        if queue.starving():
            for claim in queue.walk(self._load, self.served, impatient_only=True):
                if self._take_ready(claim) or self._provide(claim):
                    self.served.add(claim.request.org)
        self.grant_ready()
        reached_all = True
        for claim in queue.walk(self._load, self.served):
            if self._exhausted():
                reached_all = False
                break
            if claim.request.claim not in self.settled:
                self._provide(claim)
        limit = self.state.settings.max_processes_per_org
        for org in queue.lanes:
            at_its_limit = limit is not None and self.state.held[org] >= limit
            if org not in self.contending and (reached_all or at_its_limit):
                queue.note_blocked(org)

    def _exhausted(self) -> bool:
        """Whether nothing can be done for any claim: a saturated pool must not walk its whole queue at every event."""
        state, by_state = self.state, self.state.by_state
        on_its_way = self.leaving > 0 or any(self.coming.values()) or any(self.cleaning.values())
        if on_its_way or by_state[SlotState.IDLE] or by_state[SlotState.DETACHED]:
            return False
        settings = state.settings
        if len(state.slots) < settings.max_processes and not memory_is_full(state):
            return state.count(SlotState.SPAWNING) >= settings.parallel_spawns
        return not by_state[SlotState.SPARE] or self.leaving_at_start >= settings.parallel_spawns

    def grant_ready(self) -> None:
        by_state = self.state.by_state
        if not (by_state[SlotState.SPARE] or by_state[SlotState.DETACHED] or by_state[SlotState.IDLE]):
            return
        for claim in self.state.queue.walk(self._load, self.served):
            if claim.request.claim not in self.settled:
                self._take_ready(claim)

    def _load(self, org: str) -> float:
        return self.state.held[org] + self.planned_org[org]

    # What is ready -----------------------------------------------------------------------------------------------------

    def _take_ready(self, claim: Outstanding) -> bool:
        """Grant what can be had at once; says whether the claim needs nothing more."""
        state, request = self.state, claim.request
        own = own_process(state, claim)
        if own is not None:
            return self._grant(claim, own, Kind.WARM)
        if claim.awaits is not None:
            return self._settle(claim)
        if request.session in state.sessions:
            return False
        full = self._principal_full(claim)
        if request.resume is None:
            clean = None if full else self._clean_process(claim)
            if clean is not None:
                return self._grant(claim, clean, Kind.REUSED)
            if self._start_reuse(claim):
                return self._settle(claim)
        elif not request.resume_on_spare or request.claim in self.dedicated:
            return False  # what `resume` stands for is with the process that is being started
        if full or self._org_full(claim):
            return False
        for slot in state.spares.get(request.profile, {}).values():
            fresh = slot.ready_step == state.step
            if not fresh:
                self._delay_refill(slot.profile)
            return self._grant(claim, slot, Kind.COLD if fresh else Kind.SPARE)
        return False

    def _clean_process(self, claim: Outstanding) -> Slot | None:
        request = claim.request
        for slot in self.state.by_state[SlotState.DETACHED].values():
            if slot.org == request.org and slot.profile == request.profile:
                return slot
        return None

    def _start_reuse(self, claim: Outstanding) -> bool:
        """Begin to empty the principal's least recently used process for this claim, if the claim allows that."""
        request = claim.request
        if not request.reuse_idle or claim.no_reuse:
            return False
        for slot in self.state.by_state[SlotState.IDLE].values():
            mine = slot.org == request.org and slot.principal == request.principal and slot.profile == request.profile
            if mine:
                hibernate(self.state, slot, Reason.REUSE, self.now, self.out, claim=claim)
                return True
        return False

    def _delay_refill(self, profile: Profile) -> None:
        refill_at = self.state.refill_at
        if refill_at.get(profile, float("-inf")) <= self.now:
            refill_at[profile] = self.now + self.state.settings.refill_delay_seconds

    def _grant(self, claim: Outstanding, slot: Slot, kind: Kind) -> bool:
        grant(self.state, claim, slot, self.now, self.out, kind=kind)
        self.state.queue.note_grant(claim.request.org)
        return self._settle(claim)

    def _settle(self, claim: Outstanding) -> bool:
        self.settled.add(claim.request.claim)
        self.contending.add(claim.request.org)
        return True

    # What is on its way or has to be brought about ---------------------------------------------------------------------

    def _provide(self, claim: Outstanding) -> bool:
        """See to it that something comes for this claim; False when its organisation's own limits stand in the way."""
        state, request = self.state, claim.request
        self.settled.add(request.claim)
        own = state.sessions.get(request.session)
        if own is not None:
            # Its former process still has the session's state: wait until that is kept.
            if own.state is SlotState.IDLE:
                hibernate(state, own, Reason.PROFILE, self.now, self.out)
            return False
        if self._principal_full(claim):
            self._make_room_in_principal(claim)
            return False
        if request.resume is None and self.cleaning[request.org, request.profile] > 0:
            self.cleaning[request.org, request.profile] -= 1
            self.planned_principal[claim.principal_key] += 1
            return self._settle(claim)
        if request.claim not in self.dedicated and self._org_full(claim):
            self._make_room_in_org(claim)
            return False
        self.contending.add(request.org)
        if request.claim in self.dedicated:
            return self._settle(claim)
        self.planned_org[request.org] += 1
        self.planned_principal[claim.principal_key] += 1
        if request.resume is None and self.coming[request.profile] > 0:
            self.coming[request.profile] -= 1
            return self._settle(claim)
        self._start(claim)
        return True

    def _start(self, claim: Outstanding) -> None:
        """Start a process for this claim, or make room for one, or leave it waiting for others."""
        state, settings, profile = self.state, self.state.settings, claim.request.profile
        not_before = state.backoff(profile).ready_at(somebody_waits=True)
        if not_before > self.now:
            _later(state, not_before)
            return
        if len(state.slots) < settings.max_processes and not memory_is_full(state):
            if state.count(SlotState.SPAWNING) >= settings.parallel_spawns:
                return
            spawn(state, profile, self.now, self.out, claim=claim)
            return
        if self.leaving > 0:
            self.leaving -= 1
            return
        # No more room at once than starts can use: what was emptied too early would be lost for nothing.
        if self.leaving_at_start >= settings.parallel_spawns:
            return
        victim = self._victim_for(claim)
        if victim is None:
            return
        self._evict(victim, Reason.CAPACITY)
        self.leaving -= 1

    def _victim_for(self, claim: Outstanding) -> Slot | None:
        """A spare that nobody waits for costs no tenant anything; then idle processes, clean ones first."""
        by_state = self.state.by_state
        spares = by_state[SlotState.SPARE].values()
        other = next((slot for slot in spares if slot.profile != claim.request.profile), None)
        victim = other or next(iter(spares), None)
        if victim is not None:
            return victim
        idle = [*by_state[SlotState.DETACHED].values(), *by_state[SlotState.IDLE].values()]
        return choose_victim(self.state, idle, asking=claim.request.org)

    def _evict(self, slot: Slot, reason: Reason) -> None:
        self._count_leaving(slot)
        evict(self.state, slot, reason, self.now, self.out)

    # Limits of the claimer's own ---------------------------------------------------------------------------------------

    def _org_full(self, claim: Outstanding) -> bool:
        limit = self.state.settings.max_processes_per_org
        org = claim.request.org
        return limit is not None and self.state.held[org] + self.planned_org[org] >= limit

    def _principal_full(self, claim: Outstanding) -> bool:
        limit = self.state.settings.max_processes_per_principal
        key = claim.principal_key
        return limit is not None and self.state.held_by[key] + self.planned_principal[key] >= limit

    def _make_room_in_org(self, claim: Outstanding) -> None:
        org = claim.request.org
        if self.leaving_org[org] > 0:
            self.leaving_org[org] -= 1
            return
        for state in (SlotState.DETACHED, SlotState.IDLE):
            for slot in self.state.by_state[state].values():
                if slot.org == org:
                    self._evict(slot, Reason.ORG_LIMIT)
                    self.leaving_org[org] -= 1
                    return

    def _make_room_in_principal(self, claim: Outstanding) -> None:
        key = claim.principal_key
        if self.leaving_principal[key] > 0:
            self.leaving_principal[key] -= 1
            return
        for slot in self.state.by_state[SlotState.IDLE].values():
            if (slot.org, slot.principal) == key:
                self._evict(slot, Reason.PRINCIPAL_LIMIT)
                self.leaving_principal[key] -= 1
                return
