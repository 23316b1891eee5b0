"""The event log: what happened in a session, in order, for good; and everybody who follows it.

Writing: a batch is one transaction, in which its sequence numbers are taken from the session's row (so that there is no
gap, and a later number is never visible before an earlier one). After the commit the batch is published over the shared
state, so that any replica serves any stream. Nobody waits for a reader.

Reading: a stream subscribes first, then reads what is stored, then merges by sequence number: what it has seen already is
dropped, what is missing (a message that was lost on the way) is read from the database.

Previews of the message in flight are published and never stored. A reader that joins late asks the writer for them: the
answer comes on the same channel, in order, so what follows it fits without a seam.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NewType, Self

import msgspec
import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.dml import ReturningUpdate

from claude_wrapper.clock import Clock
from claude_wrapper.errors import InvalidRequest, LeaseLost, NotFound, StorageUnavailable
from claude_wrapper.ids import Ids
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.state.ports import Channels, Ended, Subscription
from claude_wrapper.storage.tables.sessions import session_events, sessions
from claude_wrapper.tenancy.principal import Principal, owned
from claude_wrapper.wire.managed import Delta

log = structlog.get_logger(__name__)

SessionKey = NewType("SessionKey", str)

BUFFER: Final = 2000
"""Messages that a reader may be behind; past that it is cut off."""
PAGE: Final = 500
"""Events read at once while a stream catches up."""
INLINE_BYTES: Final = 64 * 1024
"""Larger batches are not carried by the shared state: readers fetch them from the database."""
_REQUEST_START: Final = "span.model_request_start"
_REQUEST_END: Final = "span.model_request_end"
_NO_USAGE: Final = {
    "input_tokens": 0,
    "output_tokens": 0,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
}
POLL_SECONDS: Final = 1.0
"""While the shared state is away a stream looks into the database this often."""
SILENCE_SECONDS: Final = 15.0
"""After so long without a message a stream looks into the database: a lost message costs at most this delay."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One event of the log."""

    seq: int
    id: str
    type: str
    thread_id: str | None
    body: bytes = field(repr=False)
    """The whole JSON, `processed_at` included."""

    def json(self) -> dict[str, Any]:
        """The event, decoded."""
        decoded: dict[str, Any] = msgspec.json.decode(self.body)
        return decoded


@dataclass(frozen=True, slots=True)
class Preview:
    """Stream-only: a piece of the message in flight."""

    thread_id: str | None
    delta: Delta


@dataclass(frozen=True, slots=True)
class Opened:
    """The stream is attached."""

    head: int
    """The newest event's number."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a session is: every event moves `seq`, every change of its row moves `version`."""

    seq: int
    version: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Events as they will be stored, but for their numbers."""

    at: datetime
    rows: list[dict[str, Any]]


class MovedOn(Exception):
    """Somebody wrote to the session meanwhile; nothing was written."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A model request that will have no end of its own."""

    texts: int
    """Messages of it that are in the log."""
    end: dict[str, Any]
    """The event that closes it, to be written."""


class SlowReader(Exception):
    """The reader was too far behind and is cut off; it may come back with the last id that it saw."""


class _Message(msgspec.Struct, array_like=True, gc=False):
    """What travels on a session's channel."""

    kind: str
    """`e` events, `n` events to be fetched, `p` preview, `s` previews asked for by `to`."""
    events: list[tuple[int, str, str, str | None, bytes]] = []
    deltas: list[tuple[str | None, str, str, str, int, bool]] = []
    last: int = 0
    to: str = ""


@dataclass(frozen=True, slots=True)
class _Told:
    """A message, decoded once for all streams of this replica."""

    raw: bytes
    message: _Message
    events: tuple[Stored, ...]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Message)


def channel(session: str) -> str:
    """Where a session's events are published."""
    return f"session/{session}"


def asks_channel(session: str) -> str:
    """Where late joiners ask for the previews of the message in flight."""
    return f"session/{session}/asks"


class EventLog:
    """The log of all sessions."""

    def __init__(self, db: Database, channels: Channels, clock: Clock, ids: Ids) -> None:
        self._db = db
        self._channels = channels
        self._clock = clock
        self._ids = ids
        self._told: _Told | None = None
        self.unpublished = 0
        """Batches whose readers were not told because the shared state was away; they find out by themselves."""

    # Writing ----------------------------------------------------------------------------------------------------------

    async def append(
        self, principal: Principal, session: str, events: Sequence[dict[str, Any]], *, queued: bool = False
    ) -> list[Stored]:
        """Write a batch in a transaction of its own and publish it. Raises NotFound, StorageUnavailable."""
        async with self._db.transaction() as tx:
            stored = await self.write(tx, principal, session, events, queued=queued)
        await self.publish(session, stored)
        return stored

    async def write(
        self,
        tx: AsyncConnection,
        principal: Principal,
        session: str,
        events: Sequence[dict[str, Any]],
        *,
        queued: bool = False,
        fence: int | None = None,
    ) -> list[Stored]:
        """Write a batch inside the caller's transaction; call `publish` once it is committed.

        `fence` is given by the session's holder: raises LeaseLost once another replica holds it. Else NotFound.

        Each event has `type` and may have `id`. `cross_posted` moves an event of a sub-agent to the session's own
        stream. `queued`: a client's events, which wait for their turn (`processed_at` null).
        """
        if not events:
            return []
        stored, _ = await self.write_with(tx, principal, session, events, {}, queued=queued, fence=fence)
        return stored

    async def write_with(
        self,
        tx: AsyncConnection,
        principal: Principal,
        session: str,
        events: Sequence[dict[str, Any]],
        changes: Mapping[str, Any],
        *,
        queued: bool = False,
        fence: int | None = None,
        at: Mark | None = None,
    ) -> tuple[list[Stored], Mark]:
        """`write`, with `changes` to the session's columns in the same statement; also how far the session is then.

        `at`: only if nobody has written to the session since; else MovedOn.
        """
        batch = self.batch(principal, session, events, queued=queued)
        return await tx.run_sync(self.write_now, principal, session, batch, changes, fence=fence, at=at)

    def batch(
        self, principal: Principal, session: str, events: Sequence[dict[str, Any]], *, queued: bool = False
    ) -> Batch:
        """Events as they will be stored: what becomes of them afterwards does not matter."""
        now = self._clock.now()
        common = {"session_id": session, "org_id": principal.org, "written_at": now}
        common["processed_at"] = None if queued else now
        return Batch(now, [{**common, **self._row(event)} for event in events])

    def write_now(
        self,
        tx: sa.Connection,
        principal: Principal,
        session: str,
        batch: Batch,
        changes: Mapping[str, Any],
        *,
        fence: int | None = None,
        at: Mark | None = None,
    ) -> tuple[list[Stored], Mark]:
        """`write_with` as a plain function, for `Database.write`."""
        taking = _taking_numbers(principal, fence is not None, at is not None, tuple(changes))
        given = {"b_session": session, "b_more": len(batch.rows), "b_moves": 1 if changes else 0, "b_now": batch.at}
        given |= {"b_fence": fence} if fence is not None else {}
        given |= {"b_seq": at.seq, "b_version": at.version} if at is not None else {}
        taken = tx.execute(taking, {**given, **{f"b_new_{name}": value for name, value in changes.items()}})
        row = taken.first()
        if row is None:
            found = None
            if fence is not None or at is not None:
                mine = sa.and_(owned(principal, sessions), sessions.c.id == session)
                found = tx.execute(sa.select(sessions.c.fence).where(mine)).first()
            if found is None:
                raise NotFound(f"there is no session {session}")
            if fence is not None and found.fence != fence:
                raise LeaseLost(f"session {session} was taken over by another replica")
            raise MovedOn
        mark = Mark(row.last_seq, row.version)
        if not batch.rows:
            return [], mark
        first = mark.seq - len(batch.rows) + 1
        rows = [{**row, "seq": first + place} for place, row in enumerate(batch.rows)]
        tx.execute(sa.insert(session_events), rows)
        return [_stored(row) for row in rows], mark

    def _row(self, event: dict[str, Any]) -> dict[str, Any]:
        kind = str(event["type"])
        shown = {"id": event.get("id") or self._ids.new("sevt"), **event}
        # What a client must answer, and the status of sub-agents, is told on the session's own stream.
        own = shown.pop("cross_posted", False) or kind.startswith(("session.", "user."))
        thread = None if own else event.get("session_thread_id")
        return {"id": shown["id"], "type": kind, "thread_id": thread, "body": msgspec.json.encode(shown)}

    async def queued(
        self, tx: AsyncConnection, principal: Principal, session: str, types: Sequence[str]
    ) -> list[Stored]:
        """The client's events of these types that wait to be processed, in order."""
        table = session_events
        query = (
            sa.select(table.c.seq, table.c.id, table.c.type, table.c.thread_id, table.c.body)
            .where(owned(principal, table), table.c.session_id == session)
            .where(table.c.processed_at.is_(None), table.c.type.in_(list(types)))
        )
        rows = (await tx.execute(query.order_by(table.c.seq))).all()
        return [Stored(row.seq, row.id, row.type, row.thread_id, _whole(row.body, None)) for row in rows]

    async def unfinished(self, tx: AsyncConnection, principal: Principal, session: str) -> Unfinished | None:
        """The model request that was open when the session's server died; None: none was."""
        table = session_events
        mine = sa.and_(owned(principal, table), table.c.session_id == session, table.c.thread_id.is_(None))
        query = sa.select(table.c.seq, table.c.id, table.c.type).where(
            mine, table.c.type.in_([_REQUEST_START, _REQUEST_END])
        )
        last = (await tx.execute(query.order_by(table.c.seq.desc()).limit(1))).first()
        if last is None or last.type == _REQUEST_END:
            return None
        texts = sa.select(sa.func.count()).where(mine, table.c.type == "agent.message", table.c.seq > last.seq)
        end = {"type": _REQUEST_END, "model_request_start_id": last.id, "is_error": True, "model_usage": _NO_USAGE}
        return Unfinished((await tx.execute(texts)).scalar_one(), end)

    async def processed(
        self, tx: AsyncConnection, principal: Principal, session: str, events: Sequence[Stored]
    ) -> None:
        """These events have been taken up."""
        await tx.run_sync(self.processed_now, principal, session, events, self._clock.now())

    def processed_now(
        self, tx: sa.Connection, principal: Principal, session: str, events: Sequence[Stored], now: datetime
    ) -> None:
        """`processed` as a plain function, for `Database.write`."""
        table = session_events
        tx.execute(
            sa.update(table)
            .where(owned(principal, table), table.c.session_id == session)
            .where(table.c.seq.in_([one.seq for one in events]))
            .values(processed_at=now)
        )

    async def publish(self, session: str, stored: Sequence[Stored]) -> None:
        """Tell all streams of a committed batch. Never fails: who was not told finds out in a few seconds."""
        if not stored:
            return
        rows = [(one.seq, one.id, one.type, one.thread_id, one.body) for one in stored]
        if sum(len(one.body) for one in stored) <= INLINE_BYTES:
            message = _Message("e", events=rows, last=stored[-1].seq)
        else:
            message = _Message("n", last=stored[-1].seq)
        await self._tell(session, message)

    async def preview(
        self, session: str, deltas: Iterable[Delta], *, thread_id: str | None = None, to: str = ""
    ) -> None:
        """Show pieces of the message in flight; `to` names the late joiner that asked for them."""
        packed = [(thread_id, one.event_id, one.type, one.text, one.offset, one.start) for one in deltas]
        await self._tell(session, _Message("s" if to else "p", deltas=packed, to=to))

    async def _tell(self, session: str, message: _Message) -> None:
        try:
            await self._channels.publish(channel(session), _ENCODER.encode(message))
        except StorageUnavailable:
            self.unpublished += 1

    # Reading ----------------------------------------------------------------------------------------------------------

    async def last_seq(self, principal: Principal, session: str) -> int:
        """The number of the newest event, 0 if there is none. Raises NotFound."""
        async with self._db.read() as tx:
            query = sa.select(sessions.c.last_seq).where(owned(principal, sessions), sessions.c.id == session)
            found = (await tx.execute(query)).scalar()
        if found is None:
            raise NotFound(f"there is no session {session}")
        return int(found)

    async def read(
        self,
        principal: Principal,
        session: str,
        *,
        after: int = 0,
        before: int | None = None,
        types: Sequence[str] = (),
        thread_id: str | None = None,
        newest_first: bool = False,
        limit: int = PAGE,
        between: dict[str, datetime] | None = None,
    ) -> list[Stored]:
        """Events with `after` < seq (< `before`), at most `limit`. `thread_id` None: the session's own stream.

        `between`: bounds of the time, by `gt`, `gte`, `lt`, `lte`.
        """
        table = session_events
        query = sa.select(
            table.c.seq, table.c.id, table.c.type, table.c.thread_id, table.c.body, table.c.processed_at
        ).where(owned(principal, table), table.c.session_id == session, table.c.seq > after)
        query = query.where(table.c.thread_id.is_(None) if thread_id is None else table.c.thread_id == thread_id)
        if before is not None:
            query = query.where(table.c.seq < before)
        if types:
            query = query.where(table.c.type.in_(list(types)))
        for bound, at in (between or {}).items():
            query = query.where(_COMPARE[bound](table.c.processed_at, at))
        query = query.order_by(table.c.seq.desc() if newest_first else table.c.seq).limit(limit)
        async with self._db.read() as tx:
            rows = (await tx.execute(query)).all()
        return [Stored(row.seq, row.id, row.type, row.thread_id, _whole(row.body, row.processed_at)) for row in rows]

    async def stream(
        self,
        principal: Principal,
        session: str,
        *,
        after: int | None = None,
        previews: bool = False,
        thread_id: str | None = None,
    ) -> AsyncIterator[Opened | Stored | Preview]:
        """Events after `after` (None: from now on), then live ones, without gap or repetition, until the session is deleted.

        The first item is `Opened`: from then on nothing is missed. Raises NotFound and InvalidRequest (for a number
        from the future) before it; SlowReader when the reader is too far behind.
        """
        opened = False
        while True:
            async with self._listening(session) as subscription:
                try:
                    head = await self.last_seq(principal, session)
                except NotFound:
                    if opened:
                        return
                    raise
                if after is None:
                    after = head
                if after > head:
                    raise InvalidRequest(f"is from the future: the newest event is {head}", field="after")
                if not opened:
                    opened = True
                    yield Opened(head)
                merge = _Merge(self, principal, session, after, thread_id, previews=previews)
                async for item in merge.catch_up(head):
                    yield item
                if previews:
                    await self._ask(session, merge.nonce)
                async for item in merge.follow(subscription):
                    yield item
                if merge.over:
                    return
                if subscription is not None and subscription.ended is Ended.LAGGED:
                    raise SlowReader
                after = merge.seen

    @asynccontextmanager
    async def _listening(self, session: str) -> AsyncIterator[Subscription | None]:
        """What is published of a session; None while the shared state is away: then the database is looked into."""
        async with AsyncExitStack() as stack:
            subscription: Subscription | None = None
            try:
                subscription = await stack.enter_async_context(
                    self._channels.subscribe(channel(session), buffer=BUFFER)
                )
            except StorageUnavailable as error:
                log.warning("stream.polls", session=session, cause=error.message)
            yield subscription

    async def _ask(self, session: str, nonce: str) -> None:
        try:
            await self._channels.publish(asks_channel(session), nonce.encode())
        except StorageUnavailable:
            self.unpublished += 1

    def told(self, raw: bytes) -> _Told:
        """Decode a message. All streams of a session are given the same bytes one after the other."""
        last = self._told
        if last is None or last.raw is not raw:
            message = _DECODER.decode(raw)
            last = self._told = _Told(raw, message, tuple(Stored(*row) for row in message.events))
        return last

    async def wait(self) -> None:
        """Until a stream that hears nothing looks again."""
        await self._clock.sleep(POLL_SECONDS)

    def nonce(self) -> str:
        """Names one reader while it asks for previews."""
        return self._ids.new("ask")


class _Merge:
    """One reader's place in a session's events."""

    def __init__(
        self,
        events: EventLog,
        principal: Principal,
        session: str,
        after: int,
        thread_id: str | None,
        *,
        previews: bool,
    ) -> None:
        self.seen = after
        self.over = False
        self.nonce = events.nonce() if previews else ""
        self._log = events
        self._principal = principal
        self._session = session
        self._thread = thread_id
        self._previews = previews
        self._shown: dict[str, int] = {}  # previewed event -> characters that this reader has

    async def catch_up(self, head: int) -> AsyncIterator[Stored | Preview]:
        """What is stored up to `head` and not seen yet."""
        while self.seen < head:
            page = await self._log.read(
                self._principal,
                self._session,
                after=self.seen,
                before=head + 1,
                thread_id=self._thread,
            )
            for one in page:
                for item in self._event(one):
                    yield item
            if len(page) < PAGE:
                self.seen = head  # what is left belongs to other threads

    async def follow(self, subscription: Subscription | None) -> AsyncIterator[Stored | Preview]:
        """Live messages until the subscription ends or the session is deleted; without one, a short wait."""
        if subscription is None:
            await self._log.wait()
            return
        with _Listening(subscription) as listening:
            async for raw in subscription:
                listening.heard()
                async for item in self._heard(raw):
                    yield item
                if self.over:
                    return

    async def _heard(self, raw: bytes) -> AsyncIterator[Stored | Preview]:
        if raw == _SILENCE:  # was a message lost?
            head = await self._head()
            if head is not None:
                async for item in self.catch_up(head):
                    yield item
            return
        told = self._log.told(raw)
        message = told.message
        if message.kind in "ps":
            for preview in self._preview(message):
                yield preview
            return
        first = told.events[0].seq if told.events else message.last + 1
        if self.seen < first - 1:
            # Something before this batch was lost, or the batch is too large for the channel.
            async for item in self.catch_up(first - 1):
                yield item
        for one in told.events:
            for item in self._event(one):
                yield item

    async def _head(self) -> int | None:
        try:
            return await self._log.last_seq(self._principal, self._session)
        except NotFound:
            self.over = True
            return None

    def _event(self, one: Stored) -> Iterable[Stored | Preview]:
        if one.seq <= self.seen:
            return
        self.seen = one.seq
        if one.thread_id == self._thread:
            if self._previews and one.type == "agent.message":
                yield from self._rest_of(one)
            yield one
        if one.type == "session.deleted":
            self.over = True

    def _rest_of(self, one: Stored) -> Iterable[Preview]:
        """What the reader has missed of the message's previews: joined, they are always the whole text."""
        had = self._shown.pop(one.id, None)
        text = "".join(str(block.get("text", "")) for block in one.json().get("content", ()))
        if had is None:
            yield Preview(self._thread, Delta(one.id, one.type, start=True))
        if len(text) > (had or 0):
            yield Preview(self._thread, Delta(one.id, one.type, text[had or 0 :], had or 0))

    def _preview(self, message: _Message) -> Iterable[Preview]:
        if not self._previews or (message.kind == "s" and message.to != self.nonce):
            return
        for thread, event_id, kind, text, offset, start in message.deltas:
            if thread != self._thread:
                continue
            if start and event_id not in self._shown:
                self._shown[event_id] = 0
                yield Preview(thread, Delta(event_id, kind, start=True))
            had = self._shown.get(event_id)
            # Pieces of a message whose start this reader does not know follow the answer to its question.
            if had is None or not text or offset > had or offset + len(text) <= had:
                continue
            self._shown[event_id] = offset + len(text)
            yield Preview(thread, Delta(event_id, kind, text[had - offset :], had))


_SILENCE: Final = b""
"""Stands in a subscription for having heard nothing for long."""


class _Listening:
    """Puts `_SILENCE` into a subscription that is given nothing for `SILENCE_SECONDS`.

    One timer, moved when it fires and not with every message: a timer for each message of each reader costs more than
    the message.
    """

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.heard_at = self._loop.time()

    def __enter__(self) -> Self:
        self._timer = self._loop.call_at(self.heard_at + SILENCE_SECONDS, self._look)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def heard(self) -> None:
        self.heard_at = self._loop.time()

    def _look(self) -> None:
        now = self._loop.time()
        if now - self.heard_at >= SILENCE_SECONDS:
            self._subscription.offer(_SILENCE)
            self.heard_at = now
        self._timer = self._loop.call_at(self.heard_at + SILENCE_SECONDS, self._look)


_COMPARE: Final = {
    "gt": lambda column, at: column > at,
    "gte": lambda column, at: column >= at,
    "lt": lambda column, at: column < at,
    "lte": lambda column, at: column <= at,
}


@functools.lru_cache(maxsize=1024)
def _taking_numbers(
    principal: Principal, fenced: bool, unmoved: bool, columns: tuple[str, ...]
) -> ReturningUpdate[tuple[int, int]]:
    """Gives a session's next events their numbers, and columns of its row their new values.

    Kept: SQLAlchemy takes longer to make it and to recognise it than SQLite to run it.
    """
    table, given = sessions, sa.bindparam
    where = [owned(principal, table), table.c.id == given("b_session")]
    if fenced:
        where.append(table.c.fence == given("b_fence"))
    if unmoved:
        where += [table.c.last_seq == given("b_seq"), table.c.version == given("b_version")]
    values = {
        "last_seq": table.c.last_seq + given("b_more"),
        "version": table.c.version + given("b_moves"),
        "updated_at": given("b_now"),
        **{name: given(f"b_new_{name}") for name in columns},
    }
    return sa.update(table).where(*where).values(values).returning(table.c.last_seq, table.c.version)


def _stored(row: dict[str, Any]) -> Stored:
    return Stored(row["seq"], row["id"], row["type"], row["thread_id"], _whole(row["body"], row["processed_at"]))


def _whole(body: bytes, processed: datetime | None) -> bytes:
    """The event with its `processed_at`, which is the only part of it that changes after it was written."""
    at = b"null" if processed is None else b'"' + rfc3339(processed).encode() + b'"'
    return bytes(body[:-1]) + b',"processed_at":' + at + b"}"


def rfc3339(at: datetime) -> str:
    """A time as the API writes it."""
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class InFlight:
    """The previews of the messages in flight, kept by the writer for those who join late."""

    def __init__(self, events: EventLog, session: str) -> None:
        self._events = events
        self._session = session
        self._texts: dict[str, tuple[str | None, str, list[str]]] = {}

    async def show(self, deltas: Sequence[Delta], *, thread_id: str | None = None) -> None:
        """Publish and remember."""
        for one in deltas:
            if one.start:
                self._texts[one.event_id] = (thread_id, one.type, [])
            if one.text and one.event_id in self._texts:
                self._texts[one.event_id][2].append(one.text)
        if deltas:
            await self._events.preview(self._session, deltas, thread_id=thread_id)

    def done(self, event_ids: Iterable[str]) -> None:
        """These were written; their previews are history."""
        for event_id in event_ids:
            self._texts.pop(event_id, None)

    def clear(self) -> None:
        """The model request is over: what was not written never will be."""
        self._texts.clear()

    async def answer(self, nonce: str) -> None:
        """Tell one late joiner what there is."""
        for event_id, (thread, kind, texts) in list(self._texts.items()):
            deltas = [Delta(event_id, kind, "".join(texts), 0, start=True)]
            await self._events.preview(self._session, deltas, thread_id=thread, to=nonce)


@asynccontextmanager
async def answering(channels: Channels, inflight: InFlight, session: str) -> AsyncIterator[None]:
    """While the block runs, late joiners get the previews that they ask for; none while the shared state is away."""
    async with AsyncExitStack() as stack:
        try:
            asks = await stack.enter_async_context(channels.subscribe(asks_channel(session), buffer=BUFFER))
        except StorageUnavailable as error:
            log.warning("previews.not_shared", session=session, cause=error.message)
            yield
            return

        async def run() -> None:
            async for nonce in asks:
                await inflight.answer(nonce.decode())

        task = asyncio.create_task(run(), name=f"previews {session}")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
