"""A world around `plan`: it keeps what is under way, answers when told to, and checks every action against history."""

from __future__ import annotations

from typing import Any

from claude_wrapper.pool import messages as m
from claude_wrapper.pool.plan import plan
from claude_wrapper.pool.requests import ClaimRequest, Keep, Kind
from claude_wrapper.pool.settings import PoolSettings
from claude_wrapper.pool.slot import Reason, SlotState
from claude_wrapper.pool.state import PoolState
from pool.audit import audit
from pool.profiles import CHAT, NamedProfile


class World:
    """Every method is one event; `audit` runs after each."""

    def __init__(self, settings: PoolSettings, *, start: bool = True) -> None:
        self.state = PoolState(settings)
        self.now = 100.0
        self.spawning: dict[str, m.Spawn] = {}
        self.hibernating: dict[str, m.Hibernate] = {}
        self.rewinding: set[str] = set()
        self.stopping: dict[str, m.Stop] = {}
        self.granted: dict[str, m.Grant] = {}
        self.held: dict[str, m.Grant] = {}
        self.refused: dict[str, m.Refuse] = {}
        self.lost: list[m.Lost] = []
        self.requests: dict[str, ClaimRequest] = {}
        self.owner: dict[str, str] = {}
        """Organisation by slot, from its first acceptance until it is gone."""
        self.session_in: dict[str, str] = {}
        """Session whose context is in the process."""
        self.frozen: set[str] = set()
        self.grants: list[m.Grant] = []
        self.actions: list[m.Action] = []
        """Of the last event."""
        self._claims = 0
        if start:
            self.send(m.Started())

    # Events ------------------------------------------------------------------------------------------------------------

    def send(self, event: m.Event) -> list[m.Action]:
        self.actions = plan(self.state, event, self.now)
        for action in self.actions:
            self._check(action)
        self._check_evictions(event)
        audit(self.state)
        return self.actions

    def ask(
        self,
        session: str,
        org: str = "a",
        principal: str = "p",
        profile: NamedProfile = CHAT,
        *,
        reuse_idle: bool = False,
        resume: Any = None,
        resume_on_spare: bool = False,
        weight: int = 1,
    ) -> str:
        self._claims += 1
        claim = f"c{self._claims}"
        self.requests[claim] = ClaimRequest(
            claim, session, org, principal, profile, reuse_idle, resume, resume_on_spare, weight
        )
        waiting = len(self.state.waiting)
        self.send(m.Asked(self.requests[claim]))
        assert len(self.state.waiting) <= max(waiting, self.state.settings.queue_length), "the queue is too long"
        return claim

    def accept(self, claim: str) -> m.Grant:
        grant = self.granted.pop(claim)
        org = self.requests[claim].org
        assert self.owner.setdefault(grant.slot, org) == org, "a process changed its organisation"
        self.session_in[grant.slot] = self.requests[claim].session
        self.held[claim] = grant
        self.send(m.Accepted(claim))
        return grant

    def withdraw(self, claim: str) -> None:
        self.granted.pop(claim, None)
        self.send(m.Withdrawn(claim))
        assert claim not in self.state.claims
        assert all(slot.claim != claim for slot in self.state.slots.values()), "a gone claimer holds a process"

    def release(self, claim: str, keep: Keep = Keep.SESSION, memory: int | None = None) -> None:
        self.held.pop(claim)
        self.send(m.Released(claim, keep, memory))

    def ready(self, slot: str, memory: int | None = None) -> None:
        self.spawning.pop(slot)
        self.send(m.SpawnReady(slot, memory))

    def broke(self, slot: str) -> None:
        self.spawning.pop(slot)
        self.send(m.SpawnBroke(slot, RuntimeError("no such binary")))

    def hibernated(self, slot: str, resume: Any = None) -> None:
        self.hibernating.pop(slot)
        self.send(m.Hibernated(slot, resume))

    def rewound(self, slot: str, *, clean: bool = True) -> None:
        self.rewinding.remove(slot)
        if clean:
            self.session_in.pop(slot, None)
        self.send(m.Rewound(slot, clean))

    def stopped(self, slot: str) -> None:
        self.stopping.pop(slot)
        self.owner.pop(slot, None)
        self.session_in.pop(slot, None)
        self.frozen.discard(slot)
        self.send(m.StopEnded(slot))
        assert slot not in self.state.slots

    def exited(self, slot: str) -> None:
        self.send(m.Exited(slot))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.send(m.Ticked())

    # Sequences ---------------------------------------------------------------------------------------------------------

    def one_io(self) -> bool:
        """Let the oldest thing that is under way succeed; says whether there was one."""
        if self.stopping:
            self.stopped(next(iter(self.stopping)))
        elif self.hibernating:
            self.hibernated(next(iter(self.hibernating)))
        elif self.rewinding:
            self.rewound(next(iter(self.rewinding)))
        elif self.spawning:
            self.ready(next(iter(self.spawning)))
        else:
            return False
        return True

    def settle(self) -> None:
        """Let all that is under way succeed, and what follows from it."""
        for _ in range(10_000):
            if not self.one_io():
                return
        raise AssertionError("the pool never comes to rest")

    def obtain(self, session: str, org: str = "a", **more: Any) -> str:
        """A claim that is granted and accepted once everything under way has ended."""
        claim = self.ask(session, org, **more)
        self.settle()
        self.accept(claim)
        return claim

    def keep_idle(self, session: str, org: str = "a", **more: Any) -> str:
        """A session whose process is idle; returns its slot."""
        claim = self.obtain(session, org, **more)
        slot = self.held[claim].slot
        self.release(claim)
        return slot

    def finish(self) -> None:
        """Let everybody come to an end: all claims are served or refused, then the pool is closed."""
        for _ in range(10_000):
            if self.granted:
                self.accept(next(iter(self.granted)))
            elif self.held:
                self.release(next(iter(self.held)))
            elif not self.one_io():
                if not self.state.waiting:
                    break
                self.pass_time(1.0)
        assert not self.state.claims, "a claim was never answered"
        self.send(m.CloseAsked())
        self.settle()
        assert not self.state.slots
        assert not self.state.held
        assert not self.state.held_by
        assert not self.state.sessions
        assert not self.state.lines
        assert self.state.memory == 0

    # Checks ------------------------------------------------------------------------------------------------------------

    def _check(self, action: m.Action) -> None:
        match action:
            case m.Spawn(slot=slot):
                assert slot not in self.owner
                self.spawning[slot] = action
            case m.Grant():
                self._check_grant(action)
            case m.Revoke(claim=claim):
                del self.granted[claim]
            case m.Refuse(claim=claim):
                assert claim not in self.granted
                assert claim not in self.held
                self.refused[claim] = action
            case m.Hibernate(slot=slot, session=session):
                assert self.session_in[slot] == session
                assert slot not in self.frozen
                self.hibernating[slot] = action
            case m.Rewind(slot=slot):
                assert slot not in self.frozen
                self.rewinding.add(slot)
            case m.Stop(slot=slot):
                assert slot not in self.stopping, "stopped twice"
                assert slot not in self.frozen
                for under_way in (self.spawning, self.hibernating):
                    under_way.pop(slot, None)
                self.rewinding.discard(slot)
                self.stopping[slot] = action
            case m.Freeze(slot=slot):
                assert slot not in self.frozen
                self.frozen.add(slot)
            case m.Thaw(slot=slot):
                self.frozen.remove(slot)
            case m.Lost():
                self.lost.append(action)

    def _check_grant(self, grant: m.Grant) -> None:
        request = self.requests[grant.claim]
        slot = grant.slot
        assert slot not in self.frozen, "handed over frozen"
        assert slot not in {g.slot for g in (*self.granted.values(), *self.held.values())}, "two owners"
        assert self.owner.get(slot, request.org) == request.org, "two organisations"
        match grant.kind:
            case Kind.WARM:
                assert self.session_in[slot] == request.session, "warm, but not the session's own process"
            case Kind.REUSED:
                assert slot in self.owner
                assert slot not in self.session_in, "handed over with a former session inside"
                assert request.resume is None
            case Kind.SPARE | Kind.COLD:
                assert slot not in self.owner, "a used process was handed over as a virgin one"
                started = [
                    one.id for one in self.state.slots.values() if one.spawned_for == grant.claim and one.dedicated
                ]
                assert started in ([], [slot]), "what is to be resumed is with another process that is being started"
                if request.resume_on_spare:
                    assert grant.resume == (request.resume if started else None)
                else:
                    assert (grant.kind is Kind.COLD) >= (request.resume is not None)
        if not request.resume_on_spare:
            assert grant.resume == (request.resume if grant.kind is Kind.COLD else None)
        self.granted[grant.claim] = grant
        self.grants.append(grant)

    def _check_evictions(self, event: m.Event) -> None:
        """Room is made only when there is none, and never for more claims than wait for it."""
        evicted = [a for a in self.actions if isinstance(a, m.Hibernate | m.Stop) and a.reason is Reason.CAPACITY]
        if isinstance(event, m.Hibernated):
            evicted = [a for a in evicted if a.slot != event.slot]
        if not evicted or isinstance(event, m.CloseAsked):
            return
        state = self.state
        leaving = [
            slot
            for slot in (*state.by_state[SlotState.STOPPING].values(), *state.by_state[SlotState.HIBERNATING].values())
            if not slot.then_rewind
        ]
        full = len(state.slots) == state.settings.max_processes
        assert full or state.settings.memory_limit_bytes is not None, "evicted although there was room"
        assert len(evicted) <= state.settings.parallel_spawns
        assert len(leaving) <= len(state.queue), "evicted below need"
