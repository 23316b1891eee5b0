"""Every metric of the server, declared once: names, labels, the values that labels may take, and the text rendering.

`docs/metrics.md` is rendered from these declarations, and the dashboard and the alert rules under `deploy/` are checked
against them. Each `Metrics` has a registry of its own: a test may build as many as it likes.

Counters and histograms are pushed by the rooms that own the fact. What has a present value somewhere (the pool's
processes, this process's descriptors) is pulled when somebody scrapes: see `telemetry.collectors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from claude_wrapper.telemetry.families import OTHER, Declaration, Declarations

_log = structlog.get_logger("claude_wrapper.telemetry")

_CODES: Final = (
    *(200, 201, 202, 204, 206, 304, 400, 401, 402, 403, 404, 405, 408, 409, 410, 412, 413, 415, 422, 424, 429, 499),
    *(500, 501, 502, 503, 504, 529),
)
STATUSES: Final = tuple(str(code) for code in _CODES)
"""HTTP statuses that the server answers or meets; 499 is a caller who hung up."""
DIALECTS: Final = ("anthropic", "sessions", "admin", "operations")
CLAIM_KINDS: Final = ("warm", "reused", "spare", "cold")
CLAIM_FAILURES: Final = ("overloaded", "timeout", "draining", "spawn_failed", "foreign", "cancelled")
PROCESS_STATES: Final = (
    *("starting", "spare", "busy", "idle", "frozen", "detached", "hibernating", "rewinding", "stopping"),
)
"""The pool's own states; `frozen` are those of the others that get no CPU now."""
PROFILES: Final = ("chat", "chat_oauth", "agent", "agent_oauth")
EVICTION_REASONS: Final = (
    *("idle", "capacity", "org_limit", "principal_limit", "memory", "profile", "reuse", "age", "turns", "resident"),
    *("surplus", "asked", "discarded", "crashed", "not_clean", "unclaimed", "closed"),
)
"""The pool's own words (`pool.slot.Reason`); a test compares them."""
TURN_OUTCOMES: Final = ("completed", "failed", "interrupted", "abandoned", "crashed", "timed_out", "over_limit")
PROVIDERS: Final = ("anthropic", "bedrock", "vertex", "foundry", "custom")
BREAKER_STATES: Final = ("closed", "open", "half_open")
RETRY_REASONS: Final = ("rate_limited", "overloaded", "server_error", "connect", "timeout", "credential")
FALLBACKS: Final = ("model", "credential")
TOKEN_KINDS: Final = ("input", "output", "cache_read", "cache_write_5m", "cache_write_1h", "thinking")
CACHES: Final = ("upstream", "tool", "token_count", "models")
CACHE_OUTCOMES: Final = ("hit", "miss", "joined", "shared", "error")
"""`joined`: somebody else was being answered the same, and the answer was shared."""
LIMITS: Final = (
    "requests",
    "input_tokens",
    "output_tokens",
    "concurrent_turns",
    "processes",
    "sessions",
    "budget",
    "queue",
    "body",
)
UNCHECKED: Final = ("rates", "concurrency", "budgets")
SCOPES: Final = ("key", "user", "workspace", "organization", "session", "server")
BUDGET_SHARES: Final = ("0", "0.5", "0.8", "0.95", "1")
"""A share that a budget's owner chose counts as the next lower one of these."""
LEASE_STEPS: Final = ("acquired", "renewed", "released", "lost", "taken_over")
SESSION_STATES: Final = ("running", "idle", "hibernated")
SNAPSHOT_STEPS: Final = ("save", "restore", "collect")
SNAPSHOT_OUTCOMES: Final = ("ok", "unchanged", "given_up", "previous", "none", "error")
"""`given_up`: a turn began before the save had ended; `previous`: the last snapshot was damaged."""
OUTCOMES: Final = ("ok", "error")
MCP_STEPS: Final = ("connect", "list", "call", "other")
MCP_OUTCOMES: Final = (
    "ok",
    "authentication",
    "forbidden",
    "unreachable",
    "timeout",
    "too_large",
    "status",
    "protocol",
)
SHED_REASONS: Final = ("memory", "pressure", "lag", "draining")
AUTH_FAILURES: Final = ("missing", "malformed", "unknown", "expired", "revoked", "scope", "login")
LOG_LEVELS: Final = ("debug", "info", "warning", "error", "critical")
CLI_VERSIONS: Final = ("main", "canary")
CANARY_STATES: Final = ("running", "rolled_back", "promoted")
OPEN_LABELS: Final = frozenset({"route", "model", "profile", "version"})
"""Labels whose values the composition root lists: the documentation names their source instead."""
HEALTH_CHECKS: Final = ("pool", "processes", "memory", "disk", "database", "redis", "blobs", "upstream", "loop")

MAX_LISTED: Final = 60
"""Routes and models whose series exist from the start; further ones appear with their first value."""

_REQUEST_SECONDS: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TURN_SECONDS: Final = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0)
_FIRST_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_CLAIM_SECONDS: Final = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 15.0, 30.0)
_SPAWN_SECONDS: Final = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0)
_UPTIME_SECONDS: Final = (60.0, 300.0, 600.0, 1800.0, 3600.0, 21600.0)
_STORE_SECONDS: Final = (0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0)
_LAG_SECONDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_EVENTS: Final = (5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1000.0, 5000.0)


class Metrics:
    """All metric families, on one private registry.

    `routes` are the templates of the route table (`/v1/messages`, never a path with an identifier in it); `models` are
    the models of the price table. What is in neither counts as `other`. `version` is the server's own.
    `org_label` gives the families marked in the documentation a label with the organisation's id.
    """

    def __init__(
        self,
        *,
        org_label: bool = False,
        routes: Sequence[str] = (),
        models: Sequence[str] = (),
        profiles: Sequence[str] = PROFILES,
        version: str = "unknown",
    ) -> None:
        self.version: Final = version
        self.registry: Final = CollectorRegistry(auto_describe=False)
        self._pulls: dict[str, Callable[[], None]] = {}
        make = Declarations(self.registry, org_label=org_label)
        self._requests(make, (*routes, OTHER))
        self._pool(make, tuple(profiles))
        self._turns(make)
        self._upstream(make, (*models, OTHER))
        self._spending(make, (*models, OTHER))
        self._keeping(make)
        self._server(make)
        self.declarations: Final[tuple[Declaration, ...]] = make.made

    def _requests(self, make: Declarations, routes: tuple[str, ...]) -> None:
        first = {"route": routes[-MAX_LISTED:], "status": ("200", "429", "500"), "dialect": ("anthropic",)}
        self.requests = make.counter(
            "pooled_requests_total",
            "Answered HTTP requests.",
            org=True,
            precreate=first,
            route=routes,
            status=STATUSES,
            dialect=DIALECTS,
        )
        self.request_seconds = make.histogram(
            "request_duration_seconds",
            "Time from the request's first byte to the answer's last one; a stream counts to its end.",
            _REQUEST_SECONDS,
            precreate={"route": routes[-1:]},
            route=routes,
        )
        self.requests_in_flight = make.gauge(
            "requests_in_flight", "Requests that are being answered.", dialect=DIALECTS
        )
        self.requests_shed = make.counter(
            "requests_shed_total", "Requests refused to protect the machine.", reason=SHED_REASONS
        )
        self.authentication_failures = make.counter(
            "authentication_failures_total", "Callers that were turned away.", reason=AUTH_FAILURES
        )
        self.limits_hit = make.counter(
            "limits_hit_total", "Requests refused by a limit or a budget.", org=True, limit=LIMITS, scope=SCOPES
        )
        self.limits_unchecked = make.counter(
            "limits_without_store_total",
            "Questions to limits that shared state could not answer, by what was done with the request.",
            kind=UNCHECKED,
            outcome=("let_through", "turned_away"),
        )

    def _pool(self, make: Declarations, profiles: tuple[str, ...]) -> None:
        self.pool_size = make.gauge("pool_size", "Claude processes in all, spares included.")
        self.pool_capacity = make.gauge("pool_capacity", "Most processes that the pool may hold.")
        self.pool_processes = make.gauge("pool_processes", "Claude processes by state.", state=PROCESS_STATES)
        self.pool_spares = make.gauge("pool_spares", "Ready processes without a tenant, by profile.", profile=profiles)
        self.pool_waiting = make.gauge("pool_waiting", "Claims that wait for a process.")
        self.pool_memory = make.gauge("pool_memory_bytes", "Resident memory of all Claude processes.")
        self.claims = make.counter(
            "pool_claims_total", "Claims that got a process, by where it came from.", org=True, kind=CLAIM_KINDS
        )
        self.claim_seconds = make.histogram(
            "pool_claim_seconds",
            "Time from a claim to its process, waiting included.",
            _CLAIM_SECONDS,
            kind=CLAIM_KINDS,
        )
        self.claim_failures = make.counter(
            "pool_claim_failures_total", "Claims that got no process.", reason=CLAIM_FAILURES
        )
        self.evictions = make.counter(
            "pool_evictions_total", "Processes that the pool ended, by reason.", reason=EVICTION_REASONS
        )
        self.spawn_seconds = make.histogram(
            "process_spawn_seconds",
            "Time from starting a process to its being usable.",
            _SPAWN_SECONDS,
            profile=profiles,
        )
        self.spawn_failures = make.counter(
            "process_spawn_failures_total", "Processes that could not be started.", profile=profiles
        )
        self.process_uptime = make.histogram(
            "process_uptime_seconds", "Age of Claude processes when they ended.", _UPTIME_SECONDS
        )

    def _turns(self, make: Declarations) -> None:
        self.turns = make.counter("turns_total", "Turns that ended, by how.", org=True, outcome=TURN_OUTCOMES)
        self.turns_in_flight = make.gauge("turns_in_flight", "Turns that are running.")
        self.turn_first_token_seconds = make.histogram(
            "turn_first_token_seconds",
            "Time from a turn's start, its claim included, to its first token.",
            _FIRST_SECONDS,
            kind=CLAIM_KINDS,
        )
        self.turn_seconds = make.histogram(
            "turn_duration_seconds",
            "Time from a turn's start to its result.",
            _TURN_SECONDS,
            outcome=TURN_OUTCOMES,
        )
        self.cli_turns = make.counter(
            "cli_turns_total",
            "Turns by version of the CLI while a canary is tried; errors are those that the CLI is to blame for.",
            version=CLI_VERSIONS,
            outcome=OUTCOMES,
        )
        self.cli_canary = make.gauge(
            "cli_canary", "1 for the state of the new version of the CLI, if there is one.", state=CANARY_STATES
        )
        self.turn_events = make.histogram("turn_events", "Events that one turn produced.", _EVENTS)
        self.sessions = make.gauge("sessions", "Conversations that this replica holds.", state=SESSION_STATES)
        self.requests_forwarded = make.counter(
            "requests_forwarded_total", "Requests that the replica which holds their session answered."
        )
        self.events_unpublished = make.counter(
            "session_events_unpublished_total",
            "Batches of events or previews that no stream was told of because the shared state was away.",
        )

    def _upstream(self, make: Declarations, models: tuple[str, ...]) -> None:
        seen = ("200", "400", "401", "429", "500", "529")
        self.upstream_calls = make.counter(
            "upstream_calls_total",
            "Calls to the model API that got an answer or failed for good; `0` had no answer.",
            precreate={"model": models[-MAX_LISTED:], "status": seen},
            model=models,
            status=("0", *STATUSES),
        )
        first = {"model": models[-1:]}  # a histogram has a dozen series: the models in use make theirs
        self.upstream_seconds = make.histogram(
            "upstream_call_seconds",
            "Time from a call to the last byte of its answer.",
            _TURN_SECONDS,
            precreate=first,
            model=models,
        )
        self.upstream_first_byte_seconds = make.histogram(
            "upstream_first_byte_seconds",
            "Time from a call to the first byte of its answer.",
            _FIRST_SECONDS,
            precreate=first,
            model=models,
        )
        self.upstream_retries = make.counter(
            "upstream_retries_total", "Attempts after the first one, by what made them necessary.", reason=RETRY_REASONS
        )
        self.retries_refused = make.counter(
            "upstream_retries_refused_total",
            "Attempts that were not repeated because the credential's or the upstream's retry budget was spent.",
        )
        self.upstream_hedges = make.counter(
            "upstream_hedges_total", "Slow reads (token counts, model lists) that were asked a second time."
        )
        self.upstream_fallbacks = make.counter(
            "upstream_fallbacks_total",
            "Calls that turned to another model or credential before the first byte.",
            kind=FALLBACKS,
        )
        self.upstream_models_refused = make.counter(
            "upstream_models_refused_total", "Requests of processes for something else than the model of their turn."
        )
        self.breakers = make.gauge(
            "upstream_breakers",
            "Circuit breakers (one per upstream and credential) that have seen failures, by state.",
            provider=PROVIDERS,
            state=BREAKER_STATES,
        )
        self.breaker_openings = make.counter(
            "upstream_breaker_openings_total", "Times that a circuit breaker opened.", provider=PROVIDERS
        )
        self.mcp_calls = make.counter(
            "mcp_calls_total",
            "Messages to remote MCP servers, by what they were for and how they went.",
            step=MCP_STEPS,
            outcome=MCP_OUTCOMES,
        )
        self.mcp_call_seconds = make.histogram(
            "mcp_call_seconds",
            "Time of a message to a remote MCP server, its answer included.",
            _REQUEST_SECONDS,
            step=MCP_STEPS,
        )

    def _spending(self, make: Declarations, models: tuple[str, ...]) -> None:
        first = {"model": models[-MAX_LISTED:], "kind": TOKEN_KINDS}
        self.tokens = make.counter(
            "tokens_total",
            "Tokens, as upstream counted them.",
            org=True,
            precreate=first,
            model=models,
            kind=TOKEN_KINDS,
        )
        self.cost = make.counter(
            "cost_dollars_total",
            "Cost of upstream calls by the price table.",
            org=True,
            precreate={"model": models[-MAX_LISTED:]},
            model=models,
        )
        self.cache_requests = make.counter(
            "cache_requests_total", "Look-ups in the shared caches.", cache=CACHES, outcome=CACHE_OUTCOMES
        )
        self.cache_saved_tokens = make.counter(
            "cache_saved_tokens_total", "Tokens that cache hits saved.", org=True, cache=CACHES
        )
        self.cache_saved_cost = make.counter(
            "cache_saved_dollars_total", "Cost that cache hits saved, by the price table.", org=True, cache=CACHES
        )
        self.cache_bytes = make.gauge("cache_bytes", "Size of the shared caches, where they lie in this process.")
        self.budget_alerts = make.counter(
            "budget_alerts_total",
            "Budgets that reached a share of their cap of which their owner wants to be told; once per window, on one replica.",
            share=BUDGET_SHARES,
        )
        self.ledger_rows = make.counter("ledger_rows_total", "Usage rows written, by outcome.", outcome=OUTCOMES)
        self.ledger_pending = make.gauge("ledger_rows_pending", "Usage rows that are not in the database yet.")

    def _keeping(self, make: Declarations) -> None:
        self.leases_held = make.gauge("leases_held", "Session leases that this replica holds.")
        self.lease_steps = make.counter("lease_steps_total", "What happened to session leases.", step=LEASE_STEPS)
        self.snapshots = make.counter(
            "snapshots_total", "Snapshots written, read and collected.", step=SNAPSHOT_STEPS, outcome=SNAPSHOT_OUTCOMES
        )
        self.snapshots_behind = make.gauge(
            "snapshots_behind", "Sessions of this replica whose last snapshot is older than their last turn."
        )
        self.snapshot_seconds = make.histogram(
            "snapshot_seconds", "Time that a snapshot took.", _STORE_SECONDS, step=SNAPSHOT_STEPS
        )
        self.snapshot_bytes = make.counter(
            "snapshot_bytes_total", "Bytes that snapshots moved, compressed.", step=SNAPSHOT_STEPS
        )

    def _server(self, make: Declarations) -> None:
        self.build = make.gauge("build_info", "Always 1; the label says which version runs.", version=(self.version,))
        self.build.set(1, version=self.version)
        self.started = make.gauge("process_start_time_seconds", "When this server started, in seconds since 1970.")
        self.cpu_seconds = make.gauge("process_cpu_seconds", "CPU time of this server process so far.")
        self.resident_memory = make.gauge("process_resident_memory_bytes", "Resident memory of this server process.")
        self.open_descriptors = make.gauge("process_open_fds", "Open file descriptors of this server process.")
        self.max_descriptors = make.gauge("process_max_fds", "Most file descriptors that it may open.")
        self.children = make.gauge("process_children", "Child processes of this server process.")
        self.threads = make.gauge("process_threads", "Threads of this server process.")
        self.async_tasks = make.gauge("event_loop_tasks", "Unfinished asyncio tasks.")
        self.loop_lag = make.histogram("event_loop_lag_seconds", "How late the event loop woke a timer.", _LAG_SECONDS)
        self.loop_lag_worst = make.gauge("event_loop_lag_worst_seconds", "The worst lag of the last minute.")
        self.draining = make.gauge("server_draining", "1 while the server takes no new work.")
        self.health = make.gauge(
            "health_check",
            "1 when the check passes, 0 when it fails; a check that is not configured has no series.",
            precreate={},
            check=HEALTH_CHECKS,
        )
        self.log_lines = make.counter("log_lines_total", "Log lines written.", level=LOG_LEVELS)
        self.log_lines_dropped = make.counter("log_lines_dropped_total", "Log lines that could not be written.")
        self.pull_errors = make.counter("metrics_pull_errors_total", "Sources of metrics that failed in a scrape.")

    def pull(self, name: str, source: Callable[[], None]) -> None:
        """Call `source` before each rendering; it sets gauges. A second source of the same name replaces the first.

        A source must be quick: it takes a snapshot, it does not wait.
        """
        self._pulls[name] = source

    def refresh(self) -> None:
        """Ask every source now. One that fails is counted and logged; its gauges keep their last values."""
        for name, source in tuple(self._pulls.items()):
            try:
                source()
            except Exception:  # noqa: BLE001 - logged, and one broken source must not hide the other metrics
                self.pull_errors.inc()
                _log.exception("metrics.pull_failed", source=name)

    def learn_routes(self, routes: Iterable[str]) -> None:
        """Take these templates into the route table too: the server knows them once the application is made."""
        for family in (self.requests, self.request_seconds):
            family.learn("route", routes)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """`refresh`, then `encode`."""
        self.refresh()
        return self.encode(accept)

    def encode(self, accept: str = "") -> tuple[bytes, str]:
        """The body and the content type for this `Accept` header: OpenMetrics when it is asked for, else Prometheus text.

        Costs about 12 microseconds per series: answer scrapes from a thread. `refresh` first, on the event loop, where
        the sources' own data does not change meanwhile.
        """
        encode, content_type = choose_encoder(accept)
        return encode(_WithoutCreated(self.registry)), content_type

    def documentation(self) -> str:
        """The content of `docs/metrics.md`."""
        return documentation(self.declarations)


class _WithoutCreated:
    """The registry without the `_created` samples: one more series per counter and histogram that nobody reads.

    prometheus-client can switch them off only for the whole interpreter.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [one for one in metric.samples if not one.name.endswith("_created")]
            yield metric


def documentation(declarations: Iterable[Declaration]) -> str:
    """A Markdown page with one row per family."""
    lines = [
        "# Metrics",
        "",
        "Served at `GET /metrics` and `GET /api/metrics` as Prometheus text or, when asked for, OpenMetrics.",
        "Every label takes only the values listed; any other value is counted as `other`. Families marked *org* get the",
        "label `org` when `CLAUDE_WRAPPER_METRICS_ORG_LABEL` is on. Routes come from the route table, models from the",
        "price table. This page is generated (`make docs`).",
        "",
        "| name | type | labels | what it counts |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{one.name}` | {_kind(one)} | {_labels(one)} | {one.doc} |" for one in declarations]
    return "\n".join(lines) + "\n"


def _kind(one: Declaration) -> str:
    if not one.buckets:
        return one.kind
    return f"{one.kind} ({', '.join(f'{bucket:g}' for bucket in one.buckets)})"


def _labels(one: Declaration) -> str:
    shown = [
        f"`{label}`: {'open table' if label in OPEN_LABELS else ', '.join(values)}"
        for label, values in one.labels.items()
    ]
    return "; ".join([*shown, *(["*org*"] if one.org else [])])
