"""One turn of the CLI as Managed Agents events (wire reference 2.6, 3.1, 3.4). Pure.

`TurnTranslator.feed` takes the frames of a turn in order and gives what to write into the event log and what to show at
once and forget (previews of the message in flight). The status of the session is not its matter: when the turn is over,
`outcome` says how it ended, and whoever runs the session knows whether more is queued.

The CLI is untrusted and newer than this file one day: what is not understood gives nothing, and never an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from claude_wrapper.wire import managed_tools
from claude_wrapper.wire.managed_mcp import McpStatus
from claude_wrapper.wire.managed_tools import ToolCall
from claude_wrapper.wire.merge import SYNTHETIC_MODEL, FrameLike
from claude_wrapper.wire.usage import Usage

Event = dict[str, Any]
Decide = Callable[[str, Any], str]
"""(name as the CLI has it, input) → `allow`, `ask` or `deny`: the server's own policy, known before the CLI asks."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call that was published."""

    event_id: str
    tool_use_id: str
    kind: str
    """`custom` (the client runs it), `sandbox` (the worker of a self-hosted environment does), `sandbox_ask` (it does
    once a person allows it), `approval` (a person must allow it) or `tool`."""
    thread_id: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the message in flight. `start`: its first sign; then text from `offset` (in characters) on."""

    event_id: str
    type: str
    text: str = ""
    offset: int = 0
    start: bool = False


@dataclass(slots=True)
class Output:
    """What one frame gives rise to."""

    events: list[Event] = field(default_factory=list)
    """To be written, in order; with `id` and `type`, without `processed_at`."""
    previews: list[Delta] = field(default_factory=list)
    """To be shown before `events`."""
    calls: list[Call] = field(default_factory=list)
    results: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Results of calls that the server ran: (the model's id of the call, its content and is_error)."""
    settled: bool = False
    """A model message is complete: all its tool calls are known now."""
    threads: list[tuple[str, str, str]] = field(default_factory=list)
    """Sub-agents that came or went: (thread id, name, status)."""
    thread_id: str | None = None
    """The sub-agent whose previews these are; None: the session's own agent."""

    def __bool__(self) -> bool:
        return bool(self.events or self.previews or self.settled or self.threads)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a turn ended: the `stop_reason` of the idle session, and the error event that goes before it."""

    stop_reason: Mapping[str, Any]
    stop_details: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None


END_TURN: Final[Mapping[str, Any]] = {"type": "end_turn"}
EXHAUSTED: Final[Mapping[str, Any]] = {"type": "retries_exhausted"}


def error_event(kind: str, message: str, retry: str = "exhausted", **more: Any) -> Mapping[str, Any]:
    """The `error` of a session.error event. `retry`: retrying, exhausted or terminal."""
    return {"type": kind, "message": message, "retry_status": {"type": retry}, **more}


def upstream_error(status: int | None, message: str) -> Mapping[str, Any]:
    """The error of a turn whose model request failed for good."""
    kind = {429: "model_rate_limited_error", 529: "model_overloaded_error", 402: "billing_error"}.get(
        status or 0, "model_request_failed_error" if status else "unknown_error"
    )
    return error_event(kind, message)


class TurnTranslator:
    """The state of one turn. Feed it every frame."""

    def __init__(self, new_id: Callable[[str], str], decide: Decide, servers: McpStatus | None = None) -> None:
        """`new_id("sevt")` makes identifiers; `decide` is the permission policy; `servers` outlive the turn."""
        self.outcome: Outcome | None = None
        """Set by the `result` frame."""
        self.usage = Usage()
        """Of the finished model requests, as the process tells it (bills are made from what the broker saw)."""
        self._new_id = new_id
        self._decide = decide
        self._main = _Stream(self, None)
        self._children: dict[str, _Stream] = {}
        self._names: dict[str, str] = {}
        self._calls: dict[str, tuple[str, str]] = {}  # the model's id -> (event id, kind of ToolCall)
        self._done: set[str] = set()
        self._servers = servers or McpStatus()
        self.reused: set[str] = set()
        """The model's ids of calls of MCP tools that a kept result answers."""
        self._notice = ""

    @property
    def speaking(self) -> bool:
        """A message of the session's own agent has begun and is not over."""
        return self._main.speaking

    @property
    def goes_on(self) -> bool:
        """The last model message called tools: another model request follows."""
        return self._main.stop.get("stop_reason") == "tool_use"

    def feed(self, frame: FrameLike) -> Output:
        """Everything that this frame means; often nothing."""
        out = Output()
        parent = frame.parent_tool_use_id
        stream = self._main if parent is None else self._child(parent, out)
        out.thread_id = stream.thread
        match frame.type:
            case "stream_event" if frame.event is not None:
                stream.event(bytes(frame.event), out)
            case "assistant":
                stream.assistant(frame.json(), out)
            case "user":
                self._user(stream, frame.json(), out)
            case "system":
                self._system(frame, out)
            case "result" if parent is None:
                self._result(frame.json(), out)
            case _:
                pass
        return out

    def know(self, calls: Mapping[str, tuple[str, str]], *, done: Iterable[str]) -> None:
        """Calls that were published before, in another process: the model's id → (event id, name as the CLI has it).

        `done`: those whose results were published, too.
        """
        self._calls |= {
            one: (event, self._recorded(managed_tools.shown(name, None), self._decide(name, None)))
            for one, (event, name) in calls.items()
        }
        self._done |= set(done)

    def close(self) -> Output:
        """The turn ended without a result (the process died): close what is open."""
        out = Output()
        for stream in (self._main, *self._children.values()):
            stream.end_request(out, failed=True)
        return out

    # Frames --------------------------------------------------------------------------------------------------------

    def _child(self, parent: str, out: Output) -> _Stream:
        """The thread of a sub-agent, announced when it is first seen."""
        stream = self._children.get(parent)
        if stream is None:
            name = self._names.get(parent, "subagent")
            stream = self._children[parent] = _Stream(self, self._new_id("sthr"))
            thread = {"session_thread_id": stream.thread, "agent_name": name}
            out.events += [
                self.made("session.thread_created", **thread),
                self.made("session.thread_status_running", **thread),
            ]
            out.threads.append((str(stream.thread), name, "running"))
        return stream

    def _user(self, stream: _Stream, frame: Mapping[str, Any], out: Output) -> None:
        content = _mapping(frame.get("message")).get("content")
        for block in _items(content):
            if isinstance(block, dict) and block.get("type") == "tool_result":
                self._tool_result(stream, block, out)

    def _tool_result(self, stream: _Stream, block: Mapping[str, Any], out: Output) -> None:
        tool_use_id = str(block.get("tool_use_id"))
        self._end_child(tool_use_id, out)
        known = self._calls.get(tool_use_id)
        if known is None or tool_use_id in self._done:
            return
        self._done.add(tool_use_id)
        event_id, kind = known
        content = managed_tools.result_content(block.get("content"))
        is_error = bool(block.get("is_error", False))
        out.results.append((tool_use_id, {"content": content, "is_error": is_error}))
        if kind in {"custom", "sandbox"}:
            return  # the client's own event (or the worker's) is the record
        name, target = ("agent.mcp_tool_result", "mcp_tool_use_id") if kind == "mcp" else _RESULT
        more = {"cache_hit": True} if kind == "mcp" and tool_use_id in self.reused else {}
        out.events.append(stream.made(name, **{target: event_id}, content=content, is_error=is_error, **more))

    def _end_child(self, tool_use_id: str, out: Output) -> None:
        child = self._children.pop(tool_use_id, None)
        if child is None:
            return
        child.end_request(out, failed=True)
        name = self._names.get(tool_use_id, "subagent")
        thread = {"session_thread_id": child.thread, "agent_name": name}
        out.events.append(self.made("session.thread_status_idle", **thread, stop_reason=dict(END_TURN)))
        out.threads.append((str(child.thread), name, "idle"))

    def _system(self, frame: FrameLike, out: Output) -> None:
        match frame.subtype:
            case "init":
                self._mcp_status([_mapping(one) for one in _items(frame.json().get("mcp_servers"))], out)
            case "compact_boundary":
                out.events.append(self.made("agent.thread_context_compacted"))
            case "api_retry":
                error = error_event("model_request_failed_error", "The model request is tried again.", "retrying")
                out.events += [self.made("session.status_rescheduled"), self.made("session.error", error=dict(error))]
            case _:
                pass

    def _mcp_status(self, servers: list[Mapping[str, Any]], out: Output) -> None:
        for kind, name in self._servers.failures(servers):
            error = error_event(kind, f"The MCP server {name} cannot be used.", "retrying", mcp_server_name=name)
            out.events.append(self.made("session.error", error=dict(error)))
        news = self._servers.news(servers)
        if news is not None:
            out.events.append(self.made("session.mcp_status", servers=news))  # ours: the API has no such event

    def noted(self, event: Mapping[str, Any]) -> Output:
        """An event of the server's own; the CLI's later word about the same MCP server is not news any more."""
        self._servers.noted(event)
        return Output(events=[{"id": self._new_id("sevt"), **event}])

    def _result(self, frame: Mapping[str, Any], out: Output) -> None:
        for child in list(self._children):
            self._end_child(child, out)
        self._main.end_request(out, failed=bool(frame.get("is_error")))
        self.outcome = _outcome(frame, self._main.stop, self._notice)

    # What the streams use --------------------------------------------------------------------------------------------

    def made(self, kind: str, **fields: Any) -> Event:
        """A new event."""
        return {"type": kind, "id": self._new_id("sevt"), **fields}

    def new_id(self) -> str:
        return self._new_id("sevt")

    def tool_use(self, stream: _Stream, block: Mapping[str, Any], out: Output) -> None:
        """Publish a call of a tool; the server's policy decides it before the CLI asks."""
        tool_use_id, name = str(block.get("id")), str(block.get("name"))
        if tool_use_id in self._calls:
            return
        tool_input = block.get("input")
        call = managed_tools.shown(name, tool_input)
        event = stream.made(_CALLS[call.kind], name=call.name, input=call.input)
        if name in _SUBAGENT_TOOLS:
            asked = _mapping(tool_input)
            self._names[tool_use_id] = str(asked.get("subagent_type") or asked.get("description") or "subagent")
        kind = self._judge(call, name, tool_input, event)
        self._calls[tool_use_id] = (event["id"], self._recorded(call, event.get("evaluated_permission")))
        out.calls.append(Call(event["id"], tool_use_id, kind, stream.thread))
        if stream.thread is not None and kind != "tool":
            event["cross_posted"] = True  # the client answers on the session's own stream
        out.events.append(event)

    def _judge(self, call: ToolCall, name: str, tool_input: Any, event: Event) -> str:
        if call.kind == "custom":
            return "custom"
        if call.server is not None:
            event["mcp_server_name"] = self._servers.name(call.server)
        event["evaluated_permission"] = verdict = self._decide(name, tool_input)
        if call.kind == "sandbox":
            return {"allow": "sandbox", "ask": "sandbox_ask"}.get(verdict, "tool")
        return "approval" if verdict == "ask" else "tool"

    @staticmethod
    def _recorded(call: ToolCall, verdict: str | None) -> str:
        """The kind that decides how its result is shown: what is denied never reaches the worker."""
        return "tool" if call.kind == "sandbox" and verdict == "deny" else call.kind

    def server_result(self, stream: _Stream, block: Mapping[str, Any], out: Output) -> None:
        """The result of a tool that the model API ran itself."""
        known = self._calls.get(str(block.get("tool_use_id")))
        if known is not None:
            content = [{"type": "text", "text": msgspec.json.encode(block.get("content")).decode()}]
            out.events.append(stream.made("agent.tool_result", tool_use_id=known[0], content=content, is_error=False))

    def notice(self, frame: Mapping[str, Any]) -> None:
        """The CLI's own words about an error."""
        blocks = _mapping(frame.get("message")).get("content")
        texts = [str(block.get("text", "")) for block in _items(blocks) if isinstance(block, dict)]
        self._notice = "\n".join(filter(None, texts))

    def finished(self, usage: Usage) -> None:
        self.usage = self.usage + usage


class _Stream:
    """The model requests of one thread."""

    def __init__(self, turn: TurnTranslator, thread: str | None) -> None:
        self.thread = thread
        """None: the session's primary thread."""
        self.stop: dict[str, Any] = {}
        self._turn = turn
        self._span: str | None = None
        self._message: str | None = None  # id of the model message in work
        self._usage = Usage()
        self._open: list[tuple[str, str]] = []  # previewed blocks that have no event yet: (kind, event id)
        self._by_index: dict[int, str] = {}
        self._offsets: dict[str, int] = {}

    @property
    def speaking(self) -> bool:
        return self._span is not None

    def made(self, kind: str, **fields: Any) -> Event:
        event = self._turn.made(kind, **fields)
        if self.thread is not None:
            event["session_thread_id"] = self.thread
        return event

    def event(self, raw: bytes, out: Output) -> None:
        """One event of the Messages stream."""
        if raw.startswith(_DELTA):
            if b'"text_delta"' in raw:
                self._text_delta(raw, out)
            return
        data = _object(raw)
        match data.get("type"):
            case "message_start":
                self._begin(_mapping(data.get("message")), out)
            case "content_block_start":
                self._block_start(data, out)
            case "content_block_delta":
                self._text_delta(raw, out)
            case "message_delta":
                self._usage = self._usage.updated(_mapping(data.get("usage")))
                self.stop = dict(_mapping(data.get("delta")))
            case "message_stop":
                self.end_request(out, failed=False)
            case _:
                pass

    def assistant(self, frame: Mapping[str, Any], out: Output) -> None:
        """A finished content block (or several)."""
        message = _mapping(frame.get("message"))
        if message.get("model") == SYNTHETIC_MODEL or frame.get("is_api_error_message"):
            self._turn.notice(frame)
            return
        if message.get("id") != self._message:  # repeated by the CLI in one piece, or without partial messages
            self._begin(message, out)
        for block in _items(message.get("content")):
            if isinstance(block, dict):
                self._block(block, out)
        if message.get("stop_reason") is not None:
            self.stop = {"stop_reason": message["stop_reason"], "stop_details": message.get("stop_details")}

    def end_request(self, out: Output, *, failed: bool) -> None:
        """The model message is complete, or will never be."""
        if self._span is None:
            return
        usage = self._usage
        end = self.made("span.model_request_end", model_request_start_id=self._span, is_error=failed)
        end["model_usage"] = {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cache_creation_input_tokens": usage.cache_write_5m_tokens + usage.cache_write_1h_tokens,
            "cache_read_input_tokens": usage.cache_read_tokens,
        }
        out.events.append(end)
        out.settled = not failed
        self._turn.finished(usage)
        self._span, self._usage = None, Usage()
        self._open.clear()
        self._by_index.clear()
        self._offsets.clear()

    def _begin(self, message: Mapping[str, Any], out: Output) -> None:
        self.end_request(out, failed=True)
        start = self.made("span.model_request_start")
        self._span = start["id"]
        self._message = message.get("id")
        self._usage = Usage.from_wire(_mapping(message.get("usage")))
        self.stop = {}
        out.events.append(start)

    def _block_start(self, data: Mapping[str, Any], out: Output) -> None:
        kind = _PREVIEWED.get(str(_mapping(data.get("content_block")).get("type")))
        if kind is None or self._span is None:
            return
        event_id = self._turn.new_id()
        self._open.append((kind, event_id))
        index = data.get("index")
        if kind == "agent.message" and isinstance(index, int):
            self._by_index[index] = event_id
            self._offsets[event_id] = 0
        out.previews.append(Delta(event_id, kind, start=True))

    def _text_delta(self, raw: bytes, out: Output) -> None:
        data = _object(raw)
        text, index = _mapping(data.get("delta")).get("text"), data.get("index")
        event_id = self._by_index.get(index) if isinstance(index, int) else None
        if event_id is None or not isinstance(text, str) or not text:
            return
        offset = self._offsets[event_id]
        self._offsets[event_id] = offset + len(text)
        out.previews.append(Delta(event_id, "agent.message", text, offset))

    def _block(self, block: Mapping[str, Any], out: Output) -> None:
        match block.get("type"):
            case "text":
                event_id = self._previewed("agent.message")
                if event_id is not None or block.get("text"):
                    content = [{"type": "text", "text": str(block.get("text", ""))}]
                    out.events.append(self._named(event_id, "agent.message", content=content))
            case "thinking" | "redacted_thinking":
                out.events.append(self._named(self._previewed("agent.thinking"), "agent.thinking"))
            case "tool_use" | "server_tool_use":
                self._turn.tool_use(self, block, out)
            case str(kind) if kind.endswith("_tool_result"):
                self._turn.server_result(self, block, out)
            case _:
                pass

    def _named(self, event_id: str | None, kind: str, **fields: Any) -> Event:
        event = self.made(kind, **fields)
        if event_id is not None:
            event["id"] = event_id
        return event

    def _previewed(self, kind: str) -> str | None:
        """The id that the preview of this block was shown under: blocks finish in the order in which they began."""
        for at, (open_kind, event_id) in enumerate(self._open):
            if open_kind == kind:
                del self._open[at]
                return event_id
        return None


def _outcome(result: Mapping[str, Any], stop: Mapping[str, Any], notice: str) -> Outcome:
    subtype, reason = result.get("subtype"), stop.get("stop_reason") or result.get("stop_reason")
    if reason == "refusal":
        details = stop.get("stop_details")
        return Outcome({"type": "refusal"}, details if isinstance(details, Mapping) else None)
    if subtype == "error_max_turns":
        text = "The turn made as many model requests as it may."
        return Outcome(EXHAUSTED, error=error_event("tool_use_limit_reached_error", text))
    if subtype == "error_max_budget_usd":
        return Outcome({"type": "budget_reached"})
    if str(result.get("terminal_reason", "")).startswith("aborted"):
        return Outcome(END_TURN)
    if not result.get("is_error"):
        return Outcome(END_TURN)
    status = result.get("api_error_status")
    message = notice or str(result.get("result") or "The turn failed.")
    return Outcome(EXHAUSTED, error=upstream_error(status if isinstance(status, int) else None, message))


_DELTA: Final = b'{"type":"content_block_delta"'
_RESULT: Final = ("agent.tool_result", "tool_use_id")
_CALLS: Final[Mapping[str, str]] = {
    "custom": "agent.custom_tool_use",
    "sandbox": "agent.tool_use",
    "mcp": "agent.mcp_tool_use",
    "tool": "agent.tool_use",
}
_SUBAGENT_TOOLS: Final = frozenset({"Task", "Agent"})
_PREVIEWED: Final[Mapping[str, str]] = {
    "text": "agent.message",
    "thinking": "agent.thinking",
    "redacted_thinking": "agent.thinking",
}
_EMPTY: Final[Mapping[str, Any]] = {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else _EMPTY


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _object(raw: bytes) -> Mapping[str, Any]:
    try:
        return _mapping(msgspec.json.decode(raw))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _EMPTY


def delta_frames(delta: Delta) -> Iterable[Event]:
    """The stream-only events of a preview."""
    if delta.start:
        yield {"type": "event_start", "event": {"type": delta.type, "id": delta.event_id}}
    if delta.text:
        content = {"type": "content_delta", "index": 0, "content": {"type": "text", "text": delta.text}}
        yield {"type": "event_delta", "event_id": delta.event_id, "delta": content}
