"""How a conversation comes back to a server that has no process of it: what is resumed, what is told.

With `--resume` where the CLI's transcript holds exactly what the database holds, else with the files and the history
from the database. What was lost on the way is told to the client; an empty workspace is never silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import LeaseLost, NotFound, SnapshotCorrupted, StorageUnavailable, WrapperError
from claude_wrapper.sessions import records
from claude_wrapper.sessions.askers import acting
from claude_wrapper.sessions.clitranscripts import has_transcript
from claude_wrapper.sessions.journal import Books, SessionJournal
from claude_wrapper.sessions.keeper import Keepable
from claude_wrapper.sessions.process import Resume
from claude_wrapper.sessions.snapshots import Restored, Snapshot, SnapshotStore
from claude_wrapper.sessions.spec import TurnInput
from claude_wrapper.wire.managed import error_event

log = structlog.get_logger(__name__)

KEPT_SECONDS: Final = 20.0
"""How long the files of a process that is ending are waited for."""
_TRANSCRIPT_LOST: Final = "The process's transcript is gone: the conversation goes on from the session's own record."
_REPLAYED: Final = 3
"""After the past of a turn that goes on: the user's message, the model's that is said again, and the results it has."""

Seen = Callable[[str, float, int], None]
"""A restore ended: (outcome, seconds, bytes)."""


class Restorer:
    """Finds what a new process of a conversation is to be started with."""

    def __init__(
        self, books: Books, store: SnapshotStore, kept_dir: Path, *, cli_version: Callable[[], str], seen: Seen
    ) -> None:
        """`cli_version` is asked in a thread."""
        self._books = books
        self._store = store
        self._kept_dir = kept_dir
        self._cli_version = cli_version
        self._seen = seen

    async def checked(self, conversation: Keepable, resume: Resume, line: str | None) -> Resume:
        """The files that this server has kept: is the transcript there, as far as it must be (up to this `line`)?"""
        if not resume.uuid:
            return resume
        try:
            async with asyncio.timeout(KEPT_SECONDS):
                await resume.ready.wait()
        except TimeoutError:
            return resume  # the start waits too, and says what is wrong
        home = resume.kept / "home"
        if await asyncio.to_thread(has_transcript, home, resume.uuid, last=line):
            return resume
        if not await asyncio.to_thread(has_transcript, home, resume.uuid):
            log.warning("transcript.lost", session=conversation.session, uuid=resume.uuid)
            await tell(self._books, conversation, _TRANSCRIPT_LOST)
        else:
            # The process died before it had written its last lines: the session's own record has them.
            log.info("transcript.short", session=conversation.session, uuid=resume.uuid)
        return replace(resume, uuid="")

    async def restore(self, conversation: Keepable, turn_input: TurnInput) -> Resume | None:
        """The workspace from the snapshot; the transcript too where it can be resumed. Raises StorageUnavailable."""
        clock, session = self._books.clock, conversation.session
        into = self._kept_dir / self._books.ids.new("kept")
        began = clock.monotonic()
        try:
            restored = await self._store.restore(
                conversation.owner.org, session, into, guard=lambda tx: still_held(tx, conversation)
            )
        except SnapshotCorrupted as error:
            self._seen("error", clock.monotonic() - began, 0)
            log.error("snapshot.lost", session=session, reason=error.message)  # noqa: TRY400 - it says all there is
            await tell(
                self._books,
                conversation,
                f"The files of this session cannot be read back: {error.message}. It goes on with an empty workspace.",
            )
            return None
        except WrapperError:
            self._seen("error", clock.monotonic() - began, 0)
            raise
        seconds = clock.monotonic() - began
        past = len(turn_input.history if turn_input.past is None else turn_input.past)
        if restored is None:
            self._seen("none", seconds, 0)
            if await self._ran_tools(conversation, None):
                await tell(
                    self._books,
                    conversation,
                    "No files of this session were stored before its server stopped: it goes on with an empty workspace.",
                )
            return None
        self._seen("previous" if restored.fell_back else "ok", seconds, restored.snapshot.bytes_logical)
        replayed = [str(block.get("id")) for block in turn_input.replay or () if block.get("type") == "tool_use"]
        if replayed and await self._ran_tools(conversation, replayed):
            return await self._come_back(conversation, restored, past, past + _REPLAYED)
        return await self._come_back(conversation, restored, past, past)

    async def _come_back(self, conversation: Keepable, restored: Restored, past: int, ran: int) -> Resume:
        """`ran`: how many messages there were when the last tool ran."""
        snapshot = restored.snapshot
        for told in differences(restored, ran):
            await tell(self._books, conversation, told)
        version = await asyncio.to_thread(self._cli_version)
        uuid = restored.cli_uuid if resumable(snapshot, past, version) else ""
        if uuid and not await asyncio.to_thread(has_transcript, restored.home, uuid):
            log.warning("transcript.lost", session=conversation.session, uuid=uuid)
            await tell(self._books, conversation, _TRANSCRIPT_LOST)
            uuid = ""
        log.info(
            "snapshot.restored",
            session=conversation.session,
            snapshot=snapshot.id,
            resumed=bool(uuid),
            cli_version=snapshot.cli_version,
            bytes=snapshot.bytes_logical,
        )
        resume = Resume(uuid, restored.home.parent)
        resume.ready.set()
        return resume

    async def _ran_tools(self, conversation: Keepable, among: Sequence[str] | None) -> bool:
        """Whether the agent has run a tool of its own, `among` these calls if given, so that it may have had files."""
        principal = acting(conversation.owner)

        async def read(tx: AsyncConnection) -> bool:
            calls = await records.calls_of(tx, principal, conversation.session)
            return any(
                call.kind not in records.CLIENT_KINDS
                and "output" in (call.answer or {})
                and (among is None or call.tool_use_id in among)
                for call in calls
            )

        return await self._books.db.query(read)


async def tell(books: Books, conversation: Keepable, message: str, retry: str = "exhausted") -> None:
    """A `session.error` in the log; the turn goes on. The log of a session that is over stays as it is."""
    journal = conversation.journal
    if not isinstance(journal, SessionJournal):
        return
    principal = acting(conversation.owner)
    event: dict[str, Any] = {"type": "session.error", "error": dict(error_event("unknown_error", message, retry))}
    try:
        async with books.db.transaction() as tx:
            present = await records.get_held(tx, principal, conversation.session, journal.fence)
            if present.ended:
                return
            stored = await books.log.write(tx, principal, conversation.session, [event])
        await books.log.publish(conversation.session, stored)
    except (NotFound, LeaseLost, StorageUnavailable) as error:
        log.warning("session.not_told", session=conversation.session, message=message, reason=error.message)


def durable(conversation: Keepable) -> bool:
    """Whether it has a session in the database."""
    return isinstance(conversation.journal, SessionJournal)


def resumable(snapshot: Snapshot, past: int, cli_version: str) -> bool:
    """Whether the CLI may go on from the snapshot's transcript: it was exact, nothing was said since, and the CLI that
    wrote it is the one that will read it (what another version makes of it is nobody's promise)."""
    same_place = snapshot.position.exact and snapshot.position.messages == past
    return same_place and bool(snapshot.cli_uuid) and snapshot.cli_version == cli_version


def differences(restored: Restored, messages: int) -> list[str]:
    """What the client must know about the files that came back, after so many messages."""
    told: list[str] = []
    if restored.fell_back:
        told.append(f"The last snapshot of the files is damaged; the one before it is used: {restored.damage}")
    if restored.snapshot.position.messages < messages:
        told.append(
            f"The files are those of message {restored.snapshot.position.messages} of {messages}: later changes were not "
            "stored before the server stopped."
        )
    if restored.snapshot.torn:
        names = ", ".join(one.path.decode(errors="replace") for one in restored.snapshot.torn[:20])
        told.append(f"These files were being written when the snapshot was taken and may be incomplete: {names}")
    return told


async def still_held(tx: AsyncConnection, conversation: Keepable) -> None:
    """Raises NotFound for a deleted session, LeaseLost for one that another replica holds."""
    journal = conversation.journal
    if not isinstance(journal, SessionJournal):
        raise NotFound(f"there is no session {conversation.session}")
    await records.guard(tx, acting(conversation.owner), conversation.session, journal.fence)
