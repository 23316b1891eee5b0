"""One conversation, two doors: `/v1/sessions` and `/v1/messages` with a `session_id` reach the same one.

A conversation lives in the memory of a replica and its session in the database. Here they meet: a conversation that is
asked for is restored from its transcript if this replica does not hold it, and one that the Messages door makes gets a
session, so that it can be listed, streamed and continued through the other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Mapping
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.broker.calls import Credential, CredentialKind
from claude_wrapper.errors import LeaseLost, NotFound
from claude_wrapper.ids import SESSION, well_formed
from claude_wrapper.sandbox.security import SecurityPolicy
from claude_wrapper.sessions import records
from claude_wrapper.sessions.agentspec import Setup, policy_of, setup
from claude_wrapper.sessions.askers import acting
from claude_wrapper.sessions.conversation import Conversation
from claude_wrapper.sessions.conversations import Conversations
from claude_wrapper.sessions.journal import Books, SessionJournal
from claude_wrapper.sessions.records import Session
from claude_wrapper.sessions.selfhosted.demand import is_self_hosted
from claude_wrapper.sessions.selfhosted.told import agent_told
from claude_wrapper.sessions.sessionfields import NewSession
from claude_wrapper.sessions.spec import Content, Owner, TurnEnd, TurnInput
from claude_wrapper.sessions.threads import note_thread
from claude_wrapper.sessions.transcript import client_view
from claude_wrapper.storage.dialects import is_unique_violation
from claude_wrapper.storage.tables.tenancy import organizations
from claude_wrapper.tenancy.principal import Principal, owned
from claude_wrapper.wire.streamjson import Frame

log = structlog.get_logger(__name__)


class Doors:
    """Conversations and their sessions."""

    def __init__(
        self,
        books: Books,
        conversations: Conversations,
        *,
        choose: Callable[[Principal], Awaitable[Credential]],
        security: Callable[[str], Awaitable[SecurityPolicy]],
        aliases: Mapping[str, str],
        content: Callable[[Principal, Callable[[], Session]], Content],
    ) -> None:
        """`choose` finds the upstream credential of a principal, `security` what an organisation's agents may do; `content`
        brings a session's things into its workspace: (the session's own principal, the session as it is now)."""
        self.on_change: Callable[[str], None] = lambda _session: None
        self.recover: Callable[[Session], Awaitable[None]] = _nothing
        """Goes on with the turn of a session whose server died, and returns when it is over."""
        self._books = books
        self._own = books.own
        self._conversations = conversations
        self._choose = choose
        self._security = security
        self._aliases = aliases
        self._content = content
        conversations.on_named = self.attach
        conversations.on_forgotten = self._forgotten
        self._own.on_lost = self._lost

    # What runners ask (runner.Host) -----------------------------------------------------------------------------------

    async def open(self, session: Session) -> tuple[Conversation, SessionJournal]:
        """The session's conversation, taken and restored if this replica does not hold it.

        Raises HeldElsewhere while another living replica holds the session.
        """
        fence = await self._own.take(acting(session.owner), session.id)
        conversation = self._conversations.find(session.id)
        if conversation is not None and _fence_of(conversation) not in (None, fence):
            self._conversations.drop(conversation)  # of an earlier time, before another replica held the session
            conversation = None
        if conversation is not None:
            conversation.touch()  # it is not forgotten before whoever asks has used it
        else:
            async with self._books.db.read() as tx:
                messages = await records.load_messages(tx, acting(session.owner), session.id)
            conversation = self._conversations.find(session.id) or self._conversations.restore(
                session.id, session.owner, client_view(messages), name=session.name
            )
        journal = conversation.journal
        if isinstance(journal, SessionJournal):
            journal.session = session
            journal.decide = policy_of(session.agent)
        else:
            conversation.journal = journal = self._journal(session, conversation, fence)
        if conversation.content is None and not is_self_hosted(session):  # there the worker has the workspace
            writing = journal
            conversation.content = self._content(acting(session.owner), lambda: writing.session)
        return conversation, journal

    def _lost(self, session: str, fence: int) -> None:
        conversation = self._conversations.find(session)
        if conversation is not None and _fence_of(conversation) == fence:
            self._conversations.drop(conversation)

    def _forgotten(self, conversation: Conversation) -> None:
        fence = _fence_of(conversation)
        if fence is not None:
            self._own.release(conversation.session, fence)

    async def credential(self, principal: Principal) -> Credential:
        """Raises CredentialMissing."""
        return await self._choose(principal)

    async def setup(self, session: Session, credential: Credential) -> Setup:
        """Raises PermissionDenied."""
        oauth = credential.kind is CredentialKind.OAUTH
        security = await self._security(session.org_id)
        vault_ids = tuple(session.vault_ids)
        agent, hosted = session.agent, is_self_hosted(session)
        if hosted:
            async with self._books.db.read() as tx:
                agent = await agent_told(tx, acting(session.owner), session)
        return setup(
            agent,
            security,
            oauth=oauth,
            aliases=self._aliases,
            vault_ids=vault_ids,
            environment=session.environment,
            self_hosted=hosted,
        )

    def holds(self, session: str) -> bool:
        """Whether this replica holds the session."""
        return self._own.holds(session)

    def busy(self, session: str) -> bool:
        """A turn runs here."""
        conversation = self._conversations.find(session)
        return conversation is not None and conversation.busy

    async def caught_up(self, session: str) -> None:
        """What was said here until now can be read."""
        conversation = self._conversations.find(session)
        if conversation is not None and isinstance(conversation.journal, SessionJournal):
            await conversation.journal.caught_up()

    async def close(self, session: Session) -> None:
        """The session is over: end its turn and give its process back."""
        conversation = self._conversations.find(session.id)
        if conversation is not None:
            await self._conversations.end(conversation.owner, session.id)

    def give_back(self, at_work: Container[str]) -> list[str]:
        """Let others have what is held here, does nothing and has no files; the sessions that are given back.

        Not those `at_work`: something of theirs runs without a process.
        """
        given = [
            one for one in self._conversations.at_rest() if one.session not in at_work and _fence_of(one) is not None
        ]
        for conversation in given:
            self._conversations.let_go(conversation)
        return [one.session for one in given]

    async def gone(self, session: str) -> None:
        """The session was deleted: the same, if it is held here."""
        conversation = self._conversations.find(session)
        if conversation is not None:
            await self._conversations.end(conversation.owner, session)

    def _journal(self, session: Session, conversation: Conversation, fence: int) -> SessionJournal:
        return SessionJournal(
            self._books,
            session,
            acting(session.owner),
            conversation,
            fence=fence,
            decide=policy_of(session.agent),
            on_change=lambda: self.on_change(session.id),
            on_lost=lambda: self._own.lose(session.id, fence),
        )

    # The Messages door ------------------------------------------------------------------------------------------------

    async def admit(self, principal: Principal, owner: Owner, name: str) -> None:
        """Before the Messages door looks for a named conversation: take and restore it if its session is in the database.

        Raises NotFound for a session id of somebody else and for an archived session, HeldElsewhere while another
        replica holds it.
        """
        by_id = name.startswith(f"{SESSION}_") and well_formed(name, SESSION)
        if self._own.certain and self._conversations.known(owner, name):
            return
        async with self._books.db.read() as tx:
            if by_id:
                session: Session | None = await records.get_session(tx, principal, name)
            else:
                session = await records.find_named(tx, principal, owner.principal, name)
        if session is None:
            return
        if session.ended:
            raise NotFound(f"session {session.id} has ended")
        before = self._own.holds(session.id)
        _, journal = await self.open(session)
        if before or session.turn is None or session.awaited:
            return
        if session.turn.get("durable"):
            await self.recover(session)
        else:
            await self.take_back(session, journal)

    async def take_back(self, session: Session, journal: SessionJournal) -> None:
        """A turn of the Messages door whose server died: its caller sends it again, so it is as if it never was."""
        messages = await journal.take_back(session)
        conversation = self._conversations.find(session.id)
        if conversation is not None and not conversation.busy:
            conversation.messages = client_view(messages)

    def attach(self, conversation: Conversation, name: str) -> None:
        """The Messages door made a named conversation: its first turn makes its session."""
        conversation.journal = _FirstTurn(self, self._books, conversation, name)

    async def adopt(self, conversation: Conversation, name: str, turn_input: TurnInput) -> SessionJournal | None:
        """The session of a conversation that has none yet; None when its organisation is not in the database."""
        owner, books = conversation.owner, self._books
        principal = acting(owner)
        now = books.clock.now()
        if not self._own.certain:
            await self._own.renew()
        try:
            async with books.db.transaction() as tx:
                if not await _has_rows(tx, principal):
                    return None
                new = NewSession(agent=_described(turn_input), origin=records.BY_MESSAGES, name=name)
                row = new.row(principal, conversation.session, books.ids.new("sthr"), now)
                held = {"actor_id": owner.principal, "holder": self._own.replica, "fence": 1}
                await records.insert_session(tx, {**row, **held})
                session = await records.get_session(tx, principal, conversation.session)
                await note_thread(
                    tx, principal, session, session.thread_id, name=session.agent_name, status=records.IDLE, now=now
                )
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
            # Two replicas were asked for the same new name at once; the other one's session is the conversation.
            self._conversations.drop(conversation)
            raise LeaseLost(f"session {name!r} was made by another replica at the same moment", retry_after=1) from None
        self._own.made(session.id, 1)
        return self._journal(session, conversation, 1)


class _FirstTurn:
    """The journal of a conversation that has no session yet."""

    def __init__(self, doors: Doors, books: Books, conversation: Conversation, name: str) -> None:
        self._doors = doors
        self._books = books
        self._conversation = conversation
        self._name = name
        self._journal: SessionJournal | None = None

    async def begin(self, turn_input: TurnInput) -> TurnInput:
        self._journal = await self._doors.adopt(self._conversation, self._name, turn_input)
        self._conversation.journal = self._journal
        return turn_input if self._journal is None else await self._journal.begin(turn_input)

    async def frame(self, frame: Frame) -> None:
        if self._journal is not None:
            await self._journal.frame(frame)

    def note(self, event: Mapping[str, Any]) -> None:
        if self._journal is not None:
            self._journal.note(event)

    def reused(self, tool_use_id: str) -> None:
        if self._journal is not None:
            self._journal.reused(tool_use_id)

    async def end(self, end: TurnEnd) -> None:
        if self._journal is not None:
            await self._journal.end(end)


def _fence_of(conversation: Conversation) -> int | None:
    journal = conversation.journal
    return journal.fence if isinstance(journal, SessionJournal) else None


async def _nothing(_session: Session) -> None:
    """Nobody runs turns yet."""


async def _has_rows(tx: AsyncConnection, principal: Principal) -> bool:
    query = sa.select(organizations.c.id).where(owned(principal, organizations))
    return (await tx.execute(query)).first() is not None


def _described(turn_input: TurnInput) -> dict[str, Any]:
    """What a Messages caller runs, as an agent."""
    blocks = turn_input.system or turn_input.spec.system or ()
    system = "\n".join(str(block.get("text", "")) for block in blocks) or turn_input.spec.append_system_prompt
    custom = [
        {
            "type": "custom",
            "name": tool["name"],
            "description": tool.get("description", ""),
            "input_schema": tool["input_schema"],
        }
        for tool in turn_input.spec.client_tools
    ]
    return {
        "id": None,
        "type": "agent",
        "version": None,
        "name": "messages",
        "description": None,
        "system": system,
        "model": {"id": turn_input.model, "effort": {"type": "high"}, "speed": "standard"},
        "tools": custom,
        "mcp_servers": [],
        "skills": [],
        "multiagent": None,
    }
