"""A circuit breaker per upstream and credential. Pure: a table over three states; time comes in as an argument.

| state     | ask                                        | success | failure            | no verdict |
|-----------|--------------------------------------------|---------|--------------------|------------|
| closed    | go                                         | closed  | the N-th: open     | closed     |
| open      | wait until the pause ends, then half_open  | –       | –                  | –          |
| half_open | wait: one probe is out                     | closed  | open, pause anew   | open, the next ask is the probe |

Verdicts that arrive from calls that began before the last change of state do not count.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Verdict(enum.StrEnum):
    """What an attempt says about the upstream."""

    SUCCESS = "success"
    """It answered, also with an error that is the request's fault."""
    FAILURE = "failure"
    """Unreachable, silent, or 5xx."""
    NONE = "none"
    """Nothing was learnt: cut by us, or a rate limit."""


def verdict(status: int) -> Verdict:
    """What a status says: 5xx are failures (529 too), 429 says nothing, the rest show that the upstream works."""
    if status >= 500:
        return Verdict.FAILURE
    return Verdict.NONE if status in {408, 429, 499} else Verdict.SUCCESS


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to ask the upstream; goes back with the verdict."""

    probe: bool
    epoch: int


@dataclass(frozen=True, slots=True)
class BreakerView:
    """A breaker as operators see it."""

    upstream: str
    credential_id: str
    state: State
    failures: int
    retry_after: float


class Breaker:
    """One upstream under one credential."""

    def __init__(self, failures: int, pause: float) -> None:
        """Opens after `failures` in a row; lets one probe through after `pause` seconds."""
        self._limit = failures
        self._pause = pause
        self._failures = 0
        self._until = 0.0
        self._state = State.CLOSED
        self._epoch = 0

    @property
    def state(self) -> State:
        return self._state

    @property
    def failures(self) -> int:
        """Failures in a row."""
        return self._failures

    def ask(self, now: float) -> Permit | None:
        """A permit, or None: do not ask the upstream now."""
        if self._state is State.CLOSED:
            return Permit(probe=False, epoch=self._epoch)
        if self._state is State.HALF_OPEN or now < self._until:
            return None
        self._state = State.HALF_OPEN
        self._epoch += 1
        return Permit(probe=True, epoch=self._epoch)

    def retry_after(self, now: float) -> float:
        """Seconds until asking makes sense."""
        return 0.0 if self._state is State.CLOSED else max(1.0, self._until - now)

    def shut(self, now: float) -> bool:
        """Whether `ask` would refuse now. Changes nothing."""
        return self._state is State.HALF_OPEN or (self._state is State.OPEN and now < self._until)

    def report(self, permit: Permit, verdict: Verdict, now: float) -> None:
        """What came of a permit. A probe's verdict decides; a straggler's counts only while the breaker is closed."""
        if permit.epoch != self._epoch:
            return  # from before the last change: the state has moved on
        if self._state is State.HALF_OPEN:
            self._probed(verdict, now)
        elif self._state is State.CLOSED:
            self._counted(verdict, now)

    def _probed(self, verdict: Verdict, now: float) -> None:
        if verdict is Verdict.SUCCESS:
            self._become(State.CLOSED)
            self._failures = 0
        else:
            self._failures += verdict is Verdict.FAILURE
            self._until = now + self._pause if verdict is Verdict.FAILURE else now
            self._become(State.OPEN)

    def _counted(self, verdict: Verdict, now: float) -> None:
        if verdict is Verdict.SUCCESS:
            self._failures = 0
        elif verdict is Verdict.FAILURE:
            self._failures += 1
            if self._failures >= self._limit:
                self._until = now + self._pause
                self._become(State.OPEN)

    def _become(self, state: State) -> None:
        self._state = state
        self._epoch += 1
