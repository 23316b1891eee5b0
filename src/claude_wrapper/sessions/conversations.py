"""All conversations of this server: found by name, by id, or by what their caller already knows of them.

An ordinary Messages client keeps no state on the server: it sends the whole history with every request. So a settled
conversation is indexed by the hash of its history, salted with its owner: the request that continues it lands on the
warm process that already holds it. Two requests that continue the same history at once are two conversations: the first
takes the process, the second gets the history injected into another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import structlog

from claude_wrapper.errors import Conflict, InvalidRequest, NotFound, WrapperError
from claude_wrapper.ids import SESSION, well_formed
from claude_wrapper.pool.slot import Reason
from claude_wrapper.sessions import slotfiles
from claude_wrapper.sessions.conversation import Conversation
from claude_wrapper.sessions.leg import Leg
from claude_wrapper.sessions.process import Resume, SlotProcess
from claude_wrapper.sessions.rooms import Rooms
from claude_wrapper.sessions.spec import Message, Owner, TurnInput
from claude_wrapper.wire.history import HistoryHash, history_key

_KEPT_SECONDS: Final = 60.0

log = structlog.get_logger(__name__)


class Conversations:
    """The registry. One instance per server; every look-up takes the owner."""

    def __init__(
        self,
        rooms: Rooms,
        *,
        kept_dir: Path,
        forget_after_seconds: float,
        forget_held_after_seconds: float,
        forget_stored_after_seconds: float | None = None,
    ) -> None:
        """The times are seconds without a turn: of one whose caller sends the history again, of one that this server
        holds the history of, and of one without a process that can be had back from the database and its snapshot."""
        self.on_named: Callable[[Conversation, str], None] = lambda _conversation, _name: None
        """Called for each conversation that a caller names for the first time."""
        self.on_forgotten: Callable[[Conversation], None] = lambda _conversation: None
        """Called with each conversation that is not held here any more."""
        self._rooms = rooms
        self._kept_dir = kept_dir
        self._forget_after = forget_after_seconds
        self._forget_held_after = forget_held_after_seconds
        self._forget_stored_after = forget_stored_after_seconds
        self._by_session: dict[str, Conversation] = {}
        self._by_name: dict[tuple[Owner, str], Conversation] = {}
        self._by_history: dict[str, deque[Conversation]] = {}
        self._indexed: dict[str, str] = {}
        self._by_message: dict[str, Conversation] = {}
        self._message_ids: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self._by_session)

    def by_state(self) -> dict[str, int]:
        """How many run a turn, have an idle process, have none."""
        counts = {"running": 0, "idle": 0, "hibernated": 0}
        for one in self._by_session.values():
            counts["running" if one.busy else "idle" if one.process is not None else "hibernated"] += 1
        return counts

    # Finding ----------------------------------------------------------------------------------------------------------

    def submit(self, owner: Owner, turn_input: TurnInput, *, name: str | None = None) -> tuple[Conversation, Leg]:
        """Run a turn of the conversation that its history (or `name`) belongs to.

        Raises NotFound for a session id of somebody else, InvalidRequest for messages that do not continue it.
        """
        history: Sequence[Message] = turn_input.history
        results = tool_results(turn_input.content)
        conversation = self._named(owner, name) if name else self._continued(owner, history, results)
        if name:
            conversation.keyed = None
            history = self._known_history(conversation, owner, turn_input, history)
        return conversation, self._run(conversation, replace(turn_input, history=history), results)

    def _run(self, conversation: Conversation, turn_input: TurnInput, results: Sequence[dict[str, Any]]) -> Leg:
        self._unindex(conversation)
        if results and conversation.awaiting_tools:
            return self._answer(conversation, turn_input, results)
        return conversation.submit(turn_input)

    # Threads (beta `message-threads`): the server holds the history under the id of the last message -------------------

    def create_thread(self, owner: Owner, turn_input: TurnInput, fields: Mapping[str, Any]) -> tuple[Conversation, Leg]:
        """A conversation that is continued by message id; `fields` are what its continuations do not repeat."""
        conversation = self._new(owner, held=True)
        conversation.thread_fields = dict(fields)
        return conversation, self._run(conversation, turn_input, ())

    def thread(self, owner: Owner, previous_message_id: str) -> Conversation:
        """The thread whose last answer was this message.

        Raises NotFound or InvalidRequest with the API's own `error_code`, after which the SDK sends the whole history.
        """
        conversation = self._by_message.get(previous_message_id)
        if conversation is None or conversation.owner != owner:
            raise NotFound(
                f"there is no thread with the message {previous_message_id}", details={"error_code": "thread_not_found"}
            )
        if conversation.head != previous_message_id:
            raise InvalidRequest(
                "the thread was continued after this message already",
                field="thread.previous_message_id",
                details={"error_code": "thread_already_continued"},
            )
        if conversation.busy and not conversation.awaiting_tools:
            raise InvalidRequest(
                "another request is continuing this thread",
                field="thread.previous_message_id",
                details={"error_code": "thread_continue_in_flight"},
            )
        return conversation

    def continue_thread(self, conversation: Conversation, turn_input: TurnInput) -> Leg:
        """The next turn of a thread; `turn_input.history` is what the thread holds."""
        return self._run(conversation, turn_input, tool_results(turn_input.content))

    def get(self, owner: Owner, session: str) -> Conversation:
        """The owner's conversation. Raises NotFound, also for somebody else's."""
        conversation = self._by_session.get(session)
        if conversation is None or conversation.owner != owner:
            raise NotFound(f"there is no session {session}")
        return conversation

    def find(self, session: str) -> Conversation | None:
        """The conversation with this id, whoever asks: for the server itself."""
        return self._by_session.get(session)

    def known(self, owner: Owner, name: str) -> bool:
        """Whether this name (or id) is held here."""
        held = self._by_session.get(name) or self._by_name.get((owner, name))
        return held is not None and held.owner == owner

    def restore(self, session: str, owner: Owner, messages: list[Message], *, name: str | None) -> Conversation:
        """A conversation that is not held here any more (or was made elsewhere), with what its caller knows of it."""
        conversation = Conversation(session, owner, self._rooms, held=True, on_settled=self._index)
        conversation.messages = messages
        self._by_session[session] = conversation
        if name is not None:
            self._by_name[owner, name] = conversation
        return conversation

    def _named(self, owner: Owner, name: str) -> Conversation:
        if name.startswith(f"{SESSION}_") and well_formed(name, SESSION):
            return self.get(owner, name)
        conversation = self._by_name.get((owner, name))
        if conversation is None:
            conversation = self._by_name[owner, name] = self._new(owner, held=True)
            self.on_named(conversation, name)
        return conversation

    def _continued(self, owner: Owner, history: Sequence[Message], results: Sequence[Any]) -> Conversation:
        """The idle conversation with exactly this history, else a new one."""
        key = self._key(owner, history) if history else None
        waiting = self._by_history.get(key) if key is not None else None
        conversation = self._free(waiting or (), results) or self._new(owner, held=False)
        conversation.keyed = (len(history), key) if key is not None else None
        return conversation

    @staticmethod
    def _free(waiting: Sequence[Conversation], results: Sequence[Any]) -> Conversation | None:
        """The one that was settled last and may be continued."""
        for conversation in reversed(waiting or ()):
            if conversation.ended or (conversation.awaiting_tools and not results):
                continue  # a parked turn is continued by its tool results only
            return conversation
        return None

    def _known_history(
        self, conversation: Conversation, owner: Owner, turn_input: TurnInput, history: Sequence[Message]
    ) -> Sequence[Message]:
        """A named session takes either the new message alone or the whole history again."""
        known = conversation.messages
        if not history:
            return known
        if not known or self._key(owner, history) == self._key(owner, known):
            return history
        raise InvalidRequest(
            f"the history does not match what session {conversation.session} holds "
            f"({len(known)} messages); send only the new message, or leave session_id out",
            field="messages",
        )

    @staticmethod
    def _answer(conversation: Conversation, turn_input: TurnInput, results: Sequence[dict[str, Any]]) -> Leg:
        pending = conversation.awaiting_tools
        given = {str(block["tool_use_id"]) for block in results}
        if not given <= pending:
            raise InvalidRequest(
                f"unexpected tool_use_id {', '.join(sorted(given - pending))}: no such call is waiting",
                field=f"messages[{len(turn_input.history)}].content",
            )
        if missing := pending - given:
            raise InvalidRequest(
                f"tool_use ids were found without tool_result blocks: {', '.join(sorted(missing))}",
                field=f"messages[{len(turn_input.history)}].content",
            )
        return conversation.answer_tools(turn_input, results)

    def _new(self, owner: Owner, *, held: bool) -> Conversation:
        conversation = Conversation(self._rooms.ids.new(SESSION), owner, self._rooms, held=held, on_settled=self._index)
        self._by_session[conversation.session] = conversation
        return conversation

    # The index by history -----------------------------------------------------------------------------------------------

    @staticmethod
    def _key(owner: Owner, history: Sequence[Message]) -> str:
        return history_key(history, salt=_salt(owner))

    def _index(self, conversation: Conversation) -> None:
        """The conversation settled: it can be found by its history again (a named one is found by name)."""
        self._unindex(conversation)
        head = conversation.head
        if conversation.held and not conversation.ended and head is not None and head not in self._by_message:
            self._by_message[head] = conversation
            self._message_ids.setdefault(conversation.session, []).append(head)
        if conversation.ended or conversation.held or not conversation.messages:
            if not conversation.held and not conversation.busy and not conversation.messages:
                self._forget(conversation)
            return
        count, known = conversation.keyed or (0, None)
        hashed = HistoryHash.resume(known) if known else HistoryHash(_salt(conversation.owner))
        key = hashed.extend(conversation.messages[count:]).key()
        self._by_history.setdefault(key, deque()).append(conversation)
        self._indexed[conversation.session] = key

    def _unindex(self, conversation: Conversation) -> None:
        key = self._indexed.pop(conversation.session, None)
        if key is None:
            return
        waiting = self._by_history[key]
        waiting.remove(conversation)
        if not waiting:
            del self._by_history[key]

    # Losing the process ---------------------------------------------------------------------------------------------------

    async def on_hibernate(self, session: str, slot: str, process: SlotProcess, reason: Reason) -> Resume | None:
        """The pool takes the process of an idle conversation: keep what the conversation needs to continue."""
        del slot, reason
        conversation = self._by_session.get(session)
        if conversation is None:
            return None
        conversation.process = None
        conversation.hang_up()
        if process.profile.tools != () and process.agent.session_uuid is not None:
            # Its workspace and the CLI's own transcript are the conversation: both are kept for --resume.
            conversation.resume = process.keep(self._kept_dir / process.slot)
            self._rooms.keeper.left(conversation, process)
        elif not conversation.held and not conversation.busy:
            # A stateless client sends the history again, and a spare takes it from there.
            self._forget(conversation)
        return conversation.resume

    def on_lost(self, session: str, slot: str) -> None:
        """An idle conversation's process died by itself: the next turn gets the history injected into another one."""
        conversation = self._by_session.get(session)
        log.warning("process.lost", session=session, slot=slot)
        if conversation is not None and conversation.process is not None:
            conversation.lose(conversation.process)

    async def end(self, owner: Owner, session: str) -> None:
        """Forget a conversation and give its process back."""
        conversation = self.get(owner, session)
        self._forget(conversation)
        await self._rooms.pool.end_session(session)

    def at_rest(self) -> list[Conversation]:
        """Conversations that run no turn and have no files here."""
        return [
            one
            for one in self._by_session.values()
            if not one.busy and one.resume is None and (one.process is None or one.process.profile.tools == ())
        ]

    def let_go(self, conversation: Conversation) -> None:
        """Forget a conversation that can be had back from the database, and give its process back."""
        self._forget(conversation)
        self._rooms.spawn(self._rooms.pool.end_session(conversation.session))

    def drop(self, conversation: Conversation) -> None:
        """Another replica holds this conversation now: its turn is stopped and its process thrown away."""
        if conversation.process is not None:
            conversation.process.primed = False  # what cannot be rewound is stopped
        self._forget(conversation)
        self._rooms.spawn(self._stop(conversation))

    async def _stop(self, conversation: Conversation) -> None:
        with contextlib.suppress(WrapperError):
            await conversation.suspend()
        await self._rooms.pool.end_session(conversation.session)

    async def sweep(self) -> int:
        """Forget conversations that nobody continued for long. Returns how many."""
        now = self._rooms.clock.monotonic()
        stale = [
            one for one in self._by_session.values() if not one.busy and now - one.last_used >= self._forget_at(one)
        ]
        for conversation in stale:
            self._forget(conversation)
            await self._rooms.pool.end_session(conversation.session)
        return len(stale)

    def _forget_at(self, conversation: Conversation) -> float:
        """After how many seconds without a turn."""
        if self._rooms.keeper.unsaved(conversation):
            return math.inf
        if not conversation.held:
            return self._forget_after
        stored = self._forget_stored_after
        if stored is not None and conversation.process is None and self._rooms.keeper.may_forget(conversation):
            return min(stored, self._forget_held_after)
        return self._forget_held_after

    async def erase(self, org: str) -> int:
        """Forget all conversations of an organisation; their processes are stopped and their workspaces removed.

        How many there were. Raises Conflict while a turn of it still runs: call it again.
        """
        mine = [one for one in self._by_session.values() if one.owner.org == org]
        for conversation in mine:
            resume, conversation.resume = conversation.resume, None
            if conversation.process is not None:
                conversation.process.primed = False  # what cannot be rewound is stopped and its directories go
            self._forget(conversation)
            await self._rooms.pool.end_session(conversation.session)
            if resume is not None:
                await _remove(resume)
        sessions = {one.session for one in mine}
        deadline = self._rooms.clock.monotonic() + _KEPT_SECONDS / 4
        while any(slot.session in sessions for slot in self._rooms.pool.stats().slots):
            if self._rooms.clock.monotonic() >= deadline:
                raise Conflict("a turn of this organisation is still running; repeat the request when it has ended")
            await self._rooms.clock.sleep(0.05)
        return len(mine)

    def _forget(self, conversation: Conversation) -> None:
        self._unindex(conversation)
        conversation.hang_up()
        self._rooms.keeper.forget(conversation)
        if not conversation.ended:
            conversation.ended = True
            self.on_forgotten(conversation)
        for message_id in self._message_ids.pop(conversation.session, ()):
            self._by_message.pop(message_id, None)
        self._by_session.pop(conversation.session, None)
        for key in [key for key, one in self._by_name.items() if one is conversation]:
            del self._by_name[key]
        if conversation.resume is not None:
            resume, conversation.resume = conversation.resume, None
            self._rooms.spawn(_remove(resume))


def _salt(owner: Owner) -> str:
    return f"{owner.org}/{owner.principal}"


def tool_results(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return []
    return [block for block in content if block.get("type") == "tool_result"]


async def _remove(resume: Resume) -> None:
    with contextlib.suppress(TimeoutError, FileNotFoundError):
        async with asyncio.timeout(_KEPT_SECONDS):
            await resume.ready.wait()  # the files are moved there when the process has ended
        await asyncio.to_thread(slotfiles.discard, resume.kept)
