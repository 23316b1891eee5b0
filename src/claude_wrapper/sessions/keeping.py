"""Snapshots of live conversations: when they are taken, when they are given up, and how a conversation comes back.

After each turn the CLI's transcript and the workspace are saved in the background. A turn that begins gives the save on
its way up: nothing of it becomes current, so what is current was read while no turn ran. A turn that waits for a person or
a client may wait for hours: what it did until then is saved too, and given up when it goes on. Nobody resumes from the
transcript of such a save, which stands in the middle of a turn. A process that goes leaves its files to a last save. How a
conversation comes back: `restoring`.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.errors import (
    Conflict,
    LeaseLost,
    NotFound,
    RequestTooLarge,
    StorageUnavailable,
    WrapperError,
)
from claude_wrapper.sessions import records
from claude_wrapper.sessions.askers import acting
from claude_wrapper.sessions.clitranscripts import has_transcript
from claude_wrapper.sessions.journal import Books
from claude_wrapper.sessions.keeper import Keepable, Keeper
from claude_wrapper.sessions.process import SlotProcess
from claude_wrapper.sessions.restoring import KEPT_SECONDS, Restorer, durable, still_held, tell
from claude_wrapper.sessions.snapshots import Guard, Position, Snapshot, SnapshotStore
from claude_wrapper.sessions.spec import TurnInput

log = structlog.get_logger(__name__)

_CANCEL_SECONDS: Final = 5.0
_FIRST_RETRY: Final = 2.0
_LAST_RETRY: Final = 120.0


class _Moved(StorageUnavailable):
    """A process that went away under the save took its files along."""


class KeepingWatch:
    """What is told to telemetry. This one tells nobody."""

    def saved(self, outcome: str, seconds: float, stored: int) -> None:
        """A save ended: `ok`, `unchanged`, `given_up` (a turn began) or `error`."""

    def restored(self, outcome: str, seconds: float, size: int) -> None:
        """A restore ended: `ok`, `previous` (the last snapshot was damaged), `none` or `error`."""


@dataclass(frozen=True, slots=True)
class KeepingSettings:
    """How snapshots of conversations are taken."""

    parallel: int = 2
    """Saves at once in this server."""
    patience: int = 3
    """After so many saves of a conversation that were given up in a row, its next turn waits for the save."""
    patience_seconds: float = 5.0
    """How long that turn waits at most."""
    waiting_seconds: float = 1.0
    """How long a turn has waited for its client when it is saved: one that is answered at once costs nothing."""
    working_seconds: float = 10.0
    """The same while other tools of the turn run, which may write meanwhile."""


class _Waits(enum.Enum):
    """What a turn does that waits for a person or a client."""

    QUIET = enum.auto()
    WORKING = enum.auto()
    """Other tools of it may be running."""


@dataclass(slots=True)
class _Keeping:
    """One conversation's snapshots, as far as this server knows."""

    conversation: Keepable
    line: str | None = None
    """`uuid` of the last line that the CLI's transcript must have."""
    uuid: str = ""
    changes: int = 0
    """How often something may have changed."""
    stored: int = 0
    """The count of changes that the last snapshot has seen."""
    waits: _Waits | None = None
    """Its turn waits for a person or a client."""
    committing: bool = False
    """Everything was read: the save goes through, whatever begins now."""
    given_up: int = 0
    """Saves in a row."""
    failures: int = 0
    """The same."""
    saving: int = 0
    """Saves on their way: one that was given up may still be ending."""
    refused: bool = False
    """The workspace is larger than may be stored."""
    told: bool = False
    """The client was told that the workspace is not stored."""
    task: asyncio.Task[None] | None = None
    again: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def dirty(self) -> bool:
        """Something may have changed since the last snapshot."""
        return self.changes != self.stored


class SnapshotKeeper(Keeper):
    """Keeps conversations of durable sessions whose processes have tools. One instance per server."""

    def __init__(
        self,
        books: Books,
        store: SnapshotStore,
        kept_dir: Path,
        *,
        cli_version: Callable[[], str],
        watch: KeepingWatch | None = None,
        settings: KeepingSettings | None = None,
    ) -> None:
        """`cli_version` is asked in a thread."""
        self._books = books
        self._store = store
        self._cli_version = cli_version
        self._watch = watch or KeepingWatch()
        self._restorer = Restorer(books, store, kept_dir, cli_version=cli_version, seen=self._watch.restored)
        self._settings = settings or KeepingSettings()
        self._room = asyncio.Semaphore(self._settings.parallel)
        self._sessions: dict[str, _Keeping] = {}
        self._closing = asyncio.Event()

    @property
    def behind(self) -> int:
        """Sessions whose last snapshot is older than their last turn."""
        return sum(one.dirty for one in self._sessions.values())

    # What conversations tell (Keeper) ----------------------------------------------------------------------------------

    async def begin(self, conversation: Keepable) -> None:
        keeping = self._sessions.get(conversation.session)
        if keeping is None:
            return
        task = keeping.task
        if task is None or task.done():
            return
        if keeping.saving and keeping.given_up >= self._settings.patience:
            await asyncio.wait({task}, timeout=self._settings.patience_seconds)
        self._give_up(keeping)

    async def fetch(self, conversation: Keepable, turn_input: TurnInput) -> None:
        if turn_input.spec.profile.tools == ():
            return
        if conversation.resume is not None:
            if turn_input.replay is None:  # else the history is given to it in any case
                keeping = self._sessions.get(conversation.session)
                line = keeping.line if keeping is not None and durable(conversation) else None
                conversation.resume = await self._restorer.checked(conversation, conversation.resume, line)
        elif durable(conversation):
            conversation.resume = await self._restorer.restore(conversation, turn_input)

    def waits(self, conversation: Keepable, *, quiet: bool) -> None:
        process = conversation.process
        if process is None or process.profile.tools == () or conversation.ended or not durable(conversation):
            return
        keeping = self._of(conversation)
        self._give_up(keeping)
        keeping.waits = _Waits.QUIET if quiet else _Waits.WORKING
        if keeping.committing:
            keeping.changes += 1  # what goes through has not seen what is new
        self._start(keeping, self._settings.waiting_seconds if quiet else self._settings.working_seconds)

    def goes_on(self, conversation: Keepable) -> None:
        keeping = self._sessions.get(conversation.session)
        if keeping is not None and keeping.waits is not None:
            keeping.waits = None
            self._give_up(keeping)

    def ended(self, conversation: Keepable) -> None:
        self.goes_on(conversation)
        process = conversation.process
        if process is None and conversation.resume is None:
            # It had no process, or one without files: nothing is owed.
            if (known := self._sessions.get(conversation.session)) is not None:
                known.stored = known.changes
            return
        if conversation.ended or not durable(conversation) or (process is not None and process.profile.tools == ()):
            return
        keeping = self._of(conversation)
        if process is not None:
            keeping.line, keeping.uuid = process.agent.said, process.agent.session_uuid or ""
        self._change(keeping)

    def left(self, conversation: Keepable, process: SlotProcess) -> None:
        keeping = self._sessions.get(conversation.session)
        if keeping is not None:
            keeping.waits = None
            self._give_up(keeping)  # its files are about to be moved
        if process.profile.tools == () or conversation.ended or not durable(conversation):
            return
        keeping = keeping or self._of(conversation)
        keeping.line, keeping.uuid = process.agent.said, process.agent.session_uuid or keeping.uuid
        keeping.changes += 1
        if not conversation.busy:
            self._change(keeping)

    def may_forget(self, conversation: Keepable) -> bool:
        if not durable(conversation):
            return False
        keeping = self._sessions.get(conversation.session)
        return keeping is None or not (keeping.dirty or keeping.refused)

    def unsaved(self, conversation: Keepable) -> bool:
        keeping = self._sessions.get(conversation.session)
        return keeping is not None and keeping.dirty

    def forget(self, conversation: Keepable) -> None:
        keeping = self._sessions.pop(conversation.session, None)
        if keeping is not None:
            self._give_up(keeping)

    # For those who move or end sessions ---------------------------------------------------------------------------------

    async def make_durable(self, conversation: Keepable) -> None:
        """Return when the conversation, which runs no turn, has a snapshot of everything until now.

        Raises StorageUnavailable (or what else the save failed with) when it has not; it is tried again later.
        """
        if not durable(conversation) or (conversation.process is None and conversation.resume is None):
            return
        if conversation.process is not None and conversation.process.profile.tools == ():
            return
        keeping = self._of(conversation)
        if conversation.process is not None:
            keeping.line = conversation.process.agent.said
            keeping.uuid = conversation.process.agent.session_uuid or ""
        self._give_up(keeping)
        keeping.changes += 1
        keeping.task = task = asyncio.get_running_loop().create_task(self._once(keeping))
        await asyncio.wait({task})
        if task.cancelled():
            raise Conflict(f"a turn of session {conversation.session} began before its files were stored")
        if keeping.dirty:
            self._start(keeping)  # it failed, or something changed meanwhile
        if error := task.exception():
            raise error

    async def _once(self, keeping: _Keeping) -> None:
        async with self._room:
            await self._save(keeping)

    async def close(self, seconds: float) -> None:
        """The server stops and its processes have ended: last snapshots, for at most `seconds`."""
        self._closing.set()
        for keeping in self._sessions.values():
            keeping.again.set()
        tasks = {one.task for one in self._sessions.values() if one.task is not None and not one.task.done()}
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        for session, keeping in self._sessions.items():
            if keeping.dirty:
                log.error("snapshot.behind_at_stop", session=session, failures=keeping.failures)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_SECONDS)

    # Saving -----------------------------------------------------------------------------------------------------------

    def _of(self, conversation: Keepable) -> _Keeping:
        keeping = self._sessions.get(conversation.session)
        if keeping is None or keeping.conversation is not conversation:
            keeping = self._sessions[conversation.session] = _Keeping(conversation)
        return keeping

    def _change(self, keeping: _Keeping) -> None:
        keeping.changes += 1
        self._start(keeping)

    def _start(self, keeping: _Keeping, pause: float = 0.0) -> None:
        if keeping.task is None or keeping.task.done():
            name = f"snapshot {keeping.conversation.session}"
            keeping.task = asyncio.get_running_loop().create_task(self._keep(keeping, pause), name=name)

    def _give_up(self, keeping: _Keeping) -> None:
        """Nothing that is being read becomes current; what was read to the end does. Threads may read for a moment yet."""
        if keeping.committing:
            return
        task, keeping.task = keeping.task, None
        if task is None or task.done():
            return
        if keeping.saving:
            keeping.given_up += 1
            self._watch.saved("given_up", 0.0, 0)
        task.cancel()

    async def _keep(self, keeping: _Keeping, pause: float) -> None:
        """Save until that worked, more and more slowly. `pause`: when a turn has waited for so long."""
        if pause:
            await self._books.clock.sleep(pause)
            keeping.changes += 1
        while keeping.dirty:
            keeping.again.clear()
            try:
                await self._once(keeping)
            except WrapperError as error:
                await self._failed(keeping, error)
            except Exception:  # the last resort of a background task
                keeping.failures += 1
                log.exception("snapshot.failed", session=keeping.conversation.session)
            if keeping.dirty and self._closing.is_set() and keeping.failures > 1:
                return
            if keeping.dirty:
                pause = min(_LAST_RETRY, _FIRST_RETRY * 2.0 ** min(keeping.failures - 1, 10))
                await self._wait(pause, keeping.again)

    async def _failed(self, keeping: _Keeping, error: WrapperError) -> None:
        session = keeping.conversation.session
        if isinstance(error, Conflict | NotFound | LeaseLost):
            # Deleted, taken over by another server, or without files: nothing to store from here.
            log.warning("snapshot.dropped", session=session, reason=error.message)
            keeping.stored = keeping.changes
        elif isinstance(error, RequestTooLarge):
            log.warning("snapshot.too_large", session=session, reason=error.message)
            keeping.stored, keeping.refused = keeping.changes, True
            await self._tell_once(keeping, f"The workspace is not stored: {error.message}")
        else:
            keeping.failures += 1
            log.warning("snapshot.behind", session=session, failures=keeping.failures, reason=error.message)
            if not isinstance(error, _Moved):  # it is tried again where they are now: nobody needs to hear of it
                await self._tell_once(keeping, f"The workspace is not stored yet: {error.message}", "retrying")

    async def _wait(self, seconds: float, again: asyncio.Event) -> None:
        waiting = {asyncio.ensure_future(self._books.clock.sleep(seconds)), asyncio.ensure_future(again.wait())}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()

    async def _version_of(self, conversation: Keepable) -> str:
        """Whose transcript it is. A canary's is only files and history for every other process, and for a later canary."""
        version = await asyncio.to_thread(self._cli_version)
        return f"{version} canary" if conversation.cli else version

    async def _save(self, keeping: _Keeping) -> None:
        conversation, clock = keeping.conversation, self._books.clock
        began = clock.monotonic()
        keeping.saving += 1
        changes = keeping.changes
        try:
            home, work = await _files(conversation)
            position = await self._position(keeping, home)
            saved = await self._store.save(
                conversation.owner.org,
                conversation.session,
                home,
                work,
                cli_uuid=keeping.uuid,
                cli_version=await self._version_of(conversation),
                position=position,
                guard=self._guard(keeping, home),
            )
        except WrapperError:
            self._watch.saved("error", clock.monotonic() - began, 0)
            raise
        finally:
            keeping.saving -= 1
            keeping.committing = False
        keeping.stored, keeping.refused = changes, False
        keeping.given_up = keeping.failures = 0
        seconds = clock.monotonic() - began
        self._watch.saved("unchanged" if saved.unchanged else "ok", seconds, saved.bytes_written)
        log.info("snapshot.saved", session=conversation.session, **_told(saved), seconds=round(seconds, 3))

    async def _position(self, keeping: _Keeping, home: Path) -> Position:
        """How far the conversation is, and whether the CLI's transcript is exactly there."""
        conversation = keeping.conversation
        principal = acting(conversation.owner)

        async def read(tx: AsyncConnection) -> tuple[int, bool]:
            return await records.last_message(tx, principal, conversation.session)

        waits = keeping.waits
        messages, answered = await self._books.db.query(read)
        if waits is _Waits.WORKING:  # the results of the last model message are not all in the files
            return Position(messages - (1 if answered else 2), exact=False)
        if waits is _Waits.QUIET:
            return Position(messages, exact=False)
        exact = answered and bool(keeping.uuid) and keeping.line is not None
        if exact:
            exact = await asyncio.to_thread(has_transcript, home, keeping.uuid, last=keeping.line)
        return Position(messages, exact)

    def _guard(self, keeping: _Keeping, home: Path) -> Guard:
        """A session that was deleted, or that another replica holds by now, gets no snapshot from here."""
        conversation = keeping.conversation

        async def guard(tx: AsyncConnection) -> None:
            keeping.committing = True
            await still_held(tx, conversation)
            if not await asyncio.to_thread(home.exists):
                raise _Moved(f"the files of session {conversation.session} moved while they were saved")

        return guard

    async def _tell_once(self, keeping: _Keeping, message: str, retry: str = "exhausted") -> None:
        if not keeping.told:
            await tell(self._books, keeping.conversation, message, retry)
            keeping.told = True


async def _files(conversation: Keepable) -> tuple[Path, Path]:
    """Home and workspace. Raises NotFound when there are none, StorageUnavailable when they do not come."""
    process, resume = conversation.process, conversation.resume
    if process is not None:
        return process.dirs.home, process.dirs.work
    if resume is None:
        raise NotFound(f"session {conversation.session} has no files here")
    try:
        async with asyncio.timeout(KEPT_SECONDS):
            await resume.ready.wait()
    except TimeoutError:
        raise StorageUnavailable("the session's process has not ended yet: its files are not there") from None
    return resume.kept / "home", resume.kept / "work"


def _told(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "snapshot": snapshot.id,
        "bytes": snapshot.bytes_logical,
        "written": snapshot.bytes_written,
        "entries": snapshot.entries,
        "messages": snapshot.position.messages,
        "exact": snapshot.position.exact,
        "torn": len(snapshot.torn),
        "skipped": snapshot.skipped_count,
    }
