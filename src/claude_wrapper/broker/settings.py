"""The numbers that bound the broker. One frozen value, built by `config`."""

from __future__ import annotations

from dataclasses import dataclass

from claude_wrapper.broker.addresses import Network


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """Bounds of the broker; every field gives unit and reason."""

    connect_seconds: float = 10.0
    """Time for name, TCP and TLS of one upstream attempt."""
    read_seconds: float = 300.0
    """Longest silence of an upstream that was asked; it pings a stream every few seconds, a non-streaming answer can
    think for minutes."""
    stall_seconds: float = 300.0
    """Longest time that a process may leave its answer unread before the call is cut."""
    receive_seconds: float = 60.0
    """Time for a process to send the head and body of one request."""
    finish_seconds: float = 5.0
    """Bound of each clean-up: settling a budget, writing the ledger, closing a connection."""

    max_head_bytes: int = 64 * 1024
    """Request line and headers together; the CLI sends about 1 kB."""
    max_body_bytes: int = 34 * 1024 * 1024
    """The Messages API takes 32 MB; above this the broker answers 413 by itself."""
    max_connections: int = 64
    """Connections per endpoint; the CLI keeps a handful."""
    max_calls: int = 32
    """Requests in work per endpoint; further ones get 429."""
    max_buffered_bytes: int = 128 * 1024 * 1024
    """Request bodies held in memory per endpoint."""
    write_buffer_bytes: int = 256 * 1024
    """Answer bytes held for a process that does not read; above this the upstream is paused."""
    max_kept_bytes: int = 2 * 1024 * 1024
    """Largest answer that is kept in memory on its way so that it can be cached."""
    max_error_bytes: int = 256 * 1024
    """How much of an upstream error body is read."""

    retry_attempts: int = 4
    """Upstream attempts per call, the first included."""
    retry_seconds: float = 30.0
    """Total time that a call may spend before its last attempt begins."""
    retry_base_seconds: float = 0.5
    """First delay; doubled with each attempt, then jittered."""
    retry_max_delay_seconds: float = 8.0
    """Longest single delay that the broker picks by itself."""
    retry_budget_ratio: float = 0.2
    """Retries per call that a credential may spend in the long run, so that retries cannot multiply an outage."""
    retry_budget_reserve: float = 10.0
    """Retries that a credential always has before the ratio bites."""
    upstream_retry_reserve: float = 50.0
    """The same for all credentials of one upstream together, whose retries are the same share of their calls."""

    hedge_seconds: float = 0.0
    """Token counts and model lists that take longer are asked a second time, and the faster answer counts; 0: never."""

    breaker_failures: int = 5
    """Consecutive failures after which the breaker opens."""
    breaker_seconds: float = 60.0
    """How long an open breaker waits before it lets one probe through."""

    permitted_networks: tuple[Network, ...] = ()
    """The operator's own networks that MCP servers and egress may reach although they are private."""

    estimate_output_tokens: int = 8192
    """Output tokens that are reserved for a call at most; the CLI asks for 128,000 and rarely gets near."""
