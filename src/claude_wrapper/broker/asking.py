"""Asking the upstream until it answers: the reservation, the attempts at one model and credential, and who stands in.

Nothing has gone to the process yet; what comes of it here is one answer to pass on, or one failure to tell.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from claude_wrapper import errors
from claude_wrapper.broker import bodies, fallback, inject, retry
from claude_wrapper.broker.attempt import Opened, Rejected, attempt
from claude_wrapper.broker.breaker import Verdict, verdict
from claude_wrapper.broker.calls import Binding, Reservation, TurnContext
from claude_wrapper.broker.fallback import Candidate, Fault
from claude_wrapper.broker.hedge import first_of
from claude_wrapper.broker.inject import Headers
from claude_wrapper.broker.lines import Line
from claude_wrapper.broker.means import Means
from claude_wrapper.broker.policy import Kind, Route
from claude_wrapper.broker.refusals import Refusal, Refused, refusal_of
from claude_wrapper.broker.upstream import Ask
from claude_wrapper.wire.usage import Usage


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked, for whom."""

    binding: Binding
    turn: TurnContext | None
    route: Route
    method: str
    model: str
    estimate: Usage
    main: bool
    headers: Headers = field(repr=False)
    """The process's own."""
    body: bytes | None = field(repr=False)


class Asking:
    """One order on its way to an answer. Use once, and drop it with the order: it holds the body."""

    def __init__(self, means: Means, order: Order, began: float) -> None:
        """`began`: when the call began, on the monotonic clock."""
        self._means = means
        self._order = order
        self._began = began
        self.reservation: Reservation | None = None
        """Held since `reserve`, for whom is asked now; settled or cancelled by whoever books the call."""
        self.asked = Candidate(order.model, order.binding.credential)
        """Who answered, or whose failure is told."""
        self.secrets = [order.binding.credential.secret]
        """Of every credential that was shown: none of them may be seen in an answer."""
        self.attempts = 0
        """Requests that were sent."""

    def forget(self) -> None:
        """The body is not needed any more; the turn keeps the call."""
        self._order = replace(self._order, body=None, headers=[])

    async def begin(self) -> None:
        """Hold room for the call. Raises `Refused`."""
        self.reservation = await self.reserve(self._order.model)

    # The gate ------------------------------------------------------------------------------------------------------

    async def reserve(self, model: str) -> Reservation | None:
        """Ask the gate in a task of its own: a reservation that is made while we are cancelled must not get lost."""
        order, means = self._order, self._means
        if order.route.kind is Kind.MODELS:
            return None
        asking = asyncio.ensure_future(means.gate.reserve(order.binding, order.turn, model, order.estimate))
        try:
            return await asyncio.shield(asking)
        except errors.WrapperError as error:
            raise Refused(refusal_of(error)) from error
        except asyncio.CancelledError:
            means.loose_ends.start(self._give_back(asking))
            raise

    async def _give_back(self, held: Reservation | asyncio.Future[Reservation]) -> None:
        try:
            async with asyncio.timeout(self._means.settings.finish_seconds):
                reservation = await held if isinstance(held, asyncio.Future) else held
                await reservation.cancel()
        except errors.WrapperError:
            return  # the gate refused: nothing is held
        except Exception as error:  # noqa: BLE001 (clean-up tells and goes on)
            self._means.observer.fault("give back a reservation", error)

    async def answered(self) -> Opened | Rejected:
        """What came of it in the end: an answer whose first piece was read, or the failure that the caller hears of.

        Raises `Refused` when the breaker let nothing through.
        """
        first = outcome = await self._attempts_at(self.asked)
        standby = self._order.binding.credential.standby
        if standby is not None and not isinstance(outcome, Opened):
            trail = [(self.asked, _fault(outcome))]
            while (one := self._following(trail)) is not None and await self._turn_to(one, outcome):
                outcome = await self._attempts_at(one)
                if isinstance(outcome, Opened):
                    return outcome
                trail.append((one, _fault(outcome)))
            self.asked = trail[0][0]  # it is the first one's failure that the caller hears of
        if isinstance(first, Shut):
            raise _shut(first)
        return first

    async def _attempts_at(self, asked: Candidate) -> Opened | Rejected | Shut:
        """Ask one model under one credential until it answers or is given up."""
        means, order = self._means, self._order
        line = means.lines.of(asked.credential, "" if asked.model == order.model else asked.model)
        ask = self._ask(asked)
        line.called()
        last: Rejected | None = None
        attempts = 0
        while (permit := line.ask()) is not None:
            attempts += 1
            self.attempts += 1
            said = Verdict.NONE
            try:
                outcome = await self._attempted(ask, line)
                said = self._verdict(outcome)
            finally:
                line.report(permit, said)
            if isinstance(outcome, Opened):
                return outcome
            last = outcome
            pause = self._pause(outcome, attempts)
            if pause is None or self._better_elsewhere(asked, outcome):
                return outcome
            if not line.spend_retry():
                means.observer.retries_spent(order.binding, outcome.failure.status)
                return outcome
            means.observer.retrying(order.binding, self.attempts, outcome.failure.status, pause)
            await means.clock.sleep(pause)
        return last or Shut(line.retry_after())

    async def _attempted(self, ask: Ask, line: Line) -> Opened | Rejected:
        """One attempt; for reads where the operator wants it, a second one when the first is slow."""
        means = self._means

        async def once() -> Opened | Rejected:
            return await attempt(means.upstream, ask, means.settings, means.clock)

        if not means.settings.hedge_seconds or self._order.route.kind not in (Kind.COUNT_TOKENS, Kind.MODELS):
            return await once()

        def allowed() -> bool:
            if not line.spend_retry():
                return False
            self.attempts += 1
            means.observer.hedged(self._order.binding)
            return True

        return await first_of(
            once,
            after=means.settings.hedge_seconds,
            clock=means.clock,
            good=lambda outcome: isinstance(outcome, Opened),
            allowed=allowed,
            discard=_closed,
        )

    def _ask(self, asked: Candidate) -> Ask:
        order, credential = self._order, asked.credential
        route, body = order.route, order.body
        if body is not None and asked.model != order.model:
            body = bodies.with_model(body, asked.model)
        url = credential.base_url.rstrip("/") + route.path + (f"?{route.query}" if route.query else "")
        trace = order.turn.trace if order.turn else None
        return Ask(order.method, url, inject.upstream_headers(order.headers, credential, trace), body)

    # Who stands in -------------------------------------------------------------------------------------------------

    def _following(self, trail: fallback.Trail) -> Candidate | None:
        order = self._order
        standby = order.binding.credential.standby
        if standby is None:
            return None
        return fallback.following(
            trail,
            standby,
            allowed_models=order.binding.allowed_models,
            other_models=order.route.kind is Kind.MESSAGES,
        )

    def _better_elsewhere(self, asked: Candidate, rejected: Rejected) -> bool:
        """Another credential is asked at once: waiting would not make this one better."""
        if self._order.binding.credential.standby is None or _fault(rejected) is not Fault.CREDENTIAL:
            return False
        one = self._following([(asked, Fault.CREDENTIAL)])
        return one is not None and one.model == asked.model

    async def _turn_to(self, one: Candidate, failed: Rejected | Shut) -> bool:
        """Get ready to ask somebody else; False: the budget does not allow that model."""
        before, means = self.asked, self._means
        if one.model != before.model:
            held, self.reservation = self.reservation, None
            if held is not None:
                means.loose_ends.start(self._give_back(held))
            try:
                self.reservation = await self.reserve(one.model)
            except Refused:
                return False
        self.asked = one
        self.secrets.append(one.credential.secret)
        status = failed.failure.status if isinstance(failed, Rejected) else 503
        if one.model != before.model:
            means.observer.fell_back(self._order.binding, "model", status, before.model, one.model)
        if one.credential.id != before.credential.id:
            means.observer.fell_back(self._order.binding, "credential", status, before.credential.id, one.credential.id)
        return True

    @staticmethod
    def _verdict(outcome: Opened | Rejected) -> Verdict:
        if isinstance(outcome, Opened):
            return Verdict.SUCCESS
        return Verdict.NONE if outcome.dropped else verdict(outcome.failure.status)

    def _pause(self, rejected: Rejected, attempts: int) -> float | None:
        if rejected.dropped and attempts == 1:
            return 0.0
        means = self._means
        elapsed = means.clock.monotonic() - self._began
        return retry.delay(rejected.failure, attempts, elapsed, means.settings, means.rng)


@dataclass(frozen=True, slots=True)
class Shut:
    """The breaker let nothing through."""

    retry_after: float


def _closed(outcome: Opened | Rejected) -> None:
    if isinstance(outcome, Opened):
        outcome.answer.close()


def _fault(failed: Rejected | Shut) -> Fault:
    return Fault.MODEL if isinstance(failed, Shut) else fallback.fault_of(failed.failure.status)


def _shut(shut: Shut) -> Refused:
    return Refused(
        Refusal(
            503,
            "overloaded_error",
            "The upstream has failed several times in a row; it is not asked until it has had a rest.",
            shut.retry_after,
        )
    )
