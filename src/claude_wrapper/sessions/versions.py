"""Which version of the CLI a conversation runs on: the main one, or the canary, until that is taken back or promoted.

A conversation keeps its version while this server holds it; after a roll-back it moves to the main one as soon as its
process is gone. Replicas tell each other through shared state, so that one of them that has seen enough speaks for all.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from claude_wrapper.clock import Clock
from claude_wrapper.errors import (
    AgentCrashed,
    AgentProtocolError,
    AgentTimeout,
    Conflict,
    SpawnFailed,
    StorageUnavailable,
    WrapperError,
)
from claude_wrapper.sessions.canary import CANARY, MAIN, Rules, Sample, State, chosen, objection
from claude_wrapper.sessions.spec import Owner
from claude_wrapper.storage.state.ports import Values

log = structlog.get_logger(__name__)

_FAULTS: Final = (AgentCrashed, AgentProtocolError, AgentTimeout, SpawnFailed)
"""What a version of the CLI is to blame for; an upstream's errors, limits and interruptions are not its fault."""
_MOST_TURNS: Final = 5_000
"""Turns that are remembered of each version."""
_KEPT_SECONDS: Final = 30 * 86_400.0


@dataclass(slots=True)
class _Turns:
    """The turns of one version: when each ended, whether it failed, how long it took."""

    ended: deque[tuple[float, bool, float]] = field(default_factory=lambda: deque(maxlen=_MOST_TURNS))

    def sample(self, since: float) -> Sample:
        while self.ended and self.ended[0][0] < since:
            self.ended.popleft()
        failures = sum(failed for _, failed, _ in self.ended)
        good = [seconds for _, failed, seconds in self.ended if not failed]
        return Sample(len(self.ended), failures, statistics.median(good) if good else None)


class VersionWatch:
    """What telemetry hears. This one does nothing."""

    def turn(self, version: str, *, failed: bool) -> None:
        """A turn of a version ended."""

    def state(self, state: State) -> None:
        """The canary's state changed."""


class Versions:
    """The versions of one server."""

    def __init__(
        self,
        main: Callable[[], Awaitable[str]],
        canary: str | None,
        rules: Rules,
        clock: Clock,
        *,
        pinned: Callable[[Owner], Awaitable[str | None]],
        values: Values | None = None,
        watch: VersionWatch | None = None,
        on_change: Callable[[State], None] = lambda state: None,
    ) -> None:
        """`main` finds out the main version's number (as in 2.1.327), at the first need; `canary` is the other one's;
        `pinned` tells an organisation's; `on_change` moves the spares."""
        self.canary = canary
        self._find_main, self._main = main, ""
        self.rules = rules
        self.on_change = on_change
        self.reason: str | None = None
        self.state: State | None = None if canary is None else State.RUNNING
        self._clock, self._pinned, self._values = clock, pinned, values
        self._watch = watch or VersionWatch()
        self._untold = False
        self._turns = {MAIN: _Turns(), CANARY: _Turns()}

    # Which one --------------------------------------------------------------------------------------------------------

    async def of(self, conversation: str, owner: Owner, *, before: str | None) -> str:
        """The version (`canary.MAIN` or `CANARY`) for a conversation that has no process now; `before`: the one it had.

        Raises Conflict when its organisation is pinned to a version that is not installed.
        """
        pin = await self._pinned(owner)
        if pin is not None:
            return self._installed(pin, await self.main())
        if self.canary is None or self.state is State.ROLLED_BACK:
            return MAIN
        if before is not None:
            return before
        if self.state is State.PROMOTED:
            return CANARY
        return CANARY if chosen(conversation, self.rules.share) else MAIN

    async def main(self) -> str:
        """The main version's number."""
        if not self._main:
            self._main = await self._find_main()
        return self._main

    def _installed(self, pin: str, main: str) -> str:
        if pin == main:
            return MAIN
        if pin == self.canary:
            return CANARY
        have = " and ".join(filter(None, (main, self.canary)))
        raise Conflict(
            f"this organisation is pinned to CLI {pin}, and this server has {have}: "
            "change the policy cli_version, or ask the operator to install that version"
        )

    # How it does ------------------------------------------------------------------------------------------------------

    def ended(self, version: str, error: WrapperError | None, seconds: float) -> None:
        """A turn ended. Takes the canary back when that was one too many."""
        if self.state is not State.RUNNING:
            return
        failed = isinstance(error, _FAULTS)
        if error is not None and not failed:
            return  # it says nothing of the CLI
        self._turns[version].ended.append((self._clock.monotonic(), failed, seconds))
        self._watch.turn("canary" if version == CANARY else "main", failed=failed)
        if version == CANARY and (why := objection(*self.samples(), self.rules)) is not None:
            self._become(State.ROLLED_BACK, why)

    def samples(self) -> tuple[Sample, Sample]:
        """The main version's turns in the window, and the canary's."""
        since = self._clock.monotonic() - self.rules.window_seconds
        return self._turns[MAIN].sample(since), self._turns[CANARY].sample(since)

    # What becomes of it -----------------------------------------------------------------------------------------------

    async def decide(self, state: State) -> None:
        """The operator's word. Raises Conflict when there is no canary."""
        if self.canary is None:
            raise Conflict("there is no canary: set CLAUDE_WRAPPER_CANARY_CLI")
        self._become(state, "by the operator")
        await self.tell()

    async def keep(self, seconds: float) -> None:
        """Tell and hear what was decided, for ever."""
        while True:
            await self._clock.sleep(seconds)
            await self.tell()

    async def tell(self) -> None:
        """Agree with the other replicas: whoever decided first speaks for all, but for the operator, who comes last.

        What was agreed is said again when shared state has lost it, for replicas that start later.
        """
        if self._values is None or self.canary is None:
            return
        key = f"canary/{await self.main()}/{self.canary}"
        try:
            heard = None if self._untold else await self._values.get(key)
            if heard is not None and heard.decode() != self.state:
                self._become(State(heard.decode()), "by another replica")
                self._untold = False
            elif self._untold or (heard is None and self.state is not State.RUNNING):
                await self._values.set(key, str(self.state).encode(), ttl=_KEPT_SECONDS)
                self._untold = False
        except StorageUnavailable as error:
            log.warning("canary.not_agreed", reason=error.message)

    def _become(self, state: State, why: str) -> None:
        if state is self.state:
            return
        self.state, self.reason, self._untold = state, why, True
        if state is State.RUNNING:
            self._turns[CANARY].ended.clear()
        main, canary = self.samples()
        log.warning(
            "canary.changed",
            state=state.value,
            reason=why,
            canary=self.canary,
            main_turns=main.turns,
            main_failures=main.failures,
            canary_turns=canary.turns,
            canary_failures=canary.failures,
        )
        self._watch.state(state)
        self.on_change(state)

    async def report(self) -> dict[str, Any]:
        """What an operator sees."""
        main, canary = self.samples()
        return {
            "main": {"version": await self.main(), **_figures(main)},
            "canary": None
            if self.canary is None
            else {
                "version": self.canary,
                "state": self.state,
                "reason": self.reason,
                "share": self.rules.share,
                **_figures(canary),
            },
            "rules": {
                "min_turns": self.rules.min_turns,
                "window_seconds": self.rules.window_seconds,
                "worse_errors": self.rules.worse_errors,
                "slower": self.rules.slower,
            },
        }


def _figures(sample: Sample) -> dict[str, Any]:
    return {
        "turns": sample.turns,
        "failures": sample.failures,
        "median_seconds": None if sample.median_seconds is None else round(sample.median_seconds, 3),
    }
