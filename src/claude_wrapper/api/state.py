"""What the routes work with: one frozen object, made by the composition root."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request

from claude_wrapper.api.forward import Forwarder
from claude_wrapper.broker.calls import Credential
from claude_wrapper.broker.direct import Direct
from claude_wrapper.clock import Clock
from claude_wrapper.errors import Draining
from claude_wrapper.ids import Ids
from claude_wrapper.limits import Admission
from claude_wrapper.pool.pool import Pool
from claude_wrapper.sandbox.security import SecurityLevels, SecurityPolicy
from claude_wrapper.sessions.conversations import Conversations
from claude_wrapper.sessions.managed import ManagedSessions
from claude_wrapper.sessions.process import SlotProcess
from claude_wrapper.sessions.remotes import RemoteServers
from claude_wrapper.sessions.resources.mcptokens import McpTokens
from claude_wrapper.sessions.resources.means import ResourceMeans
from claude_wrapper.sessions.selfhosted.queue import WorkQueue
from claude_wrapper.sessions.versions import Versions
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.state import SharedState
from claude_wrapper.telemetry.metrics import Metrics
from claude_wrapper.tenancy.audit import Origin, Scribe
from claude_wrapper.tenancy.deletion import Eraser
from claude_wrapper.tenancy.keyformat import Pepper
from claude_wrapper.tenancy.keyring import KeyRing
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.usage import PriceBook, Reports
from claude_wrapper.vault.credentials import Rules
from claude_wrapper.vault.orgkeys import OrgKeys
from claude_wrapper.vault.resolve import Resolver
from claude_wrapper.wire.extensions import OAuthCredentials


class Credentials(Protocol):
    """Which upstream credential a request is served with."""

    async def choose(
        self, principal: Principal, oauth: OAuthCredentials | None, *, named: str | None = None
    ) -> Credential:
        """Raises PermissionDenied for OAuth tokens that are not allowed, CredentialMissing when there is none, NotFound
        for a `named` one that does not serve the caller."""
        ...

    def owner_of(self, oauth: OAuthCredentials) -> Principal:
        """The caller that these tokens identify. Raises PermissionDenied when OAuth is not allowed."""
        ...


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """What the routes need to know of the settings."""

    max_body_bytes: int
    turn_seconds: float | None
    max_processes_per_org: int
    queue_seconds: float
    queue_length: int
    model_aliases: Mapping[str, str]
    metrics_public: bool = False


class Tenants(Protocol):
    """Everything about tenants, running (`app.tenants.Tenants`)."""

    @property
    def database(self) -> Database: ...

    @property
    def state(self) -> SharedState: ...

    @property
    def keyring(self) -> KeyRing: ...

    @property
    def pepper(self) -> Pepper: ...

    @property
    def org_keys(self) -> OrgKeys: ...

    @property
    def resolver(self) -> Resolver: ...

    @property
    def vault_rules(self) -> Rules: ...

    @property
    def admission(self) -> Admission: ...

    @property
    def prices(self) -> PriceBook: ...

    @property
    def reports(self) -> Reports: ...


class Lifecycle(Protocol):
    """Whether the server takes new work."""

    @property
    def draining(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Deps:
    """The collaborators of every route."""

    settings: ApiSettings
    conversations: Conversations
    pool: Pool[SlotProcess]
    direct: Direct
    credentials: Credentials
    authenticate: Callable[[Request], Awaitable[Principal]]
    tenants: Tenants
    sessions: ManagedSessions
    work_queue: WorkQueue
    versions: Versions
    forwarder: Forwarder
    resources: ResourceMeans
    mcp_tokens: McpTokens
    remotes: RemoteServers
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    security: Callable[[str], Awaitable[SecurityPolicy]]
    """What an organisation's agents may do."""
    security_levels: SecurityLevels
    security_report: Callable[[SecurityPolicy], dict[str, Any]]
    health: Callable[[], Awaitable[dict[str, Any]]]
    metrics: Metrics
    refuse_while_shut: Callable[[Credential], None]
    """Raises UpstreamUnavailable while the circuit breaker of this credential's upstream is open."""
    protect: Callable[[], None]
    """Raises PoolOverloaded while a new turn would endanger those that run."""
    lifecycle: Lifecycle
    clock: Clock
    ids: Ids
    version: str
    erasers: tuple[Eraser, ...] = ()
    """What else an organisation's end erases, beside what the routes know of."""

    def scribe(self, request: Request) -> Scribe:
        """Who changes something, from where, for the audit log."""
        origin = Origin(
            address=request.client.host if request.client else None,
            user_agent=request.headers.get("user-agent"),
            request_id=str(request.scope.get("request_id")),
        )
        return Scribe(self.clock, self.ids, origin)

    def refuse_when_draining(self) -> None:
        """Before each new turn. Raises Draining once the server is shutting down, PoolOverloaded while it is short of memory."""
        if self.lifecycle.draining:
            self.metrics.requests_shed.inc(reason="draining")
            raise Draining("the server is shutting down; send the request again", retry_after=1)
        self.protect()


def deps_of(request: Request) -> Deps:
    """The collaborators, from the application that serves this request."""
    deps = request.app.state.deps
    assert isinstance(deps, Deps)  # noqa: S101 - set by create_app
    return deps
