"""What a conversation is configured with, and what one turn of it asks for.

Some of it is fixed when a process first answers (the CLI latches the system prompt by its first turn; built-in tools
are fixed at spawn), some can change with every turn. `ConversationSpec.fingerprint` covers exactly the fixed part: a
turn with another fingerprint needs another process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from claude_wrapper.agent.launch import LaunchProfile
from claude_wrapper.broker.calls import CacheUse, Credential, UpstreamCall
from claude_wrapper.broker.hosts import HostRule
from claude_wrapper.errors import WrapperError
from claude_wrapper.sessions.content.places import WorkDir
from claude_wrapper.sessions.mcpservers import RemoteSpec, ToolRules
from claude_wrapper.wire.messages import Message
from claude_wrapper.wire.streamjson import Frame

__all__ = [
    "Approve",
    "Content",
    "ConversationSpec",
    "Journal",
    "Message",
    "OnDisconnect",
    "Owner",
    "TurnEnd",
    "TurnInput",
]


Approve = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class OnDisconnect(StrEnum):
    """What becomes of a turn whose caller hangs up."""

    INTERRUPT = "interrupt"
    CONTINUE = "continue"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose conversation it is: the only thing that is compared when somebody asks for one."""

    org: str
    principal: str
    """The API key or user; two keys of one organisation do not share conversations."""
    workspace: str | None = None
    key_id: str | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True)
class ConversationSpec:
    """How the conversation's process is set up."""

    profile: LaunchProfile
    permission_mode: str = "default"
    allowed_tools: frozenset[str] = frozenset()
    """Built-in tools that the server lets run; the question is asked for every call that the CLI does not decide."""
    max_turns: int | None = None
    system: tuple[Mapping[str, Any], ...] | None = None
    """System prompt of a profile whose process is not primed (a primed one gets it per request, from the broker)."""
    append_system_prompt: str | None = None
    json_schema: Mapping[str, Any] | None = None
    mcp_servers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Local commands, as the CLI takes them: name → `{type, command, args, env}`."""
    remote_servers: Mapping[str, RemoteSpec] = field(default_factory=dict)
    """Remote MCP servers by the names that the CLI is told."""
    local_rules: Mapping[str, ToolRules] = field(default_factory=dict)
    """Which tools of a local server may be called; those that are not named: all."""
    client_tools: tuple[Mapping[str, Any], ...] = ()
    """Tools that the caller runs itself: `{name, description?, input_schema}`."""
    worker_tools: tuple[Mapping[str, Any], ...] = ()
    """Tools that the worker of a self-hosted environment runs, in the same form."""
    asked_tools: frozenset[str] = frozenset()
    """Tools (or `mcp__SERVER`) whose every call is asked about, also those that the CLI would let pass by itself."""

    @property
    def fingerprint(self) -> str:
        """Equal for two specs that one process can serve one after the other."""
        fixed = (
            self.profile.name,
            self.profile.bare,
            self.profile.tools,
            str(self.profile.auth),
            self.system,
            self.append_system_prompt,
            self.json_schema,
            self.max_turns,
        )
        return hashlib.sha256(msgspec.json.encode(fixed, order="deterministic")).hexdigest()


@dataclass(frozen=True, slots=True)
class TurnInput:
    """One user message and what its turn needs."""

    content: str | list[dict[str, Any]]
    model: str
    credential: Credential
    spec: ConversationSpec
    allowed_models: frozenset[str] | None = None
    """Models that the caller's key may use, as in its `Principal`: no other one may stand in for `model`."""
    history: Sequence[Message] = ()
    """The messages before this one, as the caller knows them; injected into a process that does not hold them."""
    system: list[dict[str, Any]] | None = None
    """System blocks for a primed process: the broker puts them into each request of the turn."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the turn's main request that the CLI cannot express."""
    cache: CacheUse | None = None
    """What the caller wants of the cache; None: what the organisation's policy says."""
    max_thinking_tokens: int | None = None
    on_disconnect: OnDisconnect = OnDisconnect.INTERRUPT
    turn_seconds: float = 600.0
    approve: Approve | None = None
    """Decides each call that the CLI asks about (`can_use_tool` request in, its `response` out); None: the server's
    policy alone. May take as long as a person needs."""
    durable: bool = False
    """What happens stays in the conversation, also when the turn fails; the caller's tools are answered one by one
    (`Conversation.answer_calls`) while the turn goes on. Else a failed turn is taken back and the caller sends it again."""
    past: Sequence[Message] | None = None
    """What a fresh process is given in place of `history`: the same conversation with the server's own tool calls."""
    replay: list[dict[str, Any]] | None = None
    """The model's first answer of this turn, which it has given already: it is not asked for again."""
    reuse_idle: bool = False
    """May take the process of this caller's least recently used idle conversation (which is kept without a process)."""


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How a turn ended."""

    error: WrapperError | None = None
    interrupted: bool = False
    kept: bool = False
    """Whether the turn is part of the conversation; else it was taken back."""
    suspended: bool = False
    """It will be continued in another process."""
    calls: Sequence[UpstreamCall] = ()


class Journal(Protocol):
    """Who writes down what happens in a conversation, through whichever door."""

    async def begin(self, turn_input: TurnInput) -> TurnInput:
        """A turn begins; gives the input that it is to run with."""
        ...

    async def frame(self, frame: Frame) -> None:
        """The process said something."""
        ...

    def note(self, event: Mapping[str, Any]) -> None:
        """Something happened around the process: an event without its id. Dropped when no turn runs."""
        ...

    def reused(self, tool_use_id: str) -> None:
        """A kept result answers this call of an MCP tool."""
        ...

    async def end(self, end: TurnEnd) -> None:
        """The turn is over; nothing may begin before this returns."""
        ...


class Content(Protocol):
    """Who brings a session's things into its process's workspace, and out of it."""

    @property
    def prompt(self) -> str:
        """What a fresh process is told of them in its system prompt; as of the last `enter`."""
        ...

    @property
    def news(self) -> str:
        """What a process that was told before is told with its next message."""
        ...

    async def enter(self, workdir: WorkDir | None) -> None:
        """Before a turn; None: the process has no tools that could see a workspace."""
        ...

    @property
    def hosts(self) -> tuple[HostRule, ...] | None:
        """The only hosts that the session's processes may reach; None: whatever the organisation may."""
        ...

    async def settle(self, workdir: WorkDir | None) -> None:
        """Before a turn, once the process has its way to the network: what has to be downloaded."""
        ...

    async def leave(self, workdir: WorkDir | None) -> None:
        """After a turn, however it ended, while the workspace is still there. Never raises a WrapperError."""
        ...
