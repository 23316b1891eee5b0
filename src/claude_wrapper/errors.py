"""Every failure that a caller can meet, as a fact with a stable code.

The classes know nothing of HTTP: `claude_wrapper.api.errors` maps each code to a status and a body per dialect, and a
test says that the table is complete. The default message of a class is the first line of its docstring.
Messages name the field, the limit or the cause, and what to do; they never hold a secret.
"""

from __future__ import annotations

from typing import Any, ClassVar


class WrapperError(Exception):
    """Something went wrong in the server."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    """Whether the same request may succeed later without a change by the caller."""

    def __init__(
        self,
        message: str | None = None,
        *,
        retry_after: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        """`retry_after` is in seconds; `details` are JSON values that callers may branch on."""
        self.message = message or (type(self).__doc__ or type(self).__name__).strip().splitlines()[0]
        self.retry_after = retry_after
        self.details = details or {}
        super().__init__(self.message)


# What the caller sent ------------------------------------------------------------------------------------------------


class InvalidRequest(WrapperError):
    """The request is not valid."""

    code = "invalid_request"

    def __init__(self, message: str | None = None, *, field: str | None = None, **kw: Any) -> None:
        """`field` is the path of the offending field, as in `messages[2].role`."""
        self.field = field
        super().__init__(f"{field}: {message}" if field and message else message, **kw)


class RequestTooLarge(WrapperError):
    """The request body is larger than this endpoint accepts."""

    code = "request_too_large"


class NotFound(WrapperError):
    """There is no such thing, or it belongs to somebody else."""

    code = "not_found"


class Conflict(WrapperError):
    """The request does not fit the present state."""

    code = "conflict"


class MemoryPreconditionFailed(Conflict):
    """The memory has other content than the request expects."""

    code = "memory_precondition_failed"


class MemoryPathConflict(Conflict):
    """Another memory stands at this path, or where a directory is needed."""

    code = "memory_path_conflict"


class PreconditionFailed(WrapperError):
    """The precondition that the request named does not hold."""

    code = "precondition_failed"


# Who the caller is -----------------------------------------------------------------------------------------------------


class AuthenticationFailed(WrapperError):
    """The API key is missing, wrong, expired or revoked."""

    code = "authentication_failed"


class PermissionDenied(WrapperError):
    """The caller may not do this."""

    code = "permission_denied"


class CredentialMissing(WrapperError):
    """No upstream credential is configured for this caller."""

    code = "credential_missing"


# What limits say -------------------------------------------------------------------------------------------------------


class RateLimited(WrapperError):
    """A rate limit was reached."""

    code = "rate_limited"
    retryable = True


class BudgetExceeded(WrapperError):
    """A spending cap was reached."""

    code = "budget_exceeded"


class PoolOverloaded(WrapperError):
    """All processes are busy and the waiting queue is full."""

    code = "pool_overloaded"
    retryable = True


class PoolTimeout(WrapperError):
    """No process became free within the queueing time."""

    code = "pool_timeout"
    retryable = True


class Draining(WrapperError):
    """The server is shutting down and takes no new work."""

    code = "draining"
    retryable = True


# The process -----------------------------------------------------------------------------------------------------------


class SpawnFailed(WrapperError):
    """The Claude process could not be started."""

    code = "spawn_failed"
    retryable = True


class AgentCrashed(WrapperError):
    """The Claude process ended in the middle of a turn."""

    code = "agent_crashed"
    retryable = True


class AgentProtocolError(WrapperError):
    """The Claude process wrote something that cannot be read."""

    code = "agent_protocol_error"
    retryable = True


class AgentTimeout(WrapperError):
    """The Claude process did not answer in time."""

    code = "agent_timeout"
    retryable = True


class TurnInterrupted(WrapperError):
    """The turn was interrupted before it ended."""

    code = "turn_interrupted"


class OutputLimitExceeded(WrapperError):
    """The process printed more than a turn may."""

    code = "output_limit_exceeded"


# Upstream --------------------------------------------------------------------------------------------------------------


class UpstreamError(WrapperError):
    """The model API answered with an error."""

    code = "upstream_error"

    def __init__(
        self,
        message: str | None = None,
        *,
        status: int,
        error_type: str = "api_error",
        upstream_request_id: str | None = None,
        **kw: Any,
    ) -> None:
        """`status` and `error_type` are upstream's own; both are passed on to the caller."""
        self.status = status
        self.error_type = error_type
        self.upstream_request_id = upstream_request_id
        super().__init__(message, **kw)


class UpstreamUnavailable(WrapperError):
    """The model API cannot be reached or its circuit breaker is open."""

    code = "upstream_unavailable"
    retryable = True


# The server itself -----------------------------------------------------------------------------------------------------


class ConfigurationError(WrapperError):
    """A setting is unknown or its value cannot be used."""

    code = "configuration_error"


class SandboxUnavailable(WrapperError):
    """This host cannot enforce the sandbox that was asked for."""

    code = "sandbox_unavailable"


class StorageUnavailable(WrapperError):
    """The database or the blob store cannot be reached."""

    code = "storage_unavailable"
    retryable = True


class LeaseLost(WrapperError):
    """Another replica took this session over: this one may write nothing for it any more."""

    code = "lease_lost"
    retryable = True


class HeldElsewhere(LeaseLost):
    """Another replica holds this session."""

    code = "held_elsewhere"

    def __init__(self, message: str | None = None, *, holder: str, address: str | None, **kw: Any) -> None:
        """`holder` is the replica's id, `address` the URL by which it is reached (None: it cannot be)."""
        self.holder = holder
        self.address = address
        super().__init__(message, **kw)


class SnapshotCorrupted(WrapperError):
    """A stored snapshot cannot be read back."""

    code = "snapshot_corrupted"


class VaultSealed(WrapperError):
    """The master key of the vault is missing or wrong."""

    code = "vault_sealed"


class IllegalTransition(WrapperError):
    """An event arrived that this state does not allow."""

    code = "illegal_transition"
