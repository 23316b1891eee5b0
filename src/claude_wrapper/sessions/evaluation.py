"""A session's runner at an evaluation: it begins, is alive, ends. What is decided is decided in `outcomes`.

The start is in the log before the grader is asked, so the replica after one that died knows that an evaluation runs: it
asks again under the same start event. The end is one transaction with all that follows from it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.ids import EVENT
from claude_wrapper.sessions import outcomes, records, verdicts
from claude_wrapper.sessions.budgets import BUDGET_REACHED, reached, usage_to_wire
from claude_wrapper.sessions.eventlog import Stored
from claude_wrapper.sessions.grading import Grader, Judgement
from claude_wrapper.sessions.journal import TURN_EVENTS, Books, Marking, SessionJournal
from claude_wrapper.sessions.outcomes import Outcome, Result
from claude_wrapper.sessions.records import Session
from claude_wrapper.sessions.spec import TurnEnd
from claude_wrapper.sessions.turnend import with_usage
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.wire.managed import END_TURN, EXHAUSTED
from claude_wrapper.wire.usage import Usage

log = structlog.get_logger(__name__)

BEAT_SECONDS: Final = 10.0
"""How often a stream is told that an evaluation is alive."""


class Evaluation:
    """The evaluation of the outcome of a session that is open. `run` once."""

    def __init__(self, books: Books, grader: Grader, journal: SessionJournal, asker: Principal) -> None:
        """`asker` is whose turns these are."""
        self._books = books
        self._grader = grader
        self._journal = journal
        self._asker = asker
        self._session = journal.session.id

    async def run(self, session: Session, woken: asyncio.Event, closing: Callable[[], bool]) -> None:
        """Ask for a verdict and write what follows from it. `woken` is set when the runner is called, `closing`: the
        server stops.

        Returns early, with the evaluation as it is in the log, when the client interrupts it, the session has ended or
        the server stops. Raises LeaseLost once another replica holds the session.
        """
        outcome = await self._begin()
        if outcome is None:
            return
        began = self._books.clock.monotonic()
        grading = asyncio.ensure_future(self._grader.grade(session, self._asker, outcome))
        try:
            while not grading.done():
                if await _called(grading, woken):
                    woken.clear()
                    if closing() or await self._stopped():
                        return
                elif not grading.done():
                    await self._beat(outcome)
            judgement = grading.result()
        finally:
            grading.cancel()
            await asyncio.wait({grading})
        active = round((self._books.clock.monotonic() - began) * 1000)
        stored = await self._books.db.run(lambda tx: self._end(tx, outcome, judgement, active))
        await self._books.log.publish(self._session, stored)

    async def _begin(self) -> Outcome | None:
        """The outcome, with its start event in the log; None: none is open any more."""
        books, asker, journal = self._books, self._asker, self._journal
        async with books.db.transaction() as tx:
            present = await records.get_held(tx, asker, self._session, journal.fence)
            one = outcomes.current(present.outcomes)
            if one is None or present.ended:
                return None
            events = [] if present.status == records.RUNNING else journal.running_events()
            changed: Any = present.outcomes
            if one["result"] == Result.EVALUATING:
                events.append(outcomes.ongoing_event(one))  # its server died, or stopped: a new one asks again
            else:
                start = {**outcomes.start_event(one), "id": books.ids.new(EVENT)}
                events.append(start)
                changed = outcomes.evaluating(present.outcomes, start["id"])
            values = {"outcomes": changed, "status": records.RUNNING, "stop_reason": None}
            stored, _ = await books.log.write_with(tx, asker, self._session, events, values, fence=journal.fence)
        await books.log.publish(self._session, stored)
        return outcomes.current(changed)

    async def _stopped(self) -> bool:
        async with self._books.db.read() as tx:
            present = await records.get_session(tx, self._asker, self._session)
            interrupts = await self._books.log.queued(tx, self._asker, self._session, ("user.interrupt",))
            return present.ended or bool(interrupts)

    async def _beat(self, outcome: Outcome) -> None:
        books, event = self._books, outcomes.ongoing_event(outcome)
        stored: list[Stored] = []
        with contextlib.suppress(StorageUnavailable):  # the verdict will be written, or the evaluation repeated
            async with books.db.transaction() as tx:
                stored = await books.log.write(tx, self._asker, self._session, [event], fence=self._journal.fence)
        await books.log.publish(self._session, stored)

    async def _end(self, tx: AsyncConnection, outcome: Outcome, judgement: Judgement, active_ms: int) -> list[Stored]:
        """The verdict, what it cost, and whether the session goes on."""
        books, asker, journal = self._books, self._asker, self._journal
        session = await records.get_held(tx, asker, self._session, journal.fence)
        one = outcomes.current(session.outcomes)
        if one is None or one["start"] != outcome["start"]:
            return []  # the session was archived meanwhile
        verdict = outcomes.final(one, judgement.verdict.result)
        why = judgement.verdict.explanation
        changed = outcomes.judged(session.outcomes, verdict, why, books.clock.now())
        events = [outcomes.end_event(one, verdict, why, sum((call.usage for call in judgement.calls), start=Usage()))]
        if judgement.error is not None:
            events.append({"type": "session.error", "error": dict(judgement.error)})
        usage = with_usage(session.usage, TurnEnd(calls=judgement.calls), books.list_price)
        values: dict[str, Any] = {"outcomes": changed, "usage": usage, "active_ms": session.active_ms + active_ms}
        spent = reached(session.budget, usage)
        queued = bool(await books.log.queued(tx, asker, self._session, TURN_EVENTS))
        if session.turn is None and (spent or not (queued or outcomes.more_to_do(changed))):
            reason = BUDGET_REACHED if spent else END_TURN if judgement.error is None else EXHAUSTED
            values |= {"status": records.IDLE, "stop_reason": dict(reason)}
            events.append({"type": "session.usage", "usage": usage_to_wire(usage), "budget": session.budget})
            events += journal.idle_events(reason)
        stored, _ = await books.log.write_with(tx, asker, self._session, events, values, fence=journal.fence)
        log.info("outcome.evaluated", session=self._session, outcome=one["outcome_id"], result=verdict)
        return stored


def marking(books: Books, asker: Principal, session: str, taken: Sequence[Stored]) -> Marking | None:
    """What the beginning of a turn does to the outcomes; `taken` are the events that it answers, none: it tells the agent
    what the grader said."""
    if taken and taken[0].type != outcomes.DEFINED:
        return None

    async def mark(tx: AsyncConnection) -> dict[str, Any]:
        present = await records.get_session(tx, asker, session, lock=True)
        if not taken:
            return {"outcomes": outcomes.told(present.outcomes)}
        return {"outcomes": outcomes.begun(present.outcomes, taken[0].seq, books.clock.now())}

    return mark


def content_of(session: Session, taken: Sequence[Stored]) -> list[dict[str, Any]]:
    """What a turn says to the agent; `taken` as for `marking`."""
    if not taken:
        last = outcomes.current(session.outcomes) is None
        return verdicts.revision(outcomes.unsaid(session.outcomes) or "", last=last)
    return [block for one in taken for block in _said(one.json())]


def _said(event: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a client's event says to the model."""
    content: list[dict[str, Any]] = list(event.get("content") or ())
    if event["type"] == "system.message":
        text = "\n".join(str(block.get("text", "")) for block in content)
        return [{"type": "text", "text": f"<system-reminder>\n{text}\n</system-reminder>"}]
    return verdicts.task(event) if event["type"] == outcomes.DEFINED else content


async def _called(grading: asyncio.Future[Judgement], woken: asyncio.Event) -> bool:
    """Whether the runner was called before the verdict or the next beat."""
    call = asyncio.ensure_future(woken.wait())
    waits: set[asyncio.Future[Any]] = {grading, call}
    try:
        await asyncio.wait(waits, timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        return call.done()
    finally:
        call.cancel()
