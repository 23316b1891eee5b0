"""One slot's way out: who it works for now, which turn runs, and the calls of that turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from claude_wrapper import ids
from claude_wrapper.broker import bodies, canned, inject, policy
from claude_wrapper.broker.asking import Order
from claude_wrapper.broker.calls import DONE_BY_CLIENT, Binding, TurnContext, UpstreamCall
from claude_wrapper.broker.exchange import Exchange
from claude_wrapper.broker.http1 import Connection, Handler, Head, Reply
from claude_wrapper.broker.means import Means
from claude_wrapper.broker.policy import Kind, Route
from claude_wrapper.broker.refusals import NO_TURN, TOO_MANY_CALLS, UNBOUND, WRONG_TOKEN, Refused, refuse
from claude_wrapper.errors import Conflict, InvalidRequest
from claude_wrapper.wire.usage import Usage

_CLOSING_GRACE = 0.25
"""Seconds for an answer that was seen to its end to close: its connection is then kept for the next call."""


_UNBOOKED = 4
"""How many times `max_calls` may wait for their books (a slow ledger must not pile up work without bound)."""


class Endpoint:
    """The broker's listener of one slot. Made by `Broker.open`."""

    def __init__(
        self,
        means: Means,
        *,
        slot: str,
        token: str,
        base_url: str,
        socket: Path | None,
        on_close: Callable[[Endpoint], Awaitable[None]],
    ) -> None:
        self.slot = slot
        self.token = token
        """The dummy credential that the process gets."""
        self.base_url = base_url
        self.socket = socket
        self._means = means
        self._on_close = on_close
        self._binding: Binding | None = None
        self._turn: TurnContext | None = None
        self._model: str | None = None
        """The model of the turn, or of the last one."""
        self._priming = 0
        self._replay: list[dict[str, Any]] | None = None
        self._closed = False
        self._connections: set[Connection] = set()
        self._running: set[Exchange] = set()
        self._of_turn: list[Exchange] = []
        self._in_work = 0
        self._buffered = 0
        self._main_failed = False

    # What sessions and pool use --------------------------------------------------------------------------------------

    @property
    def binding(self) -> Binding | None:
        return self._binding

    def bind(self, binding: Binding) -> None:
        """The slot works for `binding` from now on. Raises Conflict if it still works for somebody else."""
        if self._binding is not None and self._binding.org != binding.org:
            raise Conflict(f"slot {self.slot} is still bound to another organisation")
        if self._binding is not None and self._binding.session != binding.session:
            self.unbind()  # no call of one session goes on under the next
        self._binding = binding

    def unbind(self) -> None:
        """The slot works for nobody: calls in flight are cut, further ones are refused."""
        self._binding = None
        self._turn = None
        self._model = None
        for exchange in self._running:
            exchange.cancel()

    def begin(self, turn: TurnContext) -> None:
        """A turn begins. Raises Conflict when the slot is unbound, InvalidRequest for what an OAuth credential forbids."""
        if self._binding is None:
            raise Conflict(f"slot {self.slot} is not bound to a session")
        if refused := bodies.refused_overrides(self._binding.credential.kind, turn):
            names = ", ".join(refused)
            raise InvalidRequest(
                f"not possible with an OAuth credential, whose requests stay unchanged ({names})", field=refused[0]
            )
        self._turn = turn
        self._model = turn.model
        self._of_turn = []
        self._main_failed = False

    async def end(self) -> tuple[UpstreamCall, ...]:
        """The turn is over: cut what is in flight, return the turn's calls in order.

        Books of calls whose outcome is known are written meanwhile: the next turn does not wait for the ledger.
        Calls that the broker refused are among them (`attempts` 0): they say why, and when to come back.
        """
        exchanges = list(self._of_turn)
        self._turn = None
        self._replay = None
        await self._stop(exchanges)
        calls = [exchange.call for exchange in exchanges if exchange.call is not None]
        return tuple(call for call in calls if call.attempts or call.status != DONE_BY_CLIENT)

    async def cancel_calls(self) -> None:
        """Cut what is in flight (the caller has gone); the turn goes on."""
        await self._stop(list(self._running))

    @contextlib.contextmanager
    def prime(self) -> Iterator[None]:
        """While this is on, the broker answers message requests by itself; nothing is recorded."""
        self._priming += 1
        try:
            yield
        finally:
            self._priming -= 1

    def replay(self, content: list[dict[str, Any]]) -> None:
        """The turn's first main request is answered with this model message, which was given and paid for before.

        A conversation that stopped at a tool call goes on in a new process: it makes the same calls again, under the
        same ids. Nothing is recorded. Forgotten when the turn ends.
        """
        self._replay = content

    async def close(self) -> None:
        """Cut everything and stop listening. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.unbind()
        await self._stop(list(self._running))
        for connection in list(self._connections):
            connection.abort()
        await self._on_close(self)

    async def _stop(self, exchanges: list[Exchange]) -> None:
        unknown = [exchange for exchange in exchanges if exchange.call is None]
        for exchange in unknown:
            if not (exchange.answered and await exchange.wait(_CLOSING_GRACE)):
                exchange.cancel()
        if unknown:
            await asyncio.gather(*(exchange.wait(self._means.settings.finish_seconds) for exchange in unknown))

    # The listener's side (http1.Front and http1.Handler) ----------------------------------------------------------------

    def enter(self, connection: Connection) -> bool:
        if self._closed or len(self._connections) >= self._means.settings.max_connections:
            return False
        self._connections.add(connection)
        return True

    def leave(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def choose(self, head: Head, connection: Connection) -> Handler:
        """Refuse by the head alone whatever can be: nothing of its body is then kept."""
        route = policy.decide(head.method, head.target)
        if route.kind is not Kind.PING:
            if not inject.token_matches(inject.presented_token(head.headers), self.token):
                raise Refused(WRONG_TOKEN)
            self._must_be_open(route)
        most = self._means.settings.max_calls
        if self._in_work >= most or len(self._running) >= _UNBOOKED * most:
            raise Refused(TOO_MANY_CALLS)
        return self

    def fault(self, error: BaseException) -> None:
        self._means.observer.fault(f"endpoint of slot {self.slot}", error)

    def hold(self, size: int) -> bool:
        if self._buffered + size > self._means.settings.max_buffered_bytes:
            return False
        self._buffered += size
        return True

    def release(self, size: int) -> None:
        self._buffered -= size

    async def handle(self, head: Head, body: bytes, reply: Reply) -> None:
        route = policy.decide(head.method, head.target)
        self._in_work += 1
        try:
            if route.kind is Kind.PING:
                reply.whole(200, [], b"")
            elif self._priming:
                self._answer_priming(route, body, reply)
            else:
                await self._pass_on(route, head, body, reply)
        finally:
            self._in_work -= 1

    # Within ------------------------------------------------------------------------------------------------------------

    def _must_be_open(self, route: Route) -> None:
        if self._priming:
            return
        if self._binding is None:
            raise Refused(UNBOUND)
        if route.kind is Kind.MESSAGES and self._turn is None:
            raise Refused(NO_TURN)

    def _answer_priming(self, route: Route, body: bytes, reply: Reply) -> None:
        if route.kind is Kind.COUNT_TOKENS:
            reply.whole(200, [("content-type", "application/json")], canned.token_count())
            return
        if route.kind is not Kind.MESSAGES:
            raise Refused(UNBOUND)
        asked = bodies.read(body)
        message_id = self._means.ids.new(ids.MESSAGE)
        if asked.stream:
            reply.whole(200, [("content-type", "text/event-stream")], canned.stream(asked.model, message_id))
        else:
            reply.whole(200, [("content-type", "application/json")], canned.message(asked.model, message_id))

    async def _pass_on(self, route: Route, head: Head, body: bytes, reply: Reply) -> None:
        self._must_be_open(route)  # again: the binding may have gone while the body came
        binding = self._binding
        if binding is None:
            raise Refused(UNBOUND)
        if self._replay is not None and route.kind is Kind.MESSAGES and self._replayed(binding, body, reply):
            return
        order = self._order(binding, route, head, body)
        exchange = Exchange(self._means, order, ended=self._note, booked=self._running.discard)
        self._running.add(exchange)
        if order.turn is not None:
            self._of_turn.append(exchange)
        await exchange.run(reply)

    def _replayed(self, binding: Binding, body: bytes, reply: Reply) -> bool:
        """Answer the main request with the message that is to be said again; False for another request."""
        asked = bodies.read(body)
        if self._replay is None or not bodies.rewrite(asked, self._turn, binding.credential.kind).main:
            return False
        content, self._replay = self._replay, None
        message_id = self._means.ids.new(ids.MESSAGE)
        reply.whole(200, [("content-type", "text/event-stream")], canned.replay(asked.model, message_id, content))
        return True

    def _order(self, binding: Binding, route: Route, head: Head, body: bytes) -> Order:
        turn = self._turn
        if route.kind is Kind.MODELS:
            return Order(binding, turn, route, head.method, "", Usage(), main=False, headers=head.headers, body=None)
        asked = bodies.read(body)
        self._must_be_of_turn(binding, asked)
        rewritten = bodies.rewrite(asked, turn, binding.credential.kind, repeats_failed=self._main_failed)
        messages = route.kind is Kind.MESSAGES
        estimate = bodies.estimate(asked, self._means.settings.estimate_output_tokens) if messages else Usage()
        main = rewritten.main and messages
        return Order(
            binding,
            turn,
            route,
            head.method,
            asked.model,
            estimate,
            main=main,
            headers=head.headers,
            body=rewritten.body,
        )

    def _must_be_of_turn(self, binding: Binding, asked: bodies.Body) -> None:
        """A token may be counted between turns, too: by the model of the last one."""
        if self._model is None:
            raise Refused(NO_TURN)
        if other := bodies.beyond(asked, self._model):
            self._means.observer.model_refused(binding, self._model, other)
            raise refuse(
                403,
                "permission_error",
                f"model_not_allowed: this turn is for {self._model!r} alone, and its process asked for {other}.",
            )

    def _note(self, exchange: Exchange, call: UpstreamCall) -> None:
        """A call is over; its books follow."""
        if self._turn is not None and exchange.order.turn is self._turn and call.main:
            self._main_failed = call.error_type is not None
