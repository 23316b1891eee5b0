"""How to go on with a turn whose server died in it. Pure.

The log and the transcript hold what was committed. A model message that was in flight has left previews at most, and is
asked for again; one that is complete is never asked for twice; a tool call that may have run is not run again without
the model being told. So nothing is said twice in the log, whenever the server died.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from claude_wrapper.sessions.spec import Message
from claude_wrapper.sessions.transcript import Content, blocks_of, calls_in, replay_of

MAX_ATTEMPTS: Final = 3
"""A turn whose servers die this often is given up: it may be what kills them."""
ONWARD: Final = (
    "<system-reminder>\nThe server stopped while you were answering. What you had said until then stands above and was "
    "shown. Go on exactly where it ends; repeat nothing of it.\n</system-reminder>"
)
UNSURE: Final = (
    "The server stopped while this call may have been running: it may have run in whole, in part or not at all, and files "
    "that it wrote may be missing. Look at what is there before you call it again."
)


_RAN: Final = "This call ran before the session was moved to another process. Its result was:\n"


class How(enum.StrEnum):
    """What is done with the turn."""

    AGAIN = "again"
    """The last message of the user (or the last results) is sent again: the model had not answered it."""
    REPLAY = "replay"
    """The last model message is said again in the model's place; calls that ran are answered from what is known."""
    ONWARD = "onward"
    """The model is asked for the rest of a message that it had begun."""
    FINISHED = "finished"
    """Everything had been said; only the end was not written."""


class CallView(Protocol):
    """What is asked of a stored call (`records.CallRow`)."""

    @property
    def tool_use_id(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def answer(self) -> Mapping[str, Any] | None: ...


@dataclass(frozen=True, slots=True)
class Continuation:
    """What to do."""

    how: How
    position: int
    """The transcript ends before this message."""
    last: Message | None = None
    """What the message before `position` is now, if it was cut short."""
    history: Sequence[Message] = ()
    content: Content = ""
    replayed: list[dict[str, Any]] | None = None
    ran: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Results of calls of the replayed message, by the model's ids."""
    unsure: frozenset[str] = frozenset()
    """Calls of it that may have run."""


def continuation(
    messages: Sequence[Message], calls: Sequence[CallView], *, texts: int | None, start: int | None = None
) -> Continuation:
    """`texts`: how many texts the log has of the model message in flight; None: no model message was in flight.
    `start`: where the turn's own question stands."""
    known = {call.tool_use_id for call in calls}
    kept, last = list(messages), None
    if texts is not None and kept and kept[-1].role == "assistant":
        whole = blocks_of(kept.pop().content)
        begun = _logged(whole, known, texts)
        if any(block.get("type") in {"text", "tool_use"} for block in begun):
            kept.append(Message("assistant", begun))
            last = kept[-1] if len(begun) < len(whole) else None
    if not kept:
        return Continuation(How.FINISHED, 0)
    at = len(kept) - 1
    if kept[at].role == "assistant":
        if calls_in(kept[at]):
            return _replay(kept, at, calls, last)
        if texts is None:
            return Continuation(How.FINISHED, at + 1)
        return Continuation(How.ONWARD, at + 1, last, tuple(kept), [{"type": "text", "text": ONWARD}])
    if at == start:  # it may carry results for what an earlier turn, which failed, had called: that turn is over
        return _again(kept, at)
    results = {str(block.get("tool_use_id")) for block in blocks_of(kept[at].content)}
    asked = calls_in(kept[at - 1]) if at else []
    outputs = {call.tool_use_id for call in calls if "output" in (call.answer or {})}
    if any(call not in results or (call in known and call not in outputs) for call in asked):
        return _replay(kept, at - 1, calls, None)
    return _again(kept, at)


def _again(messages: Sequence[Message], at: int) -> Continuation:
    """What an earlier turn had left unanswered goes before what is asked: a past ends with the model's message."""
    first = at
    while first and messages[first - 1].role == "user":
        first -= 1
    content = messages[at].content
    if first < at:
        content = [block for one in messages[first : at + 1] for block in blocks_of(one.content)]
    return Continuation(How.AGAIN, first, None, tuple(messages[:first]), content)


def known_result(output: Mapping[str, Any]) -> str:
    """What the model is told instead of running a call again that has run."""
    return _RAN + "\n".join(str(block.get("text", block)) for block in output.get("content", ()))


def _replay(messages: Sequence[Message], at: int, calls: Sequence[CallView], last: Message | None) -> Continuation:
    before = replay_of(messages, at)
    if before is None:  # nothing asked for this message: it stands alone
        return Continuation(How.FINISHED, at + 1, last)
    said = set(calls_in(messages[at]))
    ran: dict[str, Mapping[str, Any]] = {
        str(block["tool_use_id"]): {"content": blocks_of(block.get("content")), "is_error": bool(block.get("is_error"))}
        for one in messages[at + 1 :]
        for block in blocks_of(one.content)
        if block.get("type") == "tool_result" and str(block.get("tool_use_id")) in said
    }
    unsure = set()
    for call in calls:
        answer = call.answer or {}
        if call.tool_use_id not in said:
            continue
        if "output" in answer:
            ran[call.tool_use_id] = answer["output"]
        elif call.tool_use_id not in ran and _may_have_run(call.kind, answer):
            unsure.add(call.tool_use_id)
    return Continuation(
        How.REPLAY, at + 1, last, before.history, before.content, before.replayed, ran, frozenset(unsure)
    )


def _may_have_run(kind: str, answer: Mapping[str, Any]) -> bool:
    """What the client or its worker runs never runs here; what must be allowed runs once its process was told so."""
    return kind == "tool" or (kind == "approval" and bool(answer.get("given")))


def _logged(blocks: Sequence[dict[str, Any]], known: set[str], texts: int) -> list[dict[str, Any]]:
    """The blocks that the log has, too: the transcript may be a moment ahead of it."""
    found: list[dict[str, Any]] = []
    for block in blocks:
        if block.get("type") == "text":
            texts -= 1
            if texts < 0:
                break
        if block.get("type") == "tool_use" and str(block.get("id")) not in known:
            break
        found.append(block)
    while found and found[-1].get("type") not in {"text", "tool_use"}:
        found.pop()
    return found
