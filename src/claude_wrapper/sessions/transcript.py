"""A session's conversation as the model knows it: written down as it grows, and put back into a process. Pure.

Events are for people and leave things out (thinking, tool names of the CLI); the transcript keeps what a model needs to
go on: whole blocks, in the order of the Messages API.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from claude_wrapper.sessions.spec import Message
from claude_wrapper.wire.managed_tools import CLIENT_PREFIX
from claude_wrapper.wire.merge import SYNTHETIC_MODEL, FrameLike

Content = str | list[dict[str, Any]]

LOST: Final = "The call was interrupted before it had a result."


@dataclass(slots=True)
class Recorder:
    """Adds the frames of a turn to a conversation. `messages[changed:]` is what is new or has grown."""

    messages: list[Message]
    _assistant: str | None = None
    """Id of the model message that is growing."""

    def user(self, content: Content) -> int:
        """The user's message of the turn; its position."""
        self._assistant = None
        self.messages.append(Message("user", content))
        return len(self.messages) - 1

    def feed(self, frame: FrameLike) -> int | None:
        """The position of the message that this frame adds or extends; None: it holds nothing of the conversation."""
        if frame.parent_tool_use_id is not None or frame.type not in {"assistant", "user"}:
            return None
        decoded = frame.json()
        message = decoded.get("message")
        if not isinstance(message, Mapping):
            return None
        blocks = [block for block in blocks_of(message.get("content")) if block.get("type")]
        if frame.type == "assistant":
            if message.get("model") == SYNTHETIC_MODEL or decoded.get("is_api_error_message"):
                return None
            return self._extend("assistant", blocks, str(message.get("id")))
        results = [block for block in blocks if block["type"] == "tool_result"]
        return self._extend("user", results, None) if results else None

    def _extend(
        self, role: Literal["user", "assistant"], blocks: list[dict[str, Any]], model_message: str | None
    ) -> int | None:
        if not blocks:
            return None
        last = self.messages[-1] if self.messages else None
        grows = last is not None and last.role == role and (role == "user" or model_message == self._assistant)
        self._assistant = model_message
        if grows and last is not None:
            self.messages[-1] = Message(role, [*blocks_of(last.content), *blocks])
        else:
            self.messages.append(Message(role, blocks))
        return len(self.messages) - 1


@dataclass(frozen=True, slots=True)
class Next:
    """What a process is given: a past that ends with an assistant message, and the user message that asks."""

    history: tuple[Message, ...]
    content: Content


def next_turn(messages: Sequence[Message], content: Content) -> Next:
    """The turn that adds `content` to the conversation.

    What an earlier turn left open is closed: calls without results get one that says so, and user messages without an
    answer go before the new one.
    """
    past = list(messages)
    before: list[dict[str, Any]] = []
    while past and past[-1].role == "user":
        before = [*blocks_of(past.pop().content), *before]
    given = {str(block.get("tool_use_id")) for block in before}
    missing = [call for call in calls_in(past[-1]) if call not in given] if past else []
    closing = [{"type": "tool_result", "tool_use_id": call, "content": LOST, "is_error": True} for call in missing]
    if not before and not closing:
        return Next(tuple(past), content)
    # Results come first in a message, as the API wants it.
    results = [block for block in before if block.get("type") == "tool_result"]
    rest = [block for block in before if block.get("type") != "tool_result"]
    return Next(tuple(past), [*closing, *results, *rest, *blocks_of(content)])


@dataclass(frozen=True, slots=True)
class Resumption:
    """A turn that stopped at a model message whose calls have their answers now."""

    history: tuple[Message, ...]
    content: Content
    replayed: list[dict[str, Any]]
    """The model message, which is said again in the model's place."""
    position: int
    """Where that message stands."""


def resumption(messages: Sequence[Message]) -> Resumption | None:
    """How to go on with a conversation whose last model message has calls without results; None: it has none."""
    at = len(messages) - 1
    while at >= 0 and messages[at].role == "user" and _only_results(messages[at]):
        at -= 1
    if at < 1 or messages[at].role != "assistant" or not calls_in(messages[at]):
        return None
    answered = {str(block.get("tool_use_id")) for one in messages[at + 1 :] for block in blocks_of(one.content)}
    if set(calls_in(messages[at])) <= answered:
        return None
    return replay_of(messages, at)


def replay_of(messages: Sequence[Message], at: int) -> Resumption | None:
    """How to have the model message at this position said again; None: no message of the user is before it."""
    if at < 1 or messages[at - 1].role != "user":
        return None
    before = next_turn(messages[: at - 1], messages[at - 1].content)
    return Resumption(before.history, before.content, blocks_of(messages[at].content), at)


def client_view(messages: Sequence[Message]) -> list[Message]:
    """The conversation as a caller of `/v1/messages` knows it: the tools that the server ran are not in it."""
    theirs: set[str] = set()
    shown: list[Message] = []
    for message in messages:
        blocks: list[dict[str, Any]] = []
        for block in blocks_of(message.content):
            kind = block.get("type")
            if kind == "tool_use":
                name = str(block.get("name"))
                if not name.startswith(CLIENT_PREFIX):
                    continue
                theirs.add(str(block.get("id")))
                blocks.append({**block, "name": name.removeprefix(CLIENT_PREFIX)})
            elif kind != "tool_result" or str(block.get("tool_use_id")) in theirs:
                blocks.append(block)
        if not blocks:
            continue
        if shown and shown[-1].role == message.role:
            shown[-1] = Message(message.role, [*shown[-1].blocks(), *blocks])
        else:
            shown.append(Message(message.role, blocks))
    return shown


def calls_in(message: Message) -> list[str]:
    """Ids of the tool calls of a model message."""
    if message.role != "assistant":
        return []
    return [str(block.get("id")) for block in blocks_of(message.content) if block.get("type") == "tool_use"]


def names_in(blocks: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Tool names by the ids of their calls."""
    return {str(block.get("id")): str(block.get("name")) for block in blocks if block.get("type") == "tool_use"}


def _only_results(message: Message) -> bool:
    blocks = blocks_of(message.content)
    return bool(blocks) and all(block.get("type") == "tool_result" for block in blocks)


def blocks_of(content: Any) -> list[dict[str, Any]]:
    """The content of a message as blocks."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []
