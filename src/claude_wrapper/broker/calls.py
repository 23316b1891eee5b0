"""What the broker talks about: credentials, who a slot works for, a turn, and what happened upstream."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from claude_wrapper.wire.usage import Usage

STREAM_CUT = "stream_cut"
"""Error type of a call whose stream broke off after it had begun (its status is the upstream's 200)."""
DONE_BY_CLIENT = 499
"""Status of a call that the process, or the turn's end, cut before it was answered."""


ANY_MODEL = "*"


class CredentialKind(enum.StrEnum):
    """How a credential is presented upstream."""

    API_KEY = "api_key"
    """`x-api-key`."""
    OAUTH = "oauth"
    """`Authorization: Bearer` with the beta `oauth-2025-04-20`."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A real upstream credential. It never reaches a process."""

    id: str
    kind: CredentialKind
    secret: str = field(repr=False)
    base_url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Further headers for this upstream; they replace those of the process."""
    provider: str = "anthropic"
    cache: CacheTerms | None = None
    """What the organisation lets be answered from the cache; None: no answer of a model."""
    standby: Standby | None = field(default=None, repr=False)
    """What the organisation lets stand in for it; None: nothing."""


class CacheUse(enum.StrEnum):
    """What a request wants of the cache."""

    USE = "use"
    """An answer that was given before will do, and this one may be kept."""
    REFRESH = "refresh"
    """Ask, and keep what is answered."""
    BYPASS = "bypass"
    """Ask, and keep nothing."""


@dataclass(frozen=True, slots=True)
class CacheTerms:
    """Which answers may be kept (`keeping.Ways`), and for how many seconds."""

    answers: str
    seconds: float
    share: bool = False
    """Whether the organisation shares with others what may be shared."""


@dataclass(frozen=True, slots=True)
class Standby:
    """What may be asked instead of a credential, or of the model that was asked for, before the first byte."""

    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """In order, by the model that was asked for; `*`: for every other one."""
    credentials: tuple[Credential, ...] = field(default=(), repr=False)

    def models_after(self, model: str) -> tuple[str, ...]:
        """What may be asked instead of `model`."""
        return self.models.get(model, self.models.get(ANY_MODEL, ()))


@dataclass(frozen=True, slots=True)
class Binding:
    """Who a slot works for; set at claim, cleared at release."""

    org: str
    workspace: str | None
    key_id: str | None
    user: str | None
    session: str
    credential: Credential
    allowed_models: frozenset[str] | None = None
    """Models that the caller's key may use, as a `Principal` has them: no other one may stand in; None: any."""


@dataclass(frozen=True, slots=True)
class TurnContext:
    """What holds for the requests of one turn."""

    turn: str
    model: str
    """The only one that the process may ask for."""
    system: list[dict[str, Any]] | None = None
    """System blocks that take the place of the placeholder block; None removes it."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields merged into the main request's body (`max_tokens`, `temperature`, …); None removes a field."""
    trace: Mapping[str, str] = field(default_factory=dict)
    """Trace headers (`traceparent`, `tracestate`) for the upstream request."""
    cache: CacheUse | None = None
    """What the caller wants of the cache for the turn's own requests; None: what the organisation's policy says."""
    notes: dict[str, str] = field(default_factory=dict, compare=False)
    """Written by the broker, told to the caller as response headers: what was not done as it was asked."""
    placeholder: bool = False
    """Whether the process was primed with the placeholder: then only a request that carries it is the main one."""


@dataclass(frozen=True, slots=True)
class UpstreamCall:
    """One call to an upstream, after all its attempts: what was really asked, answered and used."""

    id: str
    turn: str | None
    session: str
    org: str
    workspace: str | None
    key_id: str | None
    user: str | None
    credential_id: str
    path: str
    model: str
    """The model that was asked for; empty for the model list."""
    status: int
    """The upstream's own status; 502 unreachable, 504 no answer in time, 503 breaker open, 499 cut by the process."""
    error_type: str | None
    error_message: str | None
    upstream_request_id: str | None
    usage: Usage
    started_at: datetime
    first_byte_seconds: float | None
    total_seconds: float
    attempts: int
    """Upstream requests sent; 0: the broker refused before it asked anybody."""
    stream_complete: bool
    """Whether the answer arrived whole; for a stream: up to `message_stop`."""
    main: bool
    """Whether this was (a step of) the turn's own request, not a side request of the CLI."""
    asked_model: str | None = None
    """The model that the caller named, where another one answered; `model` is who answered."""
    cache_hit: bool = False
    """It was answered from the cache: nothing was sent, nothing was used."""
    saved: Usage = field(default_factory=Usage)
    """What the kept answer had used: what a hit saved."""
    retry_after: float | None = None
    """Seconds that the upstream, the gate or the breaker asked to wait."""
    stop_reason: str | None = None


class Reservation(Protocol):
    """Room in a budget, held for one call. Exactly one of the two methods is called, once."""

    async def settle(self, call: UpstreamCall) -> None:
        """The call was sent: replace the estimate by what it used."""
        ...

    async def cancel(self) -> None:
        """Nothing was sent: give the room back."""
        ...


class Gate(Protocol):
    """Whether a call may be made."""

    async def reserve(self, binding: Binding, turn: TurnContext | None, model: str, estimate: Usage) -> Reservation:
        """Hold room for a call, or raise BudgetExceeded, RateLimited, PermissionDenied, …"""
        ...


class CallSink(Protocol):
    """Where calls are written down: the ledger."""

    async def record(self, call: UpstreamCall) -> None:
        """Called exactly once per call that was sent. A caller that stops waiting does not take the call with it."""
        ...


class Observer:
    """Hooks for telemetry. This one does nothing: subclass and override what matters.

    Hooks are called on the event loop, must be quick and must not raise.
    """

    def first_byte(self, binding: Binding, turn: TurnContext | None, seconds: float) -> None:
        """The first byte of an answer went to the process."""

    def finished(self, call: UpstreamCall) -> None:
        """A call ended; also those that the broker refused (`attempts == 0`)."""

    def retrying(self, binding: Binding, attempt: int, status: int, delay: float) -> None:
        """Attempt number `attempt` failed with `status`; the next begins in `delay` seconds."""

    def fell_back(self, binding: Binding, kind: str, status: int, asked: str, instead: str) -> None:
        """`asked` (a model or the id of a credential, by `kind`) failed with `status`; `instead` is asked now."""

    def hedged(self, binding: Binding) -> None:
        """A slow read was asked a second time."""

    def retries_spent(self, binding: Binding, status: int) -> None:
        """An attempt that failed with `status` was not repeated: the credential or the upstream has no retries left."""

    def breaker(self, upstream: str, credential_id: str, state: str) -> None:
        """A breaker changed its state to closed, open or half_open."""

    def model_refused(self, binding: Binding, model: str, asked: str) -> None:
        """A process whose turn is for `model` asked for something else; `asked` says what."""

    def egress(self, slot: str, host: str, port: int, allowed: bool, reason: str) -> None:
        """A process asked to connect to `host:port` through the egress proxy."""

    def mcp_message(self, method: str, outcome: str, seconds: float) -> None:
        """A message that the server sent to a remote MCP server for a process; `outcome` is one of `bridge.Outcome`."""

    def late(self, where: str) -> None:
        """Something takes longer than it is waited for; it goes on."""

    def fault(self, where: str, error: BaseException) -> None:
        """Something raised that should not have; the call was answered with an error."""


class NoGate:
    """A gate that lets everything through: a server without budgets."""

    async def reserve(self, binding: Binding, turn: TurnContext | None, model: str, estimate: Usage) -> Reservation:
        return _NoReservation()


class _NoReservation:
    async def settle(self, call: UpstreamCall) -> None:
        return None

    async def cancel(self) -> None:
        return None


class NoSink:
    """A sink that forgets: a server without a ledger."""

    async def record(self, call: UpstreamCall) -> None:
        return None
