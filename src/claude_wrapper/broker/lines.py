"""The line to one upstream under one credential: its breaker and its retry budget, kept while it is in use."""

from __future__ import annotations

from collections import OrderedDict

from claude_wrapper.broker.breaker import Breaker, BreakerView, Permit, State, Verdict
from claude_wrapper.broker.calls import Credential, Observer
from claude_wrapper.broker.retry import RetryBudget
from claude_wrapper.broker.settings import BrokerSettings
from claude_wrapper.clock import Clock

MAX_LINES = 10_000


class Line:
    """What is known about one upstream under one credential."""

    def __init__(self, credential: Credential, settings: BrokerSettings, clock: Clock, observer: Observer) -> None:
        self.upstream = credential.base_url
        self.credential_id = credential.id
        self.budget = RetryBudget(settings.retry_budget_ratio, settings.retry_budget_reserve)
        self._breaker = Breaker(settings.breaker_failures, settings.breaker_seconds)
        self._clock = clock
        self._observer = observer

    def ask(self) -> Permit | None:
        """A permit for one attempt; None while the breaker is open."""
        before = self._breaker.state
        permit = self._breaker.ask(self._clock.monotonic())
        self._tell(before)
        return permit

    def report(self, permit: Permit, verdict: Verdict) -> None:
        """What came of an attempt."""
        before = self._breaker.state
        self._breaker.report(permit, verdict, self._clock.monotonic())
        self._tell(before)

    def retry_after(self) -> float:
        """Seconds until the breaker lets a probe through."""
        return self._breaker.retry_after(self._clock.monotonic())

    def shut(self) -> float | None:
        """Seconds until asking makes sense, while the breaker refuses."""
        return self.retry_after() if self._breaker.shut(self._clock.monotonic()) else None

    def view(self) -> BreakerView:
        breaker = self._breaker
        return BreakerView(self.upstream, self.credential_id, breaker.state, breaker.failures, self.retry_after())

    @property
    def idle(self) -> bool:
        """Whether forgetting this line loses nothing."""
        return self._breaker.state is State.CLOSED and not self._breaker.failures

    def _tell(self, before: State) -> None:
        if self._breaker.state is not before:
            self._observer.breaker(self.upstream, self.credential_id, self._breaker.state)


class Lines:
    """All lines, the least recently used first."""

    def __init__(self, settings: BrokerSettings, clock: Clock, observer: Observer) -> None:
        self._settings = settings
        self._clock = clock
        self._observer = observer
        self._lines: OrderedDict[tuple[str, str], Line] = OrderedDict()

    def of(self, credential: Credential) -> Line:
        """The line of a credential; made at first use."""
        key = (credential.base_url, credential.id)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line(credential, self._settings, self._clock, self._observer)
            if len(self._lines) > MAX_LINES:
                self._lines.popitem(last=False)
        else:
            self._lines.move_to_end(key)
        return line

    def shut(self, credential: Credential) -> float | None:
        """Seconds until asking makes sense, while the breaker of this credential refuses; None: it may be asked."""
        line = self._lines.get((credential.base_url, credential.id))
        return line.shut() if line is not None else None

    def views(self) -> tuple[BreakerView, ...]:
        """The breakers that are not in their initial state."""
        return tuple(line.view() for line in self._lines.values() if not line.idle)
