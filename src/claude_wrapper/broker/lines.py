"""The line to one upstream under one credential: its breaker and its retry budgets, kept while it is in use.

A model that is asked in place of another has a line of its own: the breaker that opened for the one must not shut out
the other. Retries are bounded twice: a credential that is at its own limit (429) cannot use up what all credentials of
the upstream share, and all of them together cannot multiply an outage of the upstream.
"""

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

    def __init__(
        self,
        credential: Credential,
        settings: BrokerSettings,
        clock: Clock,
        observer: Observer,
        shared: RetryBudget,
    ) -> None:
        """`shared` is the retry budget of all lines to this upstream."""
        self.upstream = credential.base_url
        self.credential_id = credential.id
        self._budget = RetryBudget(settings.retry_budget_ratio, settings.retry_budget_reserve)
        self._shared = shared
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

    def called(self) -> None:
        """A call begins."""
        self._budget.called()
        self._shared.called()

    def spend_retry(self) -> bool:
        """Take one retry; False: this credential or its upstream has none left."""
        return not self._shared.empty and self._budget.spend() and self._shared.spend()

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
        self._lines: OrderedDict[tuple[str, str, str], Line] = OrderedDict()
        self._budgets: OrderedDict[str, RetryBudget] = OrderedDict()

    def of(self, credential: Credential, instead: str = "") -> Line:
        """The line of a credential, or of the model `instead` under it; made at first use."""
        key = (credential.base_url, credential.id, instead)
        line = self._lines.get(key)
        if line is None:
            shared = self._budget(credential.base_url)
            line = self._lines[key] = Line(credential, self._settings, self._clock, self._observer, shared)
            if len(self._lines) > MAX_LINES:
                self._lines.popitem(last=False)
        else:
            self._lines.move_to_end(key)
        return line

    def shut(self, credential: Credential) -> float | None:
        """Seconds until asking makes sense, while the breaker of this credential refuses; None: it may be asked."""
        line = self._lines.get((credential.base_url, credential.id, ""))
        return line.shut() if line is not None else None

    def _budget(self, upstream: str) -> RetryBudget:
        budget = self._budgets.get(upstream)
        if budget is None:
            settings = self._settings
            budget = RetryBudget(settings.retry_budget_ratio, settings.upstream_retry_reserve)
            self._budgets[upstream] = budget
            if len(self._budgets) > MAX_LINES:
                self._budgets.popitem(last=False)
        else:
            self._budgets.move_to_end(upstream)
        return budget

    def views(self) -> tuple[BreakerView, ...]:
        """The breakers that are not in their initial state."""
        return tuple(line.view() for line in self._lines.values() if not line.idle)
