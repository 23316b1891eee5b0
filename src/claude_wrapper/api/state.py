"""What the routes work with: one frozen object, made by the composition root."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request

from claude_wrapper.broker.calls import Credential
from claude_wrapper.broker.direct import Direct
from claude_wrapper.clock import Clock
from claude_wrapper.errors import Draining
from claude_wrapper.ids import Ids
from claude_wrapper.pool.pool import Pool
from claude_wrapper.sandbox.security import SecurityPolicy
from claude_wrapper.sessions.conversations import Conversations
from claude_wrapper.sessions.process import SlotProcess
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.wire.extensions import OAuthCredentials


class Credentials(Protocol):
    """Which upstream credential a request is served with."""

    async def choose(self, principal: Principal, oauth: OAuthCredentials | None) -> Credential:
        """Raises PermissionDenied for OAuth tokens that are not allowed, CredentialMissing when there is none."""
        ...

    def owner_of(self, oauth: OAuthCredentials) -> Principal:
        """The caller that these tokens identify. Raises PermissionDenied when OAuth is not allowed."""
        ...


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """What the routes need to know of the settings."""

    max_body_bytes: int
    allow_oauth: bool
    turn_seconds: float
    max_processes_per_org: int
    queue_seconds: float
    queue_length: int
    default_model: str
    model_aliases: Mapping[str, str]


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
    admit: Callable[[Request, Principal, str], Awaitable[None]]
    policy: SecurityPolicy
    security_report: Callable[[], dict[str, Any]]
    health: Callable[[], dict[str, Any]]
    lifecycle: Lifecycle
    clock: Clock
    ids: Ids
    version: str

    def refuse_when_draining(self) -> None:
        """Raises Draining once the server is shutting down."""
        if self.lifecycle.draining:
            raise Draining("the server is shutting down; send the request again", retry_after=1)


def deps_of(request: Request) -> Deps:
    """The collaborators, from the application that serves this request."""
    deps = request.app.state.deps
    assert isinstance(deps, Deps)  # noqa: S101 - set by create_app
    return deps
