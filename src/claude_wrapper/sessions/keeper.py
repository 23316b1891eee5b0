"""The port: who sees to it that a conversation's files outlive its process, its server and its machine."""

from __future__ import annotations

from typing import Protocol

from claude_wrapper.sessions.process import Resume, SlotProcess
from claude_wrapper.sessions.spec import Journal, Owner, TurnInput


class Keepable(Protocol):
    """What a keeper sees of a conversation."""

    session: str
    owner: Owner
    journal: Journal | None
    process: SlotProcess | None
    resume: Resume | None
    ended: bool
    cli: str | None
    """Which of the server's CLIs holds or held it; none or empty: the main one."""

    @property
    def busy(self) -> bool: ...


class Keeper:
    """Told of everything that matters to a conversation's files. This one keeps nothing beyond this server's disk."""

    async def begin(self, conversation: Keepable) -> None:
        """A turn begins: from now on the files change."""

    async def fetch(self, conversation: Keepable, turn_input: TurnInput) -> None:
        """A process is about to be claimed, for the conversation has none: see to it that `conversation.resume` is what
        it is to be started with. Raises what the turn is to fail with."""

    def waits(self, conversation: Keepable, *, quiet: bool) -> None:
        """The running turn waits for a person or a client; `quiet`: nothing else of it runs meanwhile. Told again when
        that changes."""

    def goes_on(self, conversation: Keepable) -> None:
        """The turn that waited goes on: from now on the files change again."""

    def ended(self, conversation: Keepable) -> None:
        """A turn has ended and was written down."""

    def left(self, conversation: Keepable, process: SlotProcess) -> None:
        """The process goes, `conversation.resume` says where its files will be. Called before they are moved."""

    def may_forget(self, conversation: Keepable) -> bool:
        """Whether this server may forget a conversation that has no process: it can be had again from elsewhere."""
        del conversation
        return False

    def unsaved(self, conversation: Keepable) -> bool:
        """Whether its files are to be stored and are not yet: they are not removed."""
        del conversation
        return False

    def forget(self, conversation: Keepable) -> None:
        """The conversation is over here; its local files are about to be removed."""
