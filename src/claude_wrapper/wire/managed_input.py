"""What a Managed Agents client may send as events (wire reference 2.6): checked and made plain. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from claude_wrapper.errors import InvalidRequest

MAX_EVENTS: Final = 50
"""Events of one request; also the bound of `initial_events`."""
MAX_RUBRIC: Final = 262_144
MAX_ITERATIONS: Final = 20
RUN_MODES: Final = frozenset({"enqueue", "reject", "interrupt"})
"""Extension field of user.message: what happens to it while the session is running."""

_MESSAGE_BLOCKS: Final = frozenset({"text", "image", "document"})
_RESULT_BLOCKS: Final = frozenset({"text", "image", "document", "search_result"})
_ID_LENGTH: Final = 128


def check_events(body: Any, *, field: str = "events") -> list[dict[str, Any]]:
    """The events of a `{"events": […]}` body, each with exactly the fields that its type has.

    Raises InvalidRequest naming the field, as in `events[0].content`.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("the request body must be an object")
    unknown = sorted(body.keys() - {field})
    if unknown:
        raise InvalidRequest("is not a field of this request", field=unknown[0])
    return check_event_list(body.get(field), field=field)


def check_event_list(given: Any, *, field: str, allowed: frozenset[str] | None = None) -> list[dict[str, Any]]:
    """A list of client events; `allowed` narrows the types (`initial_events`)."""
    if not isinstance(given, list) or not given:
        raise InvalidRequest("must be a list of at least one event", field=field)
    if len(given) > MAX_EVENTS:
        raise InvalidRequest(f"has {len(given)} events, at most {MAX_EVENTS} fit into one request", field=field)
    events = [_event(event, f"{field}[{index}]", allowed) for index, event in enumerate(given)]
    _check_system_messages(events, field)
    return events


def _event(event: Any, field: str, allowed: frozenset[str] | None) -> dict[str, Any]:
    if not isinstance(event, dict):
        raise InvalidRequest("must be an object", field=field)
    kind = event.get("type")
    check = _CHECKS.get(kind) if isinstance(kind, str) else None
    if check is None or (allowed is not None and kind not in allowed):
        names = ", ".join(sorted(allowed or _CHECKS))
        raise InvalidRequest(f"must be one of {names}", field=f"{field}.type")
    fields, run = check
    unknown = sorted(event.keys() - fields - {"type"})
    if unknown:
        raise InvalidRequest(f"is not a field of {kind}", field=f"{field}.{unknown[0]}")
    present = {name: value for name, value in event.items() if value is not None}
    run(present, field)
    return present


def _check_system_messages(events: Sequence[Mapping[str, Any]], field: str) -> None:
    """At most one, as the last event, right after a message or a result."""
    places = [index for index, event in enumerate(events) if event["type"] == "system.message"]
    if not places:
        return
    at = places[0]
    if len(places) > 1 or at != len(events) - 1:
        raise InvalidRequest("there may be one system.message, as the last event", field=f"{field}[{at}].type")
    before = events[at - 1]["type"] if at else None
    if before not in {"user.message", "user.tool_result", "user.custom_tool_result", "user.tool_confirmation"}:
        raise InvalidRequest("must follow a user message or a result in the same request", field=f"{field}[{at}].type")


def _text(event: Mapping[str, Any], name: str, field: str, *, most: int, required: bool = True) -> None:
    value = event.get(name)
    if value is None and not required:
        return
    if not isinstance(value, str) or not value:
        raise InvalidRequest("must be a text, not empty", field=f"{field}.{name}")
    if len(value) > most:
        raise InvalidRequest(f"has {len(value)} characters, at most {most} are allowed", field=f"{field}.{name}")


def _flag(event: Mapping[str, Any], name: str, field: str) -> None:
    if not isinstance(event.get(name, False), bool):
        raise InvalidRequest("must be true or false", field=f"{field}.{name}")


def _blocks(event: Mapping[str, Any], field: str, kinds: frozenset[str], *, required: bool) -> None:
    field = f"{field}.content"
    content = event.get("content")
    if content is None and not required:
        return
    if not isinstance(content, list) or (required and not content):
        raise InvalidRequest("must be a list of content blocks", field=field)
    for index, block in enumerate(content):
        where = f"{field}[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in kinds:
            raise InvalidRequest(f"must be one of {', '.join(sorted(kinds))}", field=f"{where}.type")
        if kind == "text" and (not isinstance(block.get("text"), str) or not block["text"]):
            raise InvalidRequest("must be a text, not empty", field=f"{where}.text")
        if kind in {"image", "document"}:
            source = block.get("source")
            if not isinstance(source, dict) or not isinstance(source.get("type"), str):
                raise InvalidRequest("must be an object with a type", field=f"{where}.source")


def _user_message(event: dict[str, Any], field: str) -> None:
    _blocks(event, field, _MESSAGE_BLOCKS, required=True)
    mode = event.get("run_mode", "enqueue")
    if not isinstance(mode, str) or mode not in RUN_MODES:
        raise InvalidRequest(f"must be one of {', '.join(sorted(RUN_MODES))}", field=f"{field}.run_mode")


def _interrupt(event: dict[str, Any], field: str) -> None:
    _text(event, "session_thread_id", field, most=_ID_LENGTH, required=False)


def _confirmation(event: dict[str, Any], field: str) -> None:
    _text(event, "tool_use_id", field, most=_ID_LENGTH)
    if event.get("result") not in ("allow", "deny"):
        raise InvalidRequest("must be allow or deny", field=f"{field}.result")
    _text(event, "deny_message", field, most=10_000, required=False)
    if "deny_message" in event and event["result"] == "allow":
        raise InvalidRequest("belongs to the result deny", field=f"{field}.deny_message")


def _custom_result(event: dict[str, Any], field: str) -> None:
    _text(event, "custom_tool_use_id", field, most=_ID_LENGTH)
    _blocks(event, field, _RESULT_BLOCKS, required=False)
    _flag(event, "is_error", field)


def _tool_result(event: dict[str, Any], field: str) -> None:
    _text(event, "tool_use_id", field, most=_ID_LENGTH)
    _blocks(event, field, _RESULT_BLOCKS, required=False)
    _flag(event, "is_error", field)


def _outcome(event: dict[str, Any], field: str) -> None:
    _text(event, "description", field, most=MAX_RUBRIC)
    rubric = event.get("rubric")
    if not isinstance(rubric, dict) or rubric.get("type") not in ("text", "file"):
        raise InvalidRequest("must be an object of type text or file", field=f"{field}.rubric")
    name = "content" if rubric["type"] == "text" else "file_id"
    _text(rubric, name, f"{field}.rubric", most=MAX_RUBRIC)
    most = event.get("max_iterations")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MAX_ITERATIONS):
        raise InvalidRequest(f"must be from 1 to {MAX_ITERATIONS}", field=f"{field}.max_iterations")


def _system_message(event: dict[str, Any], field: str) -> None:
    _blocks(event, field, frozenset({"text"}), required=True)


_Check = tuple[frozenset[str], Callable[[dict[str, Any], str], None]]
_CHECKS: Final[Mapping[str, _Check]] = {
    "user.message": (frozenset({"content", "run_mode"}), _user_message),
    "user.interrupt": (frozenset({"session_thread_id"}), _interrupt),
    "user.tool_confirmation": (
        frozenset({"tool_use_id", "result", "deny_message", "session_thread_id"}),
        _confirmation,
    ),
    "user.custom_tool_result": (
        frozenset({"custom_tool_use_id", "content", "is_error", "session_thread_id"}),
        _custom_result,
    ),
    "user.tool_result": (frozenset({"tool_use_id", "content", "is_error", "session_thread_id"}), _tool_result),
    "user.define_outcome": (frozenset({"description", "rubric", "max_iterations"}), _outcome),
    "system.message": (frozenset({"content"}), _system_message),
}
CLIENT_EVENTS: Final = frozenset(_CHECKS)
"""All types that a client may send."""
