"""The turn in flight, and what is made for it: the message that its caller gets, and what the broker is told of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from claude_wrapper.agent.launch import CHAT
from claude_wrapper.agent.turns import Turn as AgentTurn
from claude_wrapper.broker.calls import Binding, TurnContext
from claude_wrapper.clock import Clock
from claude_wrapper.sessions.leg import Leg, Started
from claude_wrapper.sessions.process import SlotProcess
from claude_wrapper.sessions.spec import Message, Owner, TurnInput
from claude_wrapper.wire.merge import CLIENT_PREFIX, CONTINUED_BY_CLI, MessageMerger


@dataclass(slots=True)
class Running:
    """The turn in flight."""

    turn: str
    agent_turn: AgentTurn
    leg: Leg
    input: TurnInput
    deadline: asyncio.Timeout
    started: Started
    process: SlotProcess
    user_messages: list[Message] = field(default_factory=list)
    interrupted: bool = False
    """The caller, or whoever speaks for it, ended the turn early."""
    done: bool = False
    """The whole answer was handed over and the conversation settled."""
    cut: bool = False
    """The message ended before the CLI's turn did."""
    suspended: bool = False
    """It goes on in another process, later."""
    parked: asyncio.Event | None = None
    """Set while the turn waits for tool results; the event says that the next leg is attached."""

    def allow_seconds(self, seconds: float | None) -> None:
        """It may take this long from now; None: without end."""
        self.deadline.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)


async def unanswered(parked: asyncio.Event, clock: Clock, seconds: float) -> None:
    """Return when the parked turn is continued, or when nobody did that for so long."""
    waiting = asyncio.ensure_future(clock.sleep(seconds))
    answered = asyncio.ensure_future(parked.wait())
    try:
        await asyncio.wait({waiting, answered}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        answered.cancel()


def merger_for(turn_input: TurnInput, message_id: str) -> MessageMerger:
    """Makes the one Message that the turn's caller is answered with."""
    spec = turn_input.spec
    return MessageMerger(
        message_id,
        turn_input.model,
        structured=spec.json_schema is not None,
        # The caller of a durable turn is told of its tools by the journal; the turn itself goes on.
        strip_mcp_prefix="" if turn_input.durable else CLIENT_PREFIX,
        # Without tools of its own the process stands for a plain model, which stops where the CLI would go on.
        end_at=frozenset() if spec.profile.tools != () or turn_input.durable else CONTINUED_BY_CLI,
    )


def binding_of(session: str, owner: Owner, turn_input: TurnInput) -> Binding:
    """For whom the process's endpoint works."""
    return Binding(
        org=owner.org,
        workspace=owner.workspace,
        key_id=owner.key_id,
        user=owner.user,
        session=session,
        credential=turn_input.credential,
        allowed_models=turn_input.allowed_models,
    )


def context_of(turn: str, turn_input: TurnInput, leg: Leg) -> TurnContext:
    """What the broker does to the turn's model requests, and where it notes what the leg's caller is told."""
    return TurnContext(
        turn=turn,
        model=turn_input.model,
        system=turn_input.system,
        overrides=turn_input.overrides,
        cache=turn_input.cache,
        notes=leg.notes,
        placeholder=turn_input.spec.profile == CHAT,  # the version of the CLI is chosen later, and changes nothing here
    )
