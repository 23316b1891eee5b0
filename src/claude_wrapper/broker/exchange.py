"""One request of a process, from the gate to the ledger.

reserve → attempts (breaker, retries) → stream to the process, metering → settle → record. However it ends - answered,
refused, cut by either side, cancelled at any await - the reservation is settled or cancelled once, and a call that was
sent is recorded once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Protocol

from claude_wrapper import ids
from claude_wrapper.broker import inject, keeping
from claude_wrapper.broker.asking import Asking, Order
from claude_wrapper.broker.attempt import Opened, Rejected, request_id
from claude_wrapper.broker.calls import DONE_BY_CLIENT, STREAM_CUT, Reservation, UpstreamCall
from claude_wrapper.broker.keeping import Keeping, Kept, Tape
from claude_wrapper.broker.means import Means
from claude_wrapper.broker.meter import Meter
from claude_wrapper.broker.refusals import INTERNAL, Refusal, Refused
from claude_wrapper.broker.upstream import UpstreamFailure
from claude_wrapper.storage.cache import Computed
from claude_wrapper.wire.usage import Usage


class Reply(Protocol):
    """Where an answer goes: to a process (`http1.Reply`), or to the server itself."""

    def start(self, status: int, headers: Iterable[tuple[str, str]], *, length: int | None = None) -> None: ...

    def feed(self, data: bytes) -> None: ...

    @property
    def congested(self) -> bool: ...

    async def drain(self) -> None: ...

    def finish(self) -> None: ...

    def whole(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None: ...

    def cut(self) -> None: ...


class Exchange:
    """One order on its way. `run` once."""

    def __init__(
        self,
        means: Means,
        order: Order,
        *,
        ended: Callable[[Exchange, UpstreamCall], None],
        booked: Callable[[Exchange], None],
    ) -> None:
        """`ended` is called at once when the answer is over, `booked` when the call was settled and recorded."""
        self._means = means
        self._order = order
        self._ended = ended
        self._booked = booked
        self._began = means.clock.monotonic()
        self._began_at = means.clock.now()
        self._meter = Meter(streamed=True, max_json_bytes=0)
        self._task: asyncio.Task[None] | None = None
        self._finished = asyncio.Event()
        self._asking = Asking(means, order, self._began)
        # What is known so far:
        self._status = DONE_BY_CLIENT
        self._error: tuple[str, str] | None = ("cancelled", "The call was cut before it was answered.")
        self._request_id: str | None = None
        self._first_byte: float | None = None
        self._retry_after: float | None = None
        self._complete = False
        self._tape: Tape | None = None
        self._content_type = ""
        self._saved: Meter | None = None
        self.call: UpstreamCall | None = None
        """What came of it; None while it is under way. `wait` says when it is also settled and recorded."""

    @property
    def order(self) -> Order:
        return self._order

    @property
    def answered(self) -> bool:
        """Whether all of the answer has been seen; only closing remains."""
        return self._meter.complete or self._complete

    def cancel(self) -> None:
        """Cut the call; it is settled and recorded all the same."""
        if self._task is not None and self.call is None:
            self._task.cancel()

    async def wait(self, seconds: float) -> bool:
        """Until it is settled and recorded; False: not within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._finished.wait()
        except TimeoutError:
            return False
        return True

    async def run(self, reply: Reply) -> None:
        """Make the call and stream its answer. Raises `Refused` if nothing was sent to the process."""
        self._task = asyncio.current_task()
        try:
            place = self._place()
            if place is None or not await self._from_cache(place, reply):
                await self._fresh(reply)
        except Refused as refused:
            self._refused(refused.refusal)
            raise
        except Exception:
            self._refused(INTERNAL)
            raise
        finally:
            # Not awaited: the process may go on while the books are written, and a cancelled call is booked all the same.
            self.call = self._summary()
            self._ended(self, self.call)
            self._order = replace(self._order, body=None, headers=[])  # the turn keeps us, not what was sent
            self._asking.forget()
            self._means.loose_ends.start(self._finish(self.call, self._asking.reservation))

    async def _fresh(self, reply: Reply) -> None:
        await self._asking.begin()
        await self._converse(reply)

    # The cache -----------------------------------------------------------------------------------------------------

    def _place(self) -> Keeping | None:
        caching, order = self._means.caching, self._order
        if caching is None:
            return None
        use = order.turn.cache if order.turn is not None else None
        credential = order.binding.credential
        return caching.of(order.route, credential, order.headers, order.body, use=use, main=order.main)

    async def _from_cache(self, place: Keeping, reply: Reply) -> bool:
        """Answer with what was answered before, or ask and keep the answer; False: nothing has been answered.

        Of several who ask the same at once one asks, and the others get its answer when it is whole.
        """
        asked = False

        async def ask() -> Computed:
            nonlocal asked
            asked = True
            self._note("cw-cache", "miss")
            self._tape = Tape(self._means.settings.max_kept_bytes)
            await self._fresh(reply)
            if not self._worth_keeping() or self._tape.pieces is None:
                raise _NotKept
            kept = Kept(self._content_type, b"".join(self._tape.pieces))
            return Computed(keeping.pack(kept))

        try:
            found = await place.cache.get_or_compute(
                self._order.binding.org, place.key, place.seconds, ask, refresh=place.refresh, share=place.share
            )
        except _NotKept:
            return asked  # ours was answered; another's answer that cannot be shared leaves us to ask
        except Exception:
            if asked:
                raise
            return False
        return True if asked else self._replay(found.value, reply)

    def _replay(self, value: bytes, reply: Reply) -> bool:
        """Give a kept answer; False: it cannot be read."""
        kept, means = keeping.unpack(value), self._means
        if kept is None:
            return False
        body = kept.as_message(means.ids.new(ids.MESSAGE))
        streamed = kept.content_type.startswith("text/event-stream")
        self._saved = Meter(streamed=streamed, max_json_bytes=means.settings.max_body_bytes)
        self._saved.feed(body)
        self._saved.end()
        self._status, self._error, self._complete = 200, None, True
        self._note("cw-cache", "hit")
        reply.whole(200, [("content-type", kept.content_type), ("cw-cache", "hit")], body)
        self._note_first_byte()
        return True

    def _worth_keeping(self) -> bool:
        """Only whole answers of the model that was asked for, which did not end in the middle of something.

        And only by the credential whose upstream the place is named after: a stand-in's may be anybody's server.
        """
        asked, order = self._asking.asked, self._order
        meant = asked.model == order.model and asked.credential.id == order.binding.credential.id
        return self._complete and self._status == 200 and meant

    def _note(self, name: str, value: str) -> None:
        """Tell the caller of the turn's own request."""
        if self._order.turn is not None and self._order.main:
            self._order.turn.notes[name] = value

    # The upstream --------------------------------------------------------------------------------------------------

    async def _converse(self, reply: Reply) -> None:
        outcome = await self._asking.answered()
        if isinstance(outcome, Rejected):
            self._reject(outcome, reply)
            return
        self._note_fallback()
        try:
            await self._stream(outcome, reply)
        finally:
            outcome.answer.close()

    def _note_fallback(self) -> None:
        order, asked = self._order, self._asking.asked
        if asked.model != order.model:
            self._note("cw-fallback-model", asked.model)
        if asked.credential.id != order.binding.credential.id:
            self._note("cw-fallback-credential", asked.credential.id)

    # The answer ----------------------------------------------------------------------------------------------------

    def _reject(self, rejected: Rejected, reply: Reply) -> None:
        self._status = rejected.failure.status
        self._error = (rejected.type, rejected.message)
        self._request_id = rejected.request_id
        self._retry_after = rejected.failure.retry_after
        headers = [
            pair
            for pair in inject.downstream_headers(rejected.headers, self._asking.secrets)
            if pair[0].lower() not in {"content-type", "content-encoding", "x-should-retry"}
        ]
        headers += [("content-type", "application/json"), ("x-should-retry", "false")]
        body = rejected.body
        for secret in filter(None, self._asking.secrets):
            body = body.replace(secret.encode(), b"[credential]")
        reply.whole(self._status, headers, body)

    async def _stream(self, opened: Opened, reply: Reply) -> None:
        answer, meter = opened.answer, self._meter
        self._status = answer.status
        self._request_id = request_id(answer)
        self._content_type = answer.headers.get("content-type", "application/json")
        if not answer.is_stream:
            meter = self._meter = Meter(streamed=False, max_json_bytes=self._means.settings.max_body_bytes)
        length = answer.headers.get("content-length")
        reply.start(
            answer.status,
            inject.downstream_headers(answer.header_pairs(), self._asking.secrets),
            length=int(length) if length is not None and length.isdigit() else None,
        )
        self._note_first_byte()
        chunk = opened.first
        try:
            while chunk:
                reply.feed(chunk)
                meter.feed(chunk)
                if self._tape is not None:
                    self._tape.feed(chunk)
                if reply.congested:
                    await reply.drain()
                chunk = await answer.read()
        except UpstreamFailure as failure:
            self._error = (STREAM_CUT, failure.message)
            reply.cut()
            return
        except TimeoutError:
            self._error = ("cancelled", "The process did not read its answer.")
            reply.cut()
            return
        meter.end()
        self._close_answer(streamed=answer.is_stream)
        reply.finish()

    def _note_first_byte(self) -> None:
        self._first_byte = self._means.clock.monotonic() - self._began
        self._means.observer.first_byte(self._order.binding, self._order.turn, self._first_byte)

    def _close_answer(self, *, streamed: bool) -> None:
        """The answer ended as HTTP has it; a stream must also have said that it is complete."""
        whole = self._meter.complete or not streamed
        self._complete = whole and self._meter.error is None
        self._error = None if self._complete else (STREAM_CUT, "The upstream ended its stream early.")

    def _refused(self, refusal: Refusal) -> None:
        self._status = refusal.status
        self._error = (refusal.type, refusal.message)
        self._retry_after = refusal.retry_after

    # The books -----------------------------------------------------------------------------------------------------

    async def _finish(self, call: UpstreamCall, reservation: Reservation | None) -> None:
        means = self._means
        try:
            if reservation is not None:
                await self._bounded("settle", reservation.settle(call) if call.attempts else reservation.cancel())
            if call.attempts or call.cache_hit:
                await self._bounded("record", means.sink.record(call), goes_on=True)
            means.observer.finished(call)
        finally:
            self._finished.set()
            self._booked(self)

    async def _bounded(self, what: str, work: Awaitable[object], *, goes_on: bool = False) -> None:
        """`goes_on`: what takes longer (the database is away, or the whole server was stopped and finds its deadline past)
        is not lost by not being waited for."""
        try:
            async with asyncio.timeout(self._means.settings.finish_seconds):
                await work
        except TimeoutError as error:
            if goes_on:
                self._means.observer.late(f"{what} a call")
            else:
                self._means.observer.fault(f"{what} a call", error)
        except Exception as error:  # noqa: BLE001 (the other half of the books must still be kept)
            self._means.observer.fault(f"{what} a call", error)

    def _summary(self) -> UpstreamCall:
        order, meter = self._order, self._meter
        binding = order.binding
        error = meter.error if meter.error is not None and self._status < 400 else self._error
        if meter.complete and meter.error is None:
            error, self._complete = None, True  # cut after the last event: the answer was whole
        call = UpstreamCall(
            id=self._means.ids.new(ids.CALL),
            turn=order.turn.turn if order.turn else None,
            session=binding.session,
            org=binding.org,
            workspace=binding.workspace,
            key_id=binding.key_id,
            user=binding.user,
            credential_id=self._asking.asked.credential.id,
            path=order.route.path,
            model=self._asking.asked.model,
            asked_model=order.model if self._asking.asked.model != order.model else None,
            status=self._status,
            error_type=error[0] if error else None,
            error_message=error[1] if error else None,
            upstream_request_id=self._request_id,
            usage=meter.usage,
            started_at=self._began_at,
            first_byte_seconds=self._first_byte,
            total_seconds=self._means.clock.monotonic() - self._began,
            attempts=self._asking.attempts,
            stream_complete=self._complete,
            main=order.main,
            retry_after=self._retry_after,
            stop_reason=(self._saved or meter).stop_reason,
            cache_hit=self._saved is not None,
            saved=self._saved.usage if self._saved is not None else Usage(),
        )
        for secret in filter(None, self._asking.secrets):
            if call.error_message and secret in call.error_message:
                call = replace(call, error_message=call.error_message.replace(secret, "[credential]"))
        return call


class _NotKept(Exception):
    """The answer was given and is not to be kept."""
