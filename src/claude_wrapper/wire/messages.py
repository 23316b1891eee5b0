"""Requests to `/v1/messages`: bytes to a validated `MessagesRequest`, and back to JSON where it is passed on.

Only the envelope is validated. Content blocks stay as they came, because the API grows new kinds faster than we do;
fields that are not known here are kept in `extra`. Every refusal is an `InvalidRequest` that names the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn

import msgspec

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.wire.extensions import (
    AgentOptions,
    McpServer,
    OAuthCredentials,
    check_session_id,
    parse_mcp_servers,
)
from claude_wrapper.wire.history import new_messages_start

MAX_MESSAGES = 100_000  # wire-api 0.10
MAX_DEPTH = 100  # levels of nesting inside one block or field: nothing later may run out of stack
MIN_THINKING_TOKENS = 1024  # wire-api 1.1

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Object = dict[str, Any]


class Message(msgspec.Struct, frozen=True):
    """One turn. `content` is a string or content blocks, untouched."""

    role: Literal["user", "assistant", "system"]
    content: str | list[_Object]

    def blocks(self) -> list[_Object]:
        """The content as blocks; a string is one text block."""
        return [{"type": "text", "text": self.content}] if isinstance(self.content, str) else self.content

    def to_wire(self) -> _Object:
        """`{"role", "content"}`."""
        return {"role": self.role, "content": self.content}


class MessagesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A valid request. Treat as immutable. None means that the field was absent or null."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    messages: list[Message]
    """Consecutive turns of one role are already merged, as the API does. The last one is not the assistant's."""
    max_tokens: _Count | None = None
    system: str | list[_Object] | None = None
    stream: bool = False
    stop_sequences: list[str] | None = None
    thinking: _Object | None = None
    output_config: _Object | None = None
    tools: list[_Object] | None = None
    tool_choice: _Object | None = None
    metadata: _Object | None = None
    temperature: _Share | None = None
    top_p: _Share | None = None
    top_k: _Count | None = None
    cache_control: _Object | None = None
    container: str | _Object | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    speed: str | None = None
    diagnostics: _Object | None = None
    # Our extensions:
    agent: AgentOptions | None = None
    session_id: str | None = None
    oauth_credentials: OAuthCredentials | None = None
    mcp_servers_raw: Any = msgspec.field(default=None, name="mcp_servers")
    """As it came; `mcp_servers` is the checked form."""
    extra: _Object = msgspec.field(default_factory=dict, name="*extra")  # a name that no API field has
    """Fields that are not known here, beta ones among them."""

    @property
    def mcp_servers(self) -> tuple[McpServer, ...]:
        """The MCP servers, whichever of the two forms named them."""
        return parse_mcp_servers(self.mcp_servers_raw)

    def history(self) -> list[Message]:
        """The messages up to the last assistant turn: what an earlier request already showed."""
        return self.messages[: new_messages_start(self.messages)]

    def new_messages(self) -> list[Message]:
        """The messages after the last assistant turn."""
        return self.messages[new_messages_start(self.messages) :]

    def system_blocks(self) -> list[_Object]:
        """The system prompt as text blocks; empty when there is none."""
        if not self.system:
            return []
        return [{"type": "text", "text": self.system}] if isinstance(self.system, str) else self.system

    def json_schema(self) -> _Object | None:
        """The schema that `output_config.format` asks for."""
        wanted = (self.output_config or {}).get("format")
        return wanted["schema"] if wanted else None

    def thinking_budget(self) -> int | None:
        """Tokens of thinking asked for: 0 when disabled, None when the model is to decide."""
        match (self.thinking or {}).get("type"):
            case "enabled":
                return int((self.thinking or {})["budget_tokens"])
            case "disabled":
                return 0
            case _:
                return None

    def overrides(self) -> dict[str, Any]:
        """The given fields that the CLI cannot express and only the upstream request can carry."""
        return {name: value for name in OVERRIDES if (value := getattr(self, name)) is not None}


OVERRIDES = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stop_sequences",
    "tool_choice",
    "metadata",
    "thinking",
    "output_config",
    "service_tier",
    "inference_geo",
    "speed",
)
"""Fields for the broker's per-turn overrides."""

_FIELDS = frozenset(MessagesRequest.__struct_encode_fields__) - {"*extra"}
_DECODER = msgspec.json.Decoder(MessagesRequest)
_NESTED = ("system", "output_config", "tools", "tool_choice", "metadata", "diagnostics", "container", "thinking")
_THINKING = frozenset({"adaptive", "enabled", "disabled", "between_tools"})
_TOOL_CHOICES = frozenset({"auto", "any", "tool", "none"})


def parse_messages_request(body: bytes, *, max_tokens_required: bool = True) -> MessagesRequest:
    """The request that these bytes hold. Raises InvalidRequest, which names the field.

    `max_tokens_required=False` is for the endpoints of our own.
    """
    try:
        request = _DECODER.decode(body)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        request = _decode_carefully(body)  # unknown fields, nulls, or something to explain
    if request.max_tokens is None and max_tokens_required:
        raise InvalidRequest("is required", field="max_tokens")
    if request.session_id is not None:
        check_session_id(request.session_id)
    if request.mcp_servers_raw is not None:
        parse_mcp_servers(request.mcp_servers_raw)
    if _check_messages(request.messages, held=request.session_id is not None or _continues_thread(request.extra)):
        request.messages = merge_turns(request.messages)
    _check_options(request)
    return request


def _decode_carefully(body: bytes) -> MessagesRequest:
    """As the fast path, but unknown fields are set aside, null counts as absent, and errors are explained."""
    raw = _decode_object(body)
    extra = {name: raw.pop(name) for name in raw.keys() - _FIELDS}
    _check_depth(extra, "", MAX_DEPTH)
    given = {name: value for name, value in raw.items() if value is not None}
    try:
        request = msgspec.convert(given, MessagesRequest)
    except msgspec.ValidationError as error:
        _refuse(error, given)
    except RecursionError:
        raise InvalidRequest("The body nests too deeply") from None
    request.extra = extra
    return request


def _continues_thread(extra: Mapping[str, Any]) -> bool:
    thread = extra.get("thread")
    return isinstance(thread, dict) and thread.get("type") == "continue"


def merge_turns(messages: list[Message]) -> list[Message]:
    """Consecutive turns of one role become one, block after block."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            merged[-1] = Message(message.role, [*merged[-1].blocks(), *message.blocks()])
        else:
            merged.append(message)
    return merged


def _decode_object(body: bytes) -> _Object:
    try:
        raw = msgspec.json.decode(body)
    except RecursionError:
        raise InvalidRequest("The body nests too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidRequest("The body must be a JSON object")
    return raw


# Messages ------------------------------------------------------------------------------------------------------------


def _check_messages(messages: list[Message], *, held: bool) -> bool:
    """Whether consecutive turns of one role have to be merged.

    `held`: the server holds earlier turns, so tool results may answer calls that are not in this request.
    """
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"holds {len(messages)} messages; at most {MAX_MESSAGES} are allowed", field="messages")
    calls: set[str] | None = None if held else set()
    last = spoken = ""
    mergeable = False
    for index, message in enumerate(messages):
        role, content = message.role, message.content
        mergeable = mergeable or role == last
        last = role
        if role != "system":
            if not spoken and role != "user":
                raise InvalidRequest("the first message must have the role 'user'", field=f"messages[{index}].role")
            spoken = role
        if isinstance(content, str):
            if not content or content.isspace():
                raise InvalidRequest("must not be empty", field=f"messages[{index}].content")
            if calls:
                calls = _pair(calls, role, set(), set(), index)
            continue
        if not content and role != "system":
            raise InvalidRequest("must not be empty", field=f"messages[{index}].content")
        used, answered = _check_blocks(content, index)
        if used or answered or calls:
            calls = _pair(calls, role, used, answered, index)
    if not spoken:
        raise InvalidRequest("at least one user message is required", field="messages")
    if spoken == "assistant":
        raise InvalidRequest(
            "the last message has the role 'assistant': prefilling the answer cannot be expressed here; "
            "end with a 'user' message",
            field=f"messages[{len(messages) - 1}].role",
        )
    return mergeable


def _check_blocks(blocks: Sequence[_Object], message: int) -> tuple[set[str] | None, set[str] | None]:
    """The ids of the tool calls and of the tool results among the blocks; None when there are none."""
    used: set[str] | None = None
    answered: set[str] | None = None
    for index, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "text":
            text = block.get("text")
            if not isinstance(text, str) or not text or text.isspace():
                raise InvalidRequest("must be a non-empty string", field=f"messages[{message}].content[{index}].text")
            if len(block) == 2:
                continue
        elif not isinstance(kind, str):
            path = f"messages[{message}].content[{index}].type"
            raise InvalidRequest("is required and must be a string", field=path)
        elif kind == "tool_use":
            used = (used or set()) | {_identifier(block, "id", f"messages[{message}].content[{index}]")}
        elif kind == "tool_result":
            answer = _identifier(block, "tool_use_id", f"messages[{message}].content[{index}]")
            answered = (answered or set()) | {answer}
        for name, value in block.items():
            if isinstance(value, dict | list):
                _check_depth(value, f"messages[{message}].content[{index}].{name}", MAX_DEPTH)
    return used, answered


def _pair(
    calls: set[str] | None, role: str, used: set[str] | None, answered: set[str] | None, index: int
) -> set[str] | None:
    """The calls that are open after this message; None while earlier turns are held by the server."""
    if role == "system":
        return calls
    if role == "assistant":
        return (calls or set()) | (used or set())
    if calls is None:
        return None
    if unknown := (answered or set()) - calls:
        raise InvalidRequest(
            f"the tool result for {min(unknown)!r} has no tool call in the assistant message before it",
            field=f"messages[{index}].content",
        )
    if open_calls := calls - (answered or set()):
        raise InvalidRequest(
            f"the tool call {min(open_calls)!r} of the assistant message before it has no tool result",
            field=f"messages[{index}].content",
        )
    return set()


def _identifier(block: _Object, name: str, path: str) -> str:
    value = block.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidRequest("must be a non-empty string", field=f"{path}.{name}")
    return value


def _check_depth(value: Any, path: str, left: int) -> None:
    if left == 0:
        raise InvalidRequest(f"nests deeper than {MAX_DEPTH} levels", field=path or None)
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            _check_depth(inner, path, left - 1)


# The other fields ----------------------------------------------------------------------------------------------------


def _check_options(request: MessagesRequest) -> None:
    if isinstance(request.system, list):
        for index, block in enumerate(request.system):
            if block.get("type") != "text" or not isinstance(block.get("text"), str):
                raise InvalidRequest("must be a text block", field=f"system[{index}]")
    if request.thinking is not None:
        _check_thinking(request.thinking, request.max_tokens)
    if request.output_config is not None:
        _check_output_config(request.output_config)
    for index, tool in enumerate(request.tools or ()):
        if not isinstance(tool.get("name", tool.get("type")), str):
            raise InvalidRequest("is required and must be a string", field=f"tools[{index}].name")
    if request.tool_choice is not None:
        kind = request.tool_choice.get("type")
        if not isinstance(kind, str) or kind not in _TOOL_CHOICES:
            raise InvalidRequest("must be auto, any, tool or none", field="tool_choice.type")
        if kind == "tool" and not isinstance(request.tool_choice.get("name"), str):
            raise InvalidRequest("is required and must be a string", field="tool_choice.name")
    for name in _NESTED:
        if isinstance(value := getattr(request, name), dict | list):
            _check_depth(value, name, MAX_DEPTH)


def _check_thinking(thinking: _Object, max_tokens: int | None) -> None:
    kind = thinking.get("type")
    if not isinstance(kind, str) or kind not in _THINKING:
        raise InvalidRequest("must be adaptive, enabled, disabled or between_tools", field="thinking.type")
    if kind != "enabled":
        return
    budget = thinking.get("budget_tokens")
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < MIN_THINKING_TOKENS:
        raise InvalidRequest(f"must be an integer of at least {MIN_THINKING_TOKENS}", field="thinking.budget_tokens")
    if max_tokens is not None and budget >= max_tokens:
        raise InvalidRequest(f"must be less than max_tokens ({max_tokens})", field="thinking.budget_tokens")


def _check_output_config(config: _Object) -> None:
    effort = config.get("effort")
    if effort is not None and not isinstance(effort, str):
        raise InvalidRequest("must be a string", field="output_config.effort")
    wanted = config.get("format")
    if wanted is None:
        return
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        raise InvalidRequest("must be 'json_schema'", field="output_config.format.type")
    if not isinstance(wanted.get("schema"), dict):
        raise InvalidRequest("is required and must be an object", field="output_config.format.schema")


# Refusals ------------------------------------------------------------------------------------------------------------

_AT = re.compile(r" - at `\$\.?(.*)`\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_ELEMENTS: Mapping[str, Any] = {
    "messages": Message,
    "tools": _Object,
    "stop_sequences": str,
    "content": _Object,
    "system": _Object,
}


def _refuse(error: msgspec.ValidationError, raw: Any) -> NoReturn:
    """Raise msgspec's finding in our words. It writes `[...]` for a list index: the index is looked up here."""
    text = str(error)
    found = _AT.search(text)
    reason, path = (text[: found.start()], found[1]) if found else (text, "")
    path = _with_indices(path, raw)
    if missing := _MISSING.match(reason):
        raise InvalidRequest("is required", field=f"{path}.{missing[1]}".removeprefix(".")) from None
    raise InvalidRequest(reason[:1].lower() + reason[1:], field=path or None) from None


def _with_indices(path: str, value: Any) -> str:
    done = ""
    while "[...]" in path:
        before, _, path = path.partition("[...]")
        for name in before.strip(".").split("."):
            value = value.get(name) if isinstance(value, dict) else None
        kind = _ELEMENTS.get(before.rpartition(".")[2])
        index = _first_bad(value, kind) if isinstance(value, list) and kind is not None else None
        done += f"{before}[{'…' if index is None else index}]"
        value = value[index] if index is not None and isinstance(value, list) else None
    return done + path


def _first_bad(items: Sequence[Any], kind: Any) -> int | None:
    for index, item in enumerate(items):
        try:
            msgspec.convert(item, kind)
        except msgspec.ValidationError:
            return index
    return None
