"""The wiring of telemetry: what is counted, timed, logged and traced, and where it comes from.

Made first and closed last. Rooms push facts through the ports in `app.watches`; what has a present value somewhere is
pulled at each scrape, on the event loop, by the sources below.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request

from claude_wrapper.api.forward import Forwarder
from claude_wrapper.api.reports import Health
from claude_wrapper.app.checks import all_checks
from claude_wrapper.app.tenants import Tenants
from claude_wrapper.app.watches import (
    Calls,
    CountedGate,
    CountedSink,
    Follower,
    ModelNames,
    Requests,
    TimedFactory,
    Turns,
    provider_of,
)
from claude_wrapper.auth.authenticate import Authenticator, presented_key
from claude_wrapper.broker.broker import Broker
from claude_wrapper.broker.calls import CallSink, Gate
from claude_wrapper.clock import Clock
from claude_wrapper.config import Settings
from claude_wrapper.errors import AuthenticationFailed, PoolOverloaded
from claude_wrapper.pool.pool import Pool
from claude_wrapper.pool.stats import PoolStats
from claude_wrapper.sessions.conversations import Conversations
from claude_wrapper.sessions.eventlog import EventLog
from claude_wrapper.sessions.ownership import Ownership
from claude_wrapper.sessions.process import ProcessFactory, SlotProcess
from claude_wrapper.storage.blobs import BlobStore
from claude_wrapper.telemetry import collectors
from claude_wrapper.telemetry.collectors import PoolSample
from claude_wrapper.telemetry.logs import Logs, configure
from claude_wrapper.telemetry.looplag import LoopLag
from claude_wrapper.telemetry.metrics import BUDGET_SHARES, Metrics
from claude_wrapper.telemetry.otel import OTelTracer
from claude_wrapper.telemetry.otelmetrics import MetricsExport
from claude_wrapper.telemetry.pressure import RETRY_SECONDS, MemoryReader, Shedder, ShedSettings
from claude_wrapper.telemetry.redact import MAX_LITERAL, MIN_LITERAL, Redactor
from claude_wrapper.telemetry.tracing import NoTracer, Tracer
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.usage import PriceBook, from_file, packaged

_STATES = {
    "spawning": "starting",
    "spare": "spare",
    "bound_busy": "busy",
    "bound_idle": "idle",
    "hibernating": "hibernating",
    "rewinding": "rewinding",
    "detached": "detached",
    "stopping": "stopping",
}
"""The pool's states in the words of `metrics.PROCESS_STATES`."""


class Telemetry:
    """Logs, metrics and traces of one server."""

    def __init__(self, settings: Settings, clock: Clock, version: str) -> None:
        models = (from_file(settings.price_file) if settings.price_file else packaged()).models
        self.clock = clock
        self.models = ModelNames(models)
        self.metrics = Metrics(org_label=settings.metrics_org_label, models=models, version=version)
        self.redactor = Redactor(_secrets(settings))
        self.logs: Logs = configure(
            settings.log_level,
            settings.log_format,
            redactor=self.redactor,
            clock=clock,
            fields={"version": version},
            sample=_sample(settings),
            on_line=lambda level: self.metrics.log_lines.inc(level=level),
            on_drop=self.metrics.log_lines_dropped.inc,
        )
        self.tracer: Tracer = NoTracer()
        self._exports: MetricsExport | None = None
        if settings.otel_endpoint:
            instance = f"{socket.gethostname()}/{os.getpid()}"
            resource = {"service.name": "claude-wrapper", "service.version": version, "service.instance.id": instance}
            self.tracer = OTelTracer(
                settings.otel_endpoint, resource=resource, sample=settings.otel_sample, redactor=self.redactor
            )
            if settings.otel_metrics_seconds:
                self._exports = MetricsExport(
                    self.metrics,
                    settings.otel_endpoint,
                    clock,
                    resource=resource,
                    seconds=settings.otel_metrics_seconds,
                )
        self.lag = LoopLag(clock, self.metrics.loop_lag.observe)
        self.memory = MemoryReader()
        self.requests = Requests(self.metrics, self.tracer)
        self.turns = Turns(self.metrics, self.tracer, clock, tools=bool(settings.otel_endpoint))
        self.calls = Calls(self.metrics, self.tracer, self.turns, self.models)
        self._factories: list[TimedFactory] = []
        self._running: list[asyncio.Task[None]] = []
        self._shedder: Shedder | None = None
        self._follower = Follower()
        self.metrics.started.set(clock.now().timestamp())
        self.metrics.pull("process", collectors.own_process(self.metrics))

    # The rooms, watched ------------------------------------------------------------------------------------------------

    def gate(self, gate: Gate) -> Gate:
        return CountedGate(gate, self.metrics)

    def sink(self, ledger: CallSink, prices: PriceBook) -> CallSink:
        return CountedSink(ledger, prices, self.metrics, self.models)

    def factory(self, factory: ProcessFactory) -> TimedFactory:
        timed = TimedFactory(factory, self.metrics, self.clock)
        self._factories.append(timed)
        return timed

    async def authenticated(self, request: Request, authenticator: Authenticator) -> Principal:
        """Who asks; bound to the request's log line. Raises AuthenticationFailed, counted."""
        try:
            principal = await authenticator.authenticate(request.headers)
        except AuthenticationFailed as error:
            missing = presented_key(request.headers) is None
            self.metrics.authentication_failures.inc(reason="missing" if missing else _refusal(error))
            raise
        fields = request.scope.get("log_fields")
        if fields is not None:
            fields |= {"org": principal.org, "key": principal.key_id}
        return principal

    def checked(self, check: str, ok: bool) -> None:
        """A health check was made."""
        self.metrics.health.set(ok, check=check)

    def health(
        self,
        settings: Settings,
        data_dir: Path,
        pool: Pool[SlotProcess],
        tenants: Tenants,
        broker: Broker,
        *,
        blobs: BlobStore,
    ) -> Health:
        """What `/health` looks at; the caller closes it."""
        looks = all_checks(
            settings,
            data_dir,
            pool,
            database=tenants.database,
            state=tenants.state,
            broker=broker,
            blobs=blobs,
            memory=self.memory,
            lag=self.lag,
        )
        return Health(looks, self.clock, self.metrics.version, told=self.checked)

    def protection(self, settings: Settings) -> Callable[[], None]:
        """What is asked before each new turn: raises PoolOverloaded while the machine is short of memory."""
        shedder = self._shedder = Shedder(_thresholds(settings), self.memory, self.lag, self.clock)

        def protect() -> None:
            if reason := shedder.reason():
                self.metrics.requests_shed.inc(reason=reason)
                raise PoolOverloaded(
                    f"the machine is short of {'CPU time' if reason == 'lag' else 'memory'}: new turns are refused so "
                    "that running ones can end; try again later",
                    retry_after=RETRY_SECONDS,
                )

        return protect

    # Life --------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to measure the event loop's lag, and to send metrics."""
        loop = asyncio.get_running_loop()
        self._running.append(loop.create_task(self.lag.run(), name="loop-lag"))
        if self._exports is not None:
            self._running.append(loop.create_task(self._exports.run(), name="metrics-export"))
        self.metrics.pull("loop", self._pull_loop)

    async def close(self) -> None:
        """Send what is left of traces and metrics and stop taking the libraries' log records."""
        for factory in self._factories:
            await factory.close()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._exports is not None:
            await self._exports.close()
        await self.tracer.close()
        self.logs.close()

    def reload(self, settings: Settings) -> None:
        """Take over what can change at run time: the level and the sampling of logs, the thresholds of shedding."""
        self.logs.set_level(settings.log_level)
        self.logs.set_sample(_sample(settings))
        if self._shedder is not None:
            self._shedder.take(_thresholds(settings))

    # Sources -------------------------------------------------------------------------------------------------------------

    def follow_leases(self, own: Ownership) -> None:
        """Read what this replica holds at each scrape."""

        def pull() -> None:
            self.metrics.leases_held.set(len(own))
            for step, count in own.steps.items():
                self._follower.follow(
                    ("lease", step),
                    count,
                    lambda grown, step=step: self.metrics.lease_steps.inc(grown, step=step),  # type: ignore[misc]
                )

        self.metrics.pull("leases", pull)

    def follow(self, pool: Pool[SlotProcess], conversations: Conversations, broker: Broker, tenants: Tenants) -> None:
        """Read these at each scrape."""
        self.metrics.pull("pool", lambda: self._pull_pool(pool.stats()))
        self.metrics.pull("sessions", lambda: self._pull_sessions(conversations))
        self.metrics.pull("broker", lambda: self._pull_broker(broker))
        self.metrics.pull("tenants", lambda: self._pull_tenants(tenants))
        tenants.caches.follow(self.metrics)

    def follow_replica(self, events: EventLog, forwarder: Forwarder) -> None:
        """Read what passes between this server and the other replicas at each scrape."""

        def pull() -> None:
            metrics, follow = self.metrics, self._follower.follow
            follow(("replica", "forwarded"), forwarder.forwarded, metrics.requests_forwarded.inc)
            follow(("replica", "unpublished"), events.unpublished, metrics.events_unpublished.inc)

        self.metrics.pull("replica", pull)

    def _pull_loop(self) -> None:
        self.metrics.loop_lag_worst.set(self.lag.worst)
        self.metrics.async_tasks.set(len(asyncio.all_tasks()))

    def _pull_pool(self, stats: PoolStats) -> None:
        metrics, follow = self.metrics, self._follower.follow
        states = Counter("frozen" if slot.frozen else _STATES.get(slot.state, slot.state) for slot in stats.slots)
        sample = PoolSample(
            size=stats.processes,
            capacity=stats.max_processes,
            waiting=stats.waiting,
            by_state=states,
            spares=stats.spares,
            memory_bytes=sum(slot.memory_bytes or 0 for slot in stats.slots),
        )
        collectors.pool(metrics, lambda: sample)()
        metrics.draining.set(stats.draining)
        for reason, count in {**stats.refusals, "cancelled": stats.withdrawn}.items():
            follow(
                ("refusal", reason),
                count,
                lambda grown, reason=reason: metrics.claim_failures.inc(grown, reason=reason),  # type: ignore[misc]
            )
        for reason, count in stats.evictions.items():
            follow(
                ("eviction", reason),
                count,
                lambda grown, reason=reason: metrics.evictions.inc(grown, reason=reason),  # type: ignore[misc]
            )

    def _pull_sessions(self, conversations: Conversations) -> None:
        self.metrics.sessions.replace("state", conversations.by_state())

    def _pull_broker(self, broker: Broker) -> None:
        self.metrics.breakers.clear()
        states = Counter((provider_of(view.upstream), view.state.value) for view in broker.breakers())
        for (provider, state), count in states.items():
            self.metrics.breakers.set(count, provider=provider, state=state)

    def _pull_tenants(self, tenants: Tenants) -> None:
        metrics, follow = self.metrics, self._follower.follow
        counts, ledger = tenants.ledger_counts, tenants.ledger
        follow(("ledger", "ok"), counts.written, lambda grown: metrics.ledger_rows.inc(grown, outcome="ok"))
        lost = counts.rejected + counts.lost
        follow(("ledger", "error"), lost, lambda grown: metrics.ledger_rows.inc(grown, outcome="error"))
        metrics.ledger_pending.set(ledger.pending + max(0, counts.spilled - counts.drained))
        for percent, count in tenants.limit_counts.alerts.items():
            share = max((one for one in BUDGET_SHARES if float(one) * 100 <= percent), key=float)
            follow(
                ("alert", str(percent)),
                count,
                lambda grown, share=share: metrics.budget_alerts.inc(grown, share=share),  # type: ignore[misc]
            )
        unchecked = {"let_through": tenants.limit_counts.let_through, "turned_away": tenants.limit_counts.turned_away}
        for outcome, by_kind in unchecked.items():
            for kind, count in by_kind.items():
                follow(
                    ("unchecked", kind, outcome),
                    count,
                    lambda grown, kind=kind, outcome=outcome: metrics.limits_unchecked.inc(  # type: ignore[misc]
                        grown, kind=kind, outcome=outcome
                    ),
                )


def _refusal(error: AuthenticationFailed) -> str:
    """The reason as a label's value, from our own message."""
    return next((reason for reason in ("expired", "revoked") if reason in error.message), "unknown")


def _thresholds(settings: Settings) -> ShedSettings:
    return ShedSettings(settings.shed_memory_share, settings.shed_pressure, settings.shed_lag_seconds)


def _sample(settings: Settings) -> dict[str, float]:
    if settings.log_sample >= 1:
        return {}
    return dict.fromkeys(("request.completed", "turn.completed", "upstream.completed"), settings.log_sample)


def _secrets(settings: Settings) -> list[str]:
    """Secrets of the settings, to be masked wherever they turn up."""
    held = (
        settings.admin_key,
        settings.anthropic_api_key,
        settings.master_key,
        settings.key_pepper,
        settings.database_url,
        settings.redis_url,
    )
    return [one for one in held if one and MIN_LITERAL <= len(one) <= MAX_LITERAL]
