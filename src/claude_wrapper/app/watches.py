"""What happens in the rooms, as metrics, log lines and spans. Each class is a port of one room, filled in.

The rooms tell facts and know nothing of names, labels or formats; those are decided here and in `telemetry.metrics`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Final
from urllib.parse import urlsplit

import structlog

from claude_wrapper.agent.launch import Auth, LaunchProfile
from claude_wrapper.api.metrics import dialect_of
from claude_wrapper.api.middleware import RequestWatch, Seen
from claude_wrapper.api.middleware import Watch as RequestsWatch
from claude_wrapper.broker.calls import Binding, CallSink, Gate, Observer, Reservation, TurnContext, UpstreamCall
from claude_wrapper.clock import Clock
from claude_wrapper.errors import (
    AgentCrashed,
    AgentTimeout,
    BudgetExceeded,
    OutputLimitExceeded,
    RateLimited,
    WrapperError,
)
from claude_wrapper.sessions.leg import Leg, Started
from claude_wrapper.sessions.process import ProcessFactory, Resume, SlotProcess
from claude_wrapper.sessions.spec import Owner, TurnInput
from claude_wrapper.sessions.watch import TurnWatch
from claude_wrapper.sessions.watch import Watch as TurnsWatch
from claude_wrapper.telemetry import context, genai
from claude_wrapper.telemetry.metrics import Metrics
from claude_wrapper.telemetry.traceparent import HEADER, STATE_HEADER, TraceContext, parse
from claude_wrapper.telemetry.tracing import Span, Tracer
from claude_wrapper.usage import PriceBook
from claude_wrapper.wire.streamjson import Frame
from claude_wrapper.wire.usage import Usage

log = structlog.get_logger("claude_wrapper")

_DOLLAR: Final = 1_000_000
_REMEMBERED_TURNS: Final = 1_000
"""Turns whose place in a trace is known a little longer than they run: their last calls are booked after them."""
_RETRY_REASONS: Final[Mapping[int, str]] = {429: "rate_limited", 529: "overloaded", 502: "connect", 504: "timeout"}
_OUTCOMES: Final[tuple[tuple[type[WrapperError], str], ...]] = (
    (AgentCrashed, "crashed"),
    (AgentTimeout, "timed_out"),
    (OutputLimitExceeded, "over_limit"),
    (BudgetExceeded, "over_limit"),
    (RateLimited, "over_limit"),
)


def provider_of(base_url: str) -> str:
    """Whose API a base URL is: a label's value."""
    host = urlsplit(base_url).hostname or ""
    return "anthropic" if host == "anthropic.com" or host.endswith(".anthropic.com") else "custom"


class ModelNames:
    """Models as label values: the listed name, or the listed beginning of the name."""

    def __init__(self, listed: Sequence[str]) -> None:
        self._listed = sorted(listed, key=len, reverse=True)

    def label(self, model: str) -> str:
        return next((one for one in self._listed if model.startswith(one)), model)


class Requests(RequestsWatch):
    """Requests: `pooled_requests_total`, durations, one canonical line each, the server's span."""

    def __init__(self, metrics: Metrics, tracer: Tracer) -> None:
        self._metrics = metrics
        self._tracer = tracer

    def routes(self, templates: tuple[str, ...]) -> None:
        self._metrics.learn_routes(templates)

    def request(self, seen: Seen, headers: Mapping[str, str]) -> RequestWatch:
        return _Request(self._metrics, self._tracer, seen, headers)


class _Request:
    __slots__ = ("_dialect", "_metrics", "_open", "_span")

    def __init__(self, metrics: Metrics, tracer: Tracer, seen: Seen, headers: Mapping[str, str]) -> None:
        self._metrics = metrics
        self._dialect = dialect_of(seen.path)
        metrics.requests_in_flight.inc(dialect=self._dialect)
        self._open = ExitStack()
        parent = parse(headers.get(HEADER), headers.get(STATE_HEADER))
        self._span = self._open.enter_context(tracer.span(seen.method, kind="server", parent=parent))
        where = self._span.context
        if where is not None:
            self._open.enter_context(context.traced(where))
            self._open.enter_context(context.bound(trace_id=where.trace_id))

    def ended(self, seen: Seen) -> None:
        metrics, fields = self._metrics, seen.fields
        status, org = str(seen.status), fields.get("org")
        metrics.requests_in_flight.inc(-1, dialect=self._dialect)
        metrics.requests.inc(route=seen.route, status=status, dialect=self._dialect, org=org)
        where = self._span.context
        sampled = where.trace_id if where is not None and where.sampled else None
        metrics.request_seconds.observe(seen.seconds, route=seen.route, trace_id=sampled)
        if "limit" in fields:
            metrics.limits_hit.inc(limit=str(fields["limit"]), scope=str(fields.get("scope")), org=org)
        self._span.set(genai.METHOD, seen.method)
        self._span.set(genai.ROUTE, seen.route)
        self._span.set(genai.STATUS, seen.status)
        write = log.info if seen.status < 500 else log.warning
        if seen.first_byte is not None:
            fields = {**fields, "first_byte_seconds": round(seen.first_byte, 4)}
        write(
            "request.completed",
            method=seen.method,
            route=seen.route,
            status=seen.status,
            seconds=round(seen.seconds, 4),
            **fields,
        )
        if seen.status >= 500:
            self._span.fail(str(fields.get("error", seen.status)))
        self._open.close()


class Turns(TurnsWatch):
    """Turns: counts, times to the first token, one canonical line each, spans `invoke_agent` and `execute_tool`."""

    def __init__(self, metrics: Metrics, tracer: Tracer, clock: Clock, *, tools: bool) -> None:
        """`tools`: look into the CLI's messages for the tools that it runs (for their spans)."""
        self.metrics = metrics
        self.tracer = tracer
        self.clock = clock
        self.tools = tools
        self._places: OrderedDict[str, TraceContext] = OrderedDict()

    def begin(self, owner: Owner, session: str, turn_input: TurnInput) -> TurnWatch:
        return _Turn(self, owner, session, turn_input)

    def place(self, turn: str, where: TraceContext) -> None:
        """The turn's upstream calls belong there."""
        self._places[turn] = where
        while len(self._places) > _REMEMBERED_TURNS:
            self._places.popitem(last=False)

    def place_of(self, turn: str | None) -> TraceContext | None:
        """Where in a trace a turn is or was."""
        return self._places.get(turn) if turn else None


class _Turn(TurnWatch):
    def __init__(self, turns: Turns, owner: Owner, session: str, turn_input: TurnInput) -> None:
        self._turns = turns
        self._owner = owner
        self._session = session
        self._model = turn_input.model
        self._agent = turn_input.spec.profile.name
        self._began = turns.clock.monotonic()
        self._started: Started | None = None
        self._first_token: float | None = None
        self._events = 0
        self._tools: dict[str, tuple[str, Any, float]] = {}
        turns.metrics.turns_in_flight.inc()
        self._scope: AbstractContextManager[Span] = turns.tracer.span(
            genai.span_name(genai.INVOKE_AGENT, self._agent),
            parent=context.trace(),
            attributes={
                genai.OPERATION: genai.INVOKE_AGENT,
                genai.PROVIDER: genai.ANTHROPIC,
                genai.REQUEST_MODEL: self._model,
                genai.CONVERSATION: session,
                genai.AGENT_NAME: self._agent,
            },
        )
        self._span = self._scope.__enter__()

    @property
    def trace(self) -> Mapping[str, str]:
        where = self._span.context
        return where.headers() if where is not None else {}

    def started(self, started: Started) -> None:
        self._started = started
        metrics = self._turns.metrics
        metrics.claims.inc(kind=started.kind, org=self._owner.org)
        metrics.claim_seconds.observe(started.waited_seconds, kind=started.kind)
        if (where := self._span.context) is not None:
            self._turns.place(started.turn, where)

    def frame(self, frame: Frame, events: Sequence[bytes]) -> None:
        self._events += 1
        if self._first_token is None and any(b"content_block_delta" in event for event in events):
            self._first_token = self._turns.clock.monotonic() - self._began
        if self._turns.tools and frame.type in ("assistant", "user"):
            self._note_tools(frame)

    def _note_tools(self, frame: Frame) -> None:
        content = frame.json().get("message", {}).get("content")
        now = self._turns.clock.monotonic()
        for block in content if isinstance(content, list) else ():
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "tool_use" and len(self._tools) < 1_000:
                self._tools[str(block.get("id"))] = (str(block.get("name")), self._turns.clock.now(), now)
            elif kind == "tool_result":
                used = self._tools.pop(str(block.get("tool_use_id")), None)
                if used is not None:
                    self._tool_ended(str(block.get("tool_use_id")), used, now, failed=bool(block.get("is_error")))

    def _tool_ended(self, call: str, used: tuple[str, Any, float], now: float, *, failed: bool) -> None:
        name, at, began = used
        self._turns.tracer.past(
            genai.span_name(genai.EXECUTE_TOOL, name),
            began=at,
            seconds=now - began,
            parent=self._span.context,
            attributes={genai.OPERATION: genai.EXECUTE_TOOL, genai.TOOL_NAME: name, genai.TOOL_CALL_ID: call},
            failed="tool_error" if failed else None,
        )

    def ended(self, leg: Leg) -> None:
        metrics = self._turns.metrics
        seconds = self._turns.clock.monotonic() - self._began
        outcome, started, error = self._outcome(leg), self._started, leg.error
        metrics.turns_in_flight.inc(-1)
        metrics.turns.inc(outcome=outcome, org=self._owner.org)
        metrics.turn_seconds.observe(seconds, outcome=outcome)
        metrics.turn_events.observe(self._events)
        if started is not None and self._first_token is not None:
            metrics.turn_first_token_seconds.observe(self._first_token, kind=started.kind)
        fields: dict[str, Any] = {
            "org": self._owner.org,
            "session": self._session,
            "model": self._model,
            "outcome": outcome,
            "events": self._events,
            "seconds": round(seconds, 4),
        }
        if started is not None:
            waited = round(started.waited_seconds, 4)
            fields |= {"turn": started.turn, "process": started.kind, "pid": started.pid, "waited_seconds": waited}
        if self._first_token is not None:
            fields["first_token_seconds"] = round(self._first_token, 4)
        if error is not None:
            fields["error"] = error.code
            self._span.fail(error.code)
        (log.warning if outcome in ("failed", "crashed") else log.info)("turn.completed", **fields)
        self._scope.__exit__(None, None, None)

    def _outcome(self, leg: Leg) -> str:
        error = leg.error
        if self.interrupted or (error is not None and error.code == "turn_interrupted"):
            return "abandoned" if leg.gone else "interrupted"
        if error is None:
            return "completed"
        return next((outcome for kind, outcome in _OUTCOMES if isinstance(error, kind)), "failed")


class Calls(Observer):
    """What the broker sees: upstream calls, retries, breakers, MCP; spans `chat`."""

    def __init__(self, metrics: Metrics, tracer: Tracer, turns: Turns, models: ModelNames) -> None:
        self._metrics = metrics
        self._tracer = tracer
        self._turns = turns
        self._models = models

    def finished(self, call: UpstreamCall) -> None:
        metrics, model = self._metrics, self._models.label(call.model)
        if call.cache_hit:
            log.info("upstream.from_cache", org=call.org, session=call.session, turn=call.turn, call=call.id)
            return
        answered = call.first_byte_seconds is not None or call.upstream_request_id is not None
        status = str(call.status) if answered or call.status in (499, 503) else "0"
        metrics.upstream_calls.inc(model=model, status=status)
        metrics.upstream_seconds.observe(call.total_seconds, model=model)
        if call.first_byte_seconds is not None:
            metrics.upstream_first_byte_seconds.observe(call.first_byte_seconds, model=model)
        where = self._turns.place_of(call.turn)
        if where is not None:
            self._span(call, where)
        log.info(
            "upstream.completed",
            org=call.org,
            session=call.session,
            turn=call.turn,
            call=call.id,
            model=call.model,
            asked_model=call.asked_model,
            status=call.status,
            error=call.error_type,
            attempts=call.attempts,
            upstream_request=call.upstream_request_id,
            input_tokens=call.usage.prompt_tokens,
            output_tokens=call.usage.output_tokens,
            seconds=round(call.total_seconds, 4),
        )

    def model_refused(self, binding: Binding, model: str, asked: str) -> None:
        self._metrics.upstream_models_refused.inc()
        log.warning("upstream.model_refused", org=binding.org, session=binding.session, model=model, asked=asked)

    def _span(self, call: UpstreamCall, where: TraceContext) -> None:
        self._tracer.past(
            genai.span_name(genai.CHAT, call.model),
            began=call.started_at,
            seconds=call.total_seconds,
            kind="client",
            parent=where,
            attributes={
                genai.OPERATION: genai.CHAT,
                genai.PROVIDER: genai.ANTHROPIC,
                genai.REQUEST_MODEL: call.model,
                genai.CONVERSATION: call.session,
                genai.STATUS: call.status,
                genai.INPUT_TOKENS: call.usage.prompt_tokens,
                genai.OUTPUT_TOKENS: call.usage.output_tokens,
                genai.CACHE_READ_TOKENS: call.usage.cache_read_tokens,
            },
            failed=call.error_type,
        )

    def retrying(self, binding: Binding, attempt: int, status: int, delay: float) -> None:
        del attempt, delay
        self._metrics.upstream_retries.inc(reason=_RETRY_REASONS.get(status, "server_error"))
        log.info("upstream.retried", org=binding.org, session=binding.session, status=status)

    def fell_back(self, binding: Binding, kind: str, status: int, asked: str, instead: str) -> None:
        self._metrics.upstream_fallbacks.inc(kind=kind)
        log.warning(
            "upstream.fell_back",
            org=binding.org,
            session=binding.session,
            kind=kind,
            status=status,
            asked=asked,
            instead=instead,
        )

    def hedged(self, binding: Binding) -> None:
        self._metrics.upstream_hedges.inc()

    def retries_spent(self, binding: Binding, status: int) -> None:
        self._metrics.retries_refused.inc()
        log.warning("upstream.no_retries_left", org=binding.org, session=binding.session, status=status)

    def breaker(self, upstream: str, credential_id: str, state: str) -> None:
        provider = provider_of(upstream)
        if state == "open":
            self._metrics.breaker_openings.inc(provider=provider)
        log.warning("upstream.breaker_changed", provider=provider, credential_id=credential_id, state=str(state))

    def mcp_message(self, method: str, outcome: str, seconds: float) -> None:
        step = _MCP_STEPS.get(method, "other")
        self._metrics.mcp_calls.inc(step=step, outcome=outcome)
        self._metrics.mcp_call_seconds.observe(seconds, step=step)

    def late(self, where: str) -> None:
        log.warning("broker.late", where=where)

    def fault(self, where: str, error: BaseException) -> None:
        log.error("broker.failed", where=where, exc_info=error)


_MCP_STEPS: Final = {"initialize": "connect", "tools/list": "list", "tools/call": "call"}


class CountedSink(CallSink):
    """The ledger, with tokens and cost counted on the way."""

    def __init__(self, ledger: CallSink, prices: PriceBook, metrics: Metrics, models: ModelNames) -> None:
        self._ledger = ledger
        self._prices = prices
        self._metrics = metrics
        self._models = models

    async def record(self, call: UpstreamCall) -> None:
        # Before anything is waited for: a caller that gives up costs a figure, not a row.
        row = asyncio.ensure_future(self._ledger.record(call))
        model = self._models.label(call.model)
        for kind, count in tokens(call.usage):
            if count:
                self._metrics.tokens.inc(count, model=model, kind=kind, org=call.org)
        if call.cache_hit:
            await self._saved(call)
        micros = await self._prices.micros(call.org, call.model, call.usage, call.started_at)
        if micros:
            self._metrics.cost.inc(micros / _DOLLAR, model=model, org=call.org)
        await row

    async def _saved(self, call: UpstreamCall) -> None:
        kind = "token_count" if call.path.endswith("/count_tokens") else "upstream"
        if count := call.saved.prompt_tokens + call.saved.output_tokens:
            self._metrics.cache_saved_tokens.inc(count, cache=kind, org=call.org)
            micros = await self._prices.micros(call.org, call.model, call.saved, call.started_at)
            self._metrics.cache_saved_cost.inc(micros / _DOLLAR, cache=kind, org=call.org)


def tokens(usage: Usage) -> tuple[tuple[str, int], ...]:
    """Counts by the words of `metrics.TOKEN_KINDS`."""
    return (
        ("input", usage.input_tokens),
        ("output", usage.output_tokens),
        ("cache_read", usage.cache_read_tokens),
        ("cache_write_5m", usage.cache_write_5m_tokens),
        ("cache_write_1h", usage.cache_write_1h_tokens),
        ("thinking", usage.thinking_tokens),
    )


class CountedGate(Gate):
    """The gate of budgets and token rates, with its refusals counted: the process hears of them, not the request."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def reserve(self, binding: Binding, turn: TurnContext | None, model: str, estimate: Usage) -> Reservation:
        try:
            return await self._gate.reserve(binding, turn, model, estimate)
        except WrapperError as error:
            if "limit" in error.details:
                scope = str(error.details.get("scope"))
                self._metrics.limits_hit.inc(limit=str(error.details["limit"]), scope=scope, org=binding.org)
            raise


class TimedFactory:
    """The factory of processes, with starts and lives timed."""

    def __init__(self, factory: ProcessFactory, metrics: Metrics, clock: Clock) -> None:
        self._factory = factory
        self._metrics = metrics
        self._clock = clock
        self._living: set[asyncio.Task[None]] = set()

    async def spawn(self, slot: str, profile: LaunchProfile, resume: Resume | None) -> SlotProcess:
        name = profile_label(profile)
        began = self._clock.monotonic()
        try:
            process = await self._factory.spawn(slot, profile, resume)
        except BaseException:
            self._metrics.spawn_failures.inc(profile=name)
            raise
        ready = self._clock.monotonic()
        self._metrics.spawn_seconds.observe(ready - began, profile=name)
        living = asyncio.get_running_loop().create_task(self._live(process, began), name=f"life-{slot}")
        self._living.add(living)
        living.add_done_callback(self._living.discard)
        return process

    async def _live(self, process: SlotProcess, began: float) -> None:
        await process.agent.closed.wait()
        self._metrics.process_uptime.observe(self._clock.monotonic() - began)

    async def close(self) -> None:
        """Stop watching; the processes have been ended by the pool."""
        for task in tuple(self._living):
            task.cancel()
        await asyncio.gather(*self._living, return_exceptions=True)


def profile_label(profile: LaunchProfile) -> str:
    """The profile as a label's value: one of `metrics.PROFILES`."""
    return f"{profile.name}_oauth" if profile.auth is Auth.OAUTH else profile.name


class Follower:
    """Turns a number that only grows, kept elsewhere, into a counter."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], float] = {}

    def follow(self, key: tuple[str, ...], now: float, add: Callable[[float], None]) -> None:
        """`add` gets what has come since the last call with this key."""
        grown = now - self._last.get(key, 0)
        if grown > 0:
            self._last[key] = now
            add(grown)
