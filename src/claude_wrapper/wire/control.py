"""The control protocol: requests and responses that travel beside the conversation.

Both sides ask. Our requests carry an id that we choose; the response repeats it. `Calls` remembers which ids are open,
so that an answer to nobody (too late, invented) is dropped instead of being given to somebody else. Requests of the
CLI (`can_use_tool`, `hook_callback`, `mcp_message`) may be withdrawn by `control_cancel_request`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from claude_wrapper.errors import AgentProtocolError
from claude_wrapper.wire.streamjson import Frame, MalformedFrame

REQUEST = "control_request"
RESPONSE = "control_response"
CANCEL = "control_cancel_request"
TYPES = frozenset({REQUEST, RESPONSE, CANCEL})


class ControlRefused(AgentProtocolError):
    """The Claude process refused a control request."""


class _Reply(msgspec.Struct):
    request_id: str
    subtype: str
    response: dict[str, Any] | None = None
    error: Any = None


class _ReplyFrame(msgspec.Struct):
    response: _Reply


class _AskFrame(msgspec.Struct):
    request_id: str
    request: dict[str, Any]


class _CancelFrame(msgspec.Struct):
    request_id: str


_REPLY = msgspec.json.Decoder(_ReplyFrame)
_ASK = msgspec.json.Decoder(_AskFrame)
_CANCEL = msgspec.json.Decoder(_CancelFrame)


@dataclass(frozen=True, slots=True)
class Reply:
    """The CLI's answer to one of our requests: either `response` or `error`."""

    request_id: str
    response: dict[str, Any]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of the CLI to us."""

    request_id: str
    subtype: str
    request: dict[str, Any] = field(repr=False)


def parse_reply(frame: Frame) -> Reply:
    """Raises MalformedFrame when a `control_response` has not the shape of one."""
    try:
        found = _REPLY.decode(frame.raw).response
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"the Claude process wrote an unreadable control_response: {error}") from None
    if found.subtype == "success":
        return Reply(found.request_id, found.response or {})
    return Reply(found.request_id, {}, str(found.error or found.subtype))


def parse_ask(frame: Frame) -> Ask:
    """Raises MalformedFrame when a `control_request` has not the shape of one."""
    try:
        found = _ASK.decode(frame.raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"the Claude process wrote an unreadable control_request: {error}") from None
    subtype = found.request.get("subtype")
    return Ask(found.request_id, subtype if isinstance(subtype, str) else "", found.request)


def parse_cancel(frame: Frame) -> str:
    """The id of the request that the CLI withdraws. Raises MalformedFrame."""
    try:
        return _CANCEL.decode(frame.raw).request_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"the Claude process wrote an unreadable control_cancel_request: {error}") from None


class Calls:
    """Our requests that have no answer yet, by id."""

    __slots__ = ("_limit", "_open")

    def __init__(self, limit: int = 64) -> None:
        """`limit` bounds how many may wait at once; more means that the process has stopped answering."""
        self._limit = limit
        self._open: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request_id: str, subtype: str) -> None:
        """Raises AgentProtocolError when the id is in use or too many calls wait."""
        if request_id in self._open:
            raise AgentProtocolError(f"control request id {request_id} is already in use")
        if len(self._open) >= self._limit:
            raise AgentProtocolError(f"{self._limit} control requests are waiting for an answer already")
        self._open[request_id] = subtype

    def settle(self, request_id: str) -> str | None:
        """Close the call and return its subtype; None for an id that nobody waits for."""
        return self._open.pop(request_id, None)

    def drain(self) -> dict[str, str]:
        """Close every call (the process is gone); ids with their subtypes."""
        left, self._open = self._open, {}
        return left
