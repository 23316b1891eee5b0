"""The pool's async shell: it carries decisions out and takes none.

Every event goes through `_apply`, which runs `plan` and starts what it says, synchronously in the event loop's thread.
There is no `await` between a decision and its effect on the pool's state, hence no lock. Whatever takes time (start,
hibernate, rewind, stop) is one task per slot that reports back with the next event.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Generic

from claude_wrapper.clock import Clock
from claude_wrapper.errors import Conflict, Draining, NotFound, PoolOverloaded, PoolTimeout, SpawnFailed, WrapperError
from claude_wrapper.ids import SLOT, Ids
from claude_wrapper.pool import messages as m
from claude_wrapper.pool.plan import plan
from claude_wrapper.pool.ports import OnHibernate, OnLost, P, SlotFactory
from claude_wrapper.pool.requests import ClaimRequest, Keep, Refusal
from claude_wrapper.pool.settings import PoolSettings
from claude_wrapper.pool.state import PoolState
from claude_wrapper.pool.stats import PoolStats, ShellCounts, snapshot
from claude_wrapper.pool.upkeep import wake_at

_log = logging.getLogger(__name__)

_SLOT_PREFIX_LENGTH = len(SLOT) + 9
"""`slot_` and eight random characters: slot ids are part of socket paths, which may have 107 bytes in all."""

_STOP_ATTEMPTS = 2

_SHORTEST_ALARM = 0.001
"""Timers may ring a hair early; without a floor the rest would be waited for in a busy loop."""


@dataclass(slots=True)
class _Waiter:
    """A claimer between its request and its acceptance."""

    outcome: m.Grant | m.Refuse | None = None
    signal: asyncio.Event = field(default_factory=asyncio.Event)


class Claim(Generic[P]):
    """A process held for one session. It must be released exactly once; more often does nothing."""

    __slots__ = ("_pool", "_released", "claim", "kind", "process", "resume", "session", "slot", "waited_seconds")

    def __init__(self, pool: Pool[P], session: str, grant: m.Grant, process: P) -> None:
        self._pool = pool
        self._released = False
        self.claim = grant.claim
        self.session = session
        self.slot = grant.slot
        self.process = process
        self.kind = grant.kind
        self.resume = grant.resume
        """The launch data with which the process was started for this very claim, else `None`."""
        self.waited_seconds = grant.waited

    async def release(self, keep: Keep) -> None:
        """Give the process back. Does not wait for anything, and so cannot be cancelled half-way."""
        if not self._released:
            self._released = True
            self._pool.give_back(self.claim, self.slot, keep)


class Pool(Generic[P]):
    """Warm processes for sessions. `start` it, `claim` and release, `drain`, `close` it."""

    def __init__(
        self,
        settings: PoolSettings,
        clock: Clock,
        ids: Ids,
        factory: SlotFactory[P],
        *,
        on_hibernate: OnHibernate[P] | None = None,
        on_lost: OnLost | None = None,
    ) -> None:
        """Without `on_hibernate` and `on_lost` idle processes go without anybody being told."""
        self._settings = settings
        self._clock = clock
        self._factory = factory
        self._on_hibernate = on_hibernate
        self._on_lost = on_lost
        self._state = PoolState(settings, slot_prefix=ids.new(SLOT)[:_SLOT_PREFIX_LENGTH] + "-")
        self._waiters: dict[str, _Waiter] = {}
        self._processes: dict[str, P] = {}
        self._jobs: dict[str, asyncio.Task[None]] = {}
        """What is under way per slot: at most one thing, and a stop after it."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._inbox: deque[m.Event] = deque()
        self._deciding = False
        self._alarm: asyncio.Task[None] | None = None
        self._alarm_at = float("inf")
        self._empty = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._hibernate_failures = 0
        self._stop_failures = 0

    # For callers -------------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> PoolSettings:
        """The present ones."""
        return self._settings

    def keep_spares(self, spares: Mapping[Any, int]) -> None:
        """Keep so many spares per profile from now on; what is too many goes when it was idle for long enough."""
        self._settings = self._state.settings = replace(self._settings, spares=spares)
        if self._state.started:
            self._apply(m.Ticked())

    async def start(self) -> None:
        """Begin to start spares. Returns at once; spares become ready one after the other."""
        self._apply(m.Started())

    async def claim(self, request: ClaimRequest) -> Claim[P]:
        """A process for this session, at once or after a fair wait of at most `queue_seconds`.

        Claims of one session are served one after the other, in order. A cancelled call holds nothing.
        Raises `PoolTimeout`, `PoolOverloaded` (the queue is full), `Draining`, `SpawnFailed` (starting failed
        repeatedly for this claim), `NotFound` (the session is bound to another organisation) and `Conflict` (the
        claim's id is in use).
        """
        if request.claim in self._waiters or request.claim in self._state.claims:
            raise Conflict(f"claim {request.claim} is outstanding already; use a fresh id for each claim")
        waiter = self._waiters[request.claim] = _Waiter()
        try:
            self._apply(m.Asked(request))
            while waiter.outcome is None:
                await waiter.signal.wait()
        except BaseException:
            self._apply(m.Withdrawn(request.claim))
            raise
        finally:
            del self._waiters[request.claim]
        if isinstance(waiter.outcome, m.Refuse):
            raise self._refusal(waiter.outcome)
        self._apply(m.Accepted(request.claim))
        return Claim(self, request.session, waiter.outcome, self._processes[waiter.outcome.slot])

    def give_back(self, claim: str, slot: str, keep: Keep) -> None:
        """Release a claim; `Claim.release` is the way to call it."""
        process = self._processes.get(slot)
        measures = self._settings.max_resident_bytes is not None or self._settings.memory_limit_bytes is not None
        memory = process.memory_bytes() if process is not None and measures else None
        self._apply(m.Released(claim, keep, memory))

    async def end_session(self, session: str, *, hibernate: bool = False) -> None:
        """The session needs its process no more.

        Its process is wiped and may serve the same organisation again; with `hibernate` its state is kept first and
        the process stopped. A busy process is left to its holder and dealt with at its release. Does not wait.
        """
        self._apply(m.SessionEnded(session, hibernate))

    async def drain(self) -> None:
        """Refuse new claims with `Draining` from now on. Those that wait or hold a process go on."""
        self._apply(m.DrainAsked())

    async def close(self, deadline: float) -> None:
        """End everything: waiting claims are refused, idle sessions hibernated, all processes stopped in parallel.

        Busy processes have `deadline` seconds to be released; then they are stopped under their holders. When this
        returns or is cancelled, no process and no task of the pool is left. Cancelling it means: do not wait any more.
        """
        if self._closing is None:
            self._apply(m.CloseAsked())
            self._closing = asyncio.create_task(self._shut(deadline), name="pool-close")
        cancelled: asyncio.CancelledError | None = None
        while not self._closing.done():
            try:
                await asyncio.wait({self._closing})
            except asyncio.CancelledError as error:
                cancelled = error
                self._apply(m.CloseAsked(force=True))
        if cancelled is not None:
            raise cancelled
        self._closing.result()

    def stats(self) -> PoolStats:
        """The pool at this moment."""
        shell = ShellCounts(self._hibernate_failures, self._stop_failures)
        return snapshot(self._state, self._processes, self._clock.monotonic(), self._clock.now(), shell)

    # Decisions ---------------------------------------------------------------------------------------------------------

    def _apply(self, event: m.Event) -> None:
        """Decide on `event` and carry the decision out; events that this brings about follow before it returns."""
        self._inbox.append(event)
        if self._deciding:
            return
        self._deciding = True
        try:
            while self._inbox:
                for action in plan(self._state, self._inbox.popleft(), self._clock.monotonic()):
                    self._perform(action)
        finally:
            self._deciding = False
        self._set_alarm()
        if self._state.closing and not self._state.slots:
            self._empty.set()

    def _perform(self, action: m.Action) -> None:
        match action:
            case m.Grant():
                self._hand_over(action)
            case m.Revoke(claim=claim):
                waiter = self._waiters.get(claim)
                if waiter is not None:
                    waiter.outcome = None
                    waiter.signal.clear()
            case m.Refuse(claim=claim):
                self._tell(claim, action)
            case m.Spawn():
                self._run(action.slot, "spawn", self._spawn(action))
            case m.Hibernate():
                self._run(action.slot, "hibernate", self._hibernate(action))
            case m.Rewind():
                self._run(action.slot, "rewind", self._rewind(action.slot))
            case m.Stop():
                self._run(action.slot, "stop", self._stop(action, self._jobs.get(action.slot)))
            case m.Freeze(slot=slot) | m.Thaw(slot=slot):
                self._switch_cpu(slot, on=isinstance(action, m.Thaw))
            case m.Lost(session=session, slot=slot):
                self._tell_lost(session, slot)

    def _hand_over(self, grant: m.Grant) -> None:
        process = self._processes.get(grant.slot)
        if process is None or not process.alive:
            self._inbox.append(m.Exited(grant.slot))  # found dead at hand-over: the claim gets another one
        elif grant.claim not in self._waiters:
            self._inbox.append(m.Withdrawn(grant.claim))
        else:
            self._tell(grant.claim, grant)

    def _tell(self, claim: str, outcome: m.Grant | m.Refuse) -> None:
        waiter = self._waiters.get(claim)
        if waiter is not None:
            waiter.outcome = outcome
            waiter.signal.set()

    def _refusal(self, refuse: m.Refuse) -> WrapperError:
        seconds = self._settings.queue_seconds
        match refuse.refusal:
            case Refusal.OVERLOADED:
                return PoolOverloaded(
                    f"all processes are busy and {self._settings.queue_length} claims wait already; try again later",
                    retry_after=1.0,
                )
            case Refusal.TIMEOUT:
                what = "an earlier turn of this session still runs" if refuse.behind_own_session else "none became free"
                return PoolTimeout(f"no process within {seconds:g} s: {what}", retry_after=1.0)
            case Refusal.DRAINING:
                return Draining()
            case Refusal.FOREIGN:
                return NotFound("session not found")
            case Refusal.SPAWN_FAILED:
                if isinstance(refuse.cause, WrapperError):
                    return refuse.cause
                error = SpawnFailed(f"the Claude process could not be started: {refuse.cause!r}")
                error.__cause__ = refuse.cause
                return error

    # Time --------------------------------------------------------------------------------------------------------------

    def _set_alarm(self) -> None:
        at = wake_at(self._state)
        if at is None:
            if self._alarm is not None:
                self._alarm.cancel()
                self._alarm, self._alarm_at = None, float("inf")
            return
        if self._alarm is not None and self._alarm_at <= at:
            return  # it rings early enough, and finds out then what is next
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = asyncio.create_task(self._ring(at), name="pool-alarm")
        self._keep_task(self._alarm)

    async def _ring(self, at: float) -> None:
        await self._clock.sleep(max(_SHORTEST_ALARM, at - self._clock.monotonic()))
        self._alarm, self._alarm_at = None, float("inf")
        sweep_at = self._state.sweep_at
        if sweep_at is not None and self._clock.monotonic() >= sweep_at:
            measured = {slot: process.memory_bytes() for slot, process in self._processes.items()}
            self._apply(m.Measured({slot: size for slot, size in measured.items() if size is not None}))
        self._apply(m.Ticked())

    # What takes time ---------------------------------------------------------------------------------------------------

    def _run(self, slot: str, what: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"pool-{what}-{slot}")
        self._jobs[slot] = task
        self._keep_task(task)

    def _keep_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _spawn(self, action: m.Spawn) -> None:
        slot = action.slot
        try:
            async with asyncio.timeout(self._settings.spawn_seconds):
                process = await self._factory.spawn(slot, action.profile, action.resume)
        except TimeoutError:
            error = SpawnFailed(f"the Claude process was not ready within {self._settings.spawn_seconds:g} s")
            self._apply(m.SpawnBroke(slot, error))
            return
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the slot must not be lost
            _log.warning("pool.spawn_failed slot=%s: %s", slot, error)
            self._apply(m.SpawnBroke(slot, error))
            return
        self._processes[slot] = process
        if slot not in self._state.slots:
            await self._end_process(slot, process, "closed")  # its stop gave up waiting for this start
            return
        self._apply(m.SpawnReady(slot, process.memory_bytes()))
        process.on_exit(lambda: self._apply(m.Exited(slot)))

    async def _hibernate(self, action: m.Hibernate) -> None:
        resume: Any = None
        process = self._processes[action.slot]
        try:
            if self._on_hibernate is not None:
                async with asyncio.timeout(self._settings.hibernate_seconds):
                    resume = await self._on_hibernate(action.session, action.slot, process, action.reason)
        except Exception:  # noqa: BLE001 - the process goes in any case, and the failure is counted
            self._hibernate_failures += 1
            _log.exception("pool.hibernate_failed slot=%s session=%s", action.slot, action.session)
        self._apply(m.Hibernated(action.slot, resume))

    async def _rewind(self, slot: str) -> None:
        clean = False
        try:
            async with asyncio.timeout(self._settings.rewind_seconds):
                clean = await self._processes[slot].rewind()
        except Exception as error:  # noqa: BLE001 - a process that cannot be made clean is stopped, whatever the cause
            _log.warning("pool.rewind_failed slot=%s: %s", slot, error)
        self._apply(m.Rewound(slot, clean))

    async def _stop(self, action: m.Stop, before: asyncio.Task[None] | None) -> None:
        slot = action.slot
        if before is not None and not before.done():
            before.cancel()
            await asyncio.wait({before}, timeout=self._settings.stop_seconds)
        process = self._processes.get(slot)
        if process is not None:
            await self._end_process(slot, process, action.reason.value)
        self._jobs.pop(slot, None)
        self._apply(m.StopEnded(slot))

    async def _end_process(self, slot: str, process: P, reason: str) -> None:
        for attempt in range(1, _STOP_ATTEMPTS + 1):
            try:
                async with asyncio.timeout(self._settings.stop_seconds):
                    await process.stop(reason)
                break
            except Exception:  # noqa: BLE001 - tried again, then counted
                _log.exception("pool.stop_failed slot=%s pid=%s attempt=%s", slot, process.pid, attempt)
        else:
            self._stop_failures += 1
        self._processes.pop(slot, None)

    def _tell_lost(self, session: str, slot: str) -> None:
        _log.warning("pool.process_lost slot=%s session=%s", slot, session)
        if self._on_lost is not None:
            self._on_lost(session, slot)

    def _switch_cpu(self, slot: str, *, on: bool) -> None:
        process = self._processes.get(slot)
        if process is None:
            return
        with suppress(OSError):  # it has ended; its exit is reported by itself
            process.thaw() if on else process.freeze()

    async def _shut(self, deadline: float) -> None:
        """Wait for what goes by itself, then force, then cancel what is left. Every wait is bounded."""
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                await self._empty.wait()
        if not self._empty.is_set():
            self._apply(m.CloseAsked(force=True))
            with suppress(TimeoutError):
                async with asyncio.timeout((_STOP_ATTEMPTS + 1) * self._settings.stop_seconds):
                    await self._empty.wait()
        left = {task for task in self._tasks if not task.done()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=self._settings.stop_seconds)
