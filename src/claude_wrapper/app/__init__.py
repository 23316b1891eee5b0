"""The composition root: settings in, running server out. The only place that knows every concrete class.

Order of the start: directories, logs, sandbox, database, broker, pool, conversations, application. The stop is the same
in reverse: the pool ends its processes before the broker closes their way out.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
from fastapi import FastAPI
from starlette.requests import Request

from claude_wrapper import __version__
from claude_wrapper.agent.launch import CHAT, LaunchProfile, agent_profile
from claude_wrapper.agent.settings import AgentSettings
from claude_wrapper.api.app import create_app
from claude_wrapper.api.credentials import UpstreamCredentials
from claude_wrapper.api.forward import Forwarder
from claude_wrapper.api.reports import security_report
from claude_wrapper.api.state import ApiSettings, Deps
from claude_wrapper.app.caching import TOOL
from claude_wrapper.app.cliversions import move_spares, versions_of
from claude_wrapper.app.keeping import (
    ErasedSnapshots,
    collect_snapshots,
    removing,
    snapshot_keeper,
    snapshot_store,
)
from claude_wrapper.app.orgsettings import OrgSecurity, OrgSettings
from claude_wrapper.app.reloading import Reloading
from claude_wrapper.app.replica import named, running_replica
from claude_wrapper.app.resources import purge_expired_files, resource_means
from claude_wrapper.app.telemetry import Telemetry
from claude_wrapper.app.tenants import Tenants, running_tenants
from claude_wrapper.auth.authenticate import Authenticator, digest
from claude_wrapper.broker.broker import Broker
from claude_wrapper.broker.direct import Direct
from claude_wrapper.broker.egresslists import EgressLists
from claude_wrapper.broker.settings import BrokerSettings
from claude_wrapper.clock import Clock, SystemClock
from claude_wrapper.config import Settings
from claude_wrapper.errors import ConfigurationError, SandboxUnavailable
from claude_wrapper.ids import Ids, RandomIds
from claude_wrapper.pool.pool import Pool
from claude_wrapper.pool.settings import PoolSettings
from claude_wrapper.pool.slot import Reason
from claude_wrapper.sandbox import loopdisk
from claude_wrapper.sandbox.choose import choose
from claude_wrapper.sandbox.files import remove_tree
from claude_wrapper.sandbox.port import Level, Sandbox
from claude_wrapper.sandbox.probe import HostReport, probe
from claude_wrapper.sandbox.security import Egress, SecurityLevel, SecurityLevels, SecurityPolicy
from claude_wrapper.sandbox.uids import DEFAULT_RANGE, UidAllocator, UidRange
from claude_wrapper.sessions.content.furnish import SessionContent
from claude_wrapper.sessions.content.repositories import Cloning
from claude_wrapper.sessions.conversations import Conversations
from claude_wrapper.sessions.doors import Doors
from claude_wrapper.sessions.eventlog import EventLog
from claude_wrapper.sessions.grading import Grader
from claude_wrapper.sessions.journal import Books
from claude_wrapper.sessions.keeping import SnapshotKeeper
from claude_wrapper.sessions.managed import ManagedSessions
from claude_wrapper.sessions.ownership import Ownership
from claude_wrapper.sessions.process import ProcessFactory, Resume, SlotProcess, leftover_slots
from claude_wrapper.sessions.remotes import RemoteServers
from claude_wrapper.sessions.resources.mcptokens import McpTokens
from claude_wrapper.sessions.rooms import Rooms
from claude_wrapper.sessions.runner import RunnerSettings
from claude_wrapper.sessions.selfhosted.queue import WorkQueue
from claude_wrapper.sessions.serverbook import ServerBook
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.tenancy.workerring import WorkerRing
from claude_wrapper.wire.managed_tools import TO_CLI

log = structlog.get_logger(__name__)

MODEL_ALIASES: Final[Mapping[str, str]] = {
    "haiku": "claude-haiku-4-5",
    "sonnet": "claude-sonnet-5-5",
    "opus": "claude-opus-5-5",
}
"""Short names that the CLI knows too; resolved here, so that limits, prices and metrics see one name."""


class Tasks:
    """Background tasks: kept until they end, awaited at the end."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background.failed", exc_info=error)

    @property
    def count(self) -> int:
        return len(self._running)

    async def settle(self, seconds: float) -> None:
        """Wait for what runs; cancel what is left after `seconds`."""
        if self._running:
            await asyncio.wait(set(self._running), timeout=seconds)
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


@dataclass(slots=True)
class Lifecycle:
    """Whether the server takes new work."""

    draining: bool = False


class InFlight:
    """Counts requests in flight, for the drain."""

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        self.count += 1
        self._idle.clear()

    def leave(self) -> None:
        self.count -= 1
        if self.count == 0:
            self._idle.set()

    async def wait_idle(self) -> None:
        await self._idle.wait()


@dataclass(slots=True)
class Server:
    """A running server, as the command line sees it."""

    app: FastAPI
    pool: Pool[SlotProcess]
    conversations: Conversations
    sessions: ManagedSessions
    broker: Broker
    lifecycle: Lifecycle
    tasks: Tasks
    clock: Clock
    data_dir: Path
    sandbox_level: str
    security_level: str
    telemetry: Telemetry
    reloading: Reloading
    keeper: SnapshotKeeper
    new_admin_key: str | None = None
    requests: InFlight = field(default_factory=InFlight)

    def reload(self, read: Callable[[], Settings]) -> None:
        """Take over what can change at run time; see `Reloading`."""
        self.reloading.reload(read)

    async def drain(self, seconds: float, cut: asyncio.Event) -> None:
        """Take no new work; return when all requests and turns have ended, after `seconds`, or when `cut` is set."""
        self.lifecycle.draining = True
        await self.pool.drain()
        idle = asyncio.ensure_future(_all(self.requests.wait_idle(), self.sessions.drain()))
        stop = asyncio.ensure_future(cut.wait())
        try:
            await asyncio.wait({idle, stop}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (idle, stop):
                task.cancel()
            await asyncio.gather(idle, stop, return_exceptions=True)


@contextlib.asynccontextmanager
async def running_server(
    settings: Settings, *, clock: Clock | None = None, ids: Ids | None = None, address: str | None = None
) -> AsyncIterator[Server]:
    """A running server; everything that it started has ended when the context is left.

    `address` is the URL it listens on, by which other replicas reach it unless a setting names another.

    Raises ConfigurationError, SandboxUnavailable or StorageUnavailable when it cannot start, with the reason.
    """
    clock = clock or SystemClock()
    ids = ids or RandomIds()
    data_dir = _data_dir(settings.data_dir)
    telemetry = Telemetry(settings, clock, __version__)
    host = await _host(settings)
    sandbox, levels, policy = host.sandbox, host.levels, host.policy
    tasks, lifecycle, flight = Tasks(), Lifecycle(), InFlight()
    async with contextlib.AsyncExitStack() as stack:
        name = stack.enter_context(named(data_dir, ids))
        slots_dir = await stack.enter_async_context(_own_slots(data_dir))
        stack.push_async_callback(telemetry.close)
        telemetry.start()
        tenants = await stack.enter_async_context(running_tenants(settings, data_dir, clock, ids))
        broker, direct = await _running_broker(settings, tenants, telemetry, stack, clock=clock, ids=ids)
        org_settings = OrgSettings(tenants.database, clock)
        security = OrgSecurity(levels, org_settings)
        egress = _egress_lists(settings, security, org_settings)
        clis, versions = await versions_of(
            settings, clock, policies=tenants.policies, state=tenants.state, metrics=telemetry.metrics
        )
        factory = ProcessFactory(
            loop_disks=_loop_disks(settings, host.report),
            cli=clis.main,
            canary=clis.canary,
            slots_dir=slots_dir,
            sandbox=sandbox,
            limits=policy.limits,
            broker=broker,
            settings=AgentSettings(),
            default_model=settings.default_model,
            clock=clock,
            ids=ids,
            uids=_uids(settings, sandbox),
            egress=egress,
            limits_by_level={level.value: levels.policy(level).limits for level in levels.allowed},
        )
        private = _networks(settings.private_networks)
        resources = resource_means(settings, data_dir, tenants, clock, ids, permitted=private)
        mcp_tokens = McpTokens(resources, clock, tenants.state, ids)
        remotes = RemoteServers(
            broker.mcp_bridge, mcp_tokens, ServerBook(tenants.database, clock), tenants.caches.named(TOOL)
        )
        pool_keeper = _Keeper()
        pool: Pool[SlotProcess] = Pool(
            _pool_settings(settings, policy),
            clock,
            ids,
            telemetry.factory(factory),
            on_hibernate=pool_keeper.on_hibernate,
            on_lost=pool_keeper.on_lost,
        )
        move_spares(pool, versions)
        own = await stack.enter_async_context(
            running_replica(settings, name, tenants.database, clock, listening=address)
        )
        books = Books(
            tenants.database,
            EventLog(tenants.database, tenants.state, clock, ids),
            tenants.state,
            own,
            clock,
            ids,
            tenants.prices.listed,
        )
        store = snapshot_store(settings, books, resources.blobs, tenants.org_keys)
        keeper = snapshot_keeper(books, store, data_dir / "kept", factory.cli, telemetry.metrics)
        conversations = Conversations(
            Rooms(
                pool=pool,
                clock=clock,
                ids=ids,
                connect_remote=remotes,
                spawn=tasks.spawn,
                max_queued_turns=settings.max_queued_turns,
                kept_dir=data_dir / "kept",
                watch=telemetry.turns,
                versions=versions,
                keeper=keeper,
                spares_adopt=settings.sandbox_disk != "loop",
            ),
            kept_dir=data_dir / "kept",
            forget_after_seconds=settings.session_seconds,
            forget_held_after_seconds=settings.held_session_seconds,
            forget_stored_after_seconds=settings.kept_seconds,
        )
        pool_keeper.conversations = conversations
        credentials = UpstreamCredentials(
            tenants.resolver, settings.upstream_url, allow_oauth=settings.allow_oauth, policies=tenants.policies
        )
        sessions = ManagedSessions(
            books,
            Doors(
                books,
                conversations,
                choose=lambda principal: credentials.choose(principal, None),
                security=security.policy,
                aliases=MODEL_ALIASES,
                content=partial(SessionContent, books, resources, Cloning(data_dir / "clones", private)),
            ),
            partial(Grader, books, resources, broker.ask),
            RunnerSettings(settings.turn_seconds, parked_seconds=600.0),
            tasks.spawn,
        )
        await pool.start()
        stack.push_async_callback(tasks.settle, 5.0)
        sessions.on_deleted = removing(store, tasks.spawn)
        # When the pool has stopped its processes: their files hold still.
        stack.push_async_callback(keeper.close, settings.snapshot_stop_seconds)
        stack.push_async_callback(pool.close, 5.0)
        stack.push_async_callback(sessions.close)
        for endless in (
            _sweep(conversations, clock, settings.sweep_seconds),
            sessions.listen(),
            sessions.attend(),
            purge_expired_files(resources, clock, settings.sweep_seconds),
            collect_snapshots(store, books, telemetry.metrics, settings.snapshot_collect_seconds),
            versions.keep(settings.sweep_seconds),
        ):
            stack.callback(tasks.spawn(endless).cancel)  # before the tasks are waited for: they never end by themselves
        authenticator = Authenticator(
            tenants.keyring,
            operator_digest=digest(settings.admin_key) if settings.admin_key else None,
            operator=tenants.operator,
            workers=WorkerRing(tenants.database, tenants.pepper, clock),
        )

        async def authenticate(request: Request) -> Principal:
            return await telemetry.authenticated(request, authenticator)

        telemetry.follow_leases(own)
        telemetry.follow(pool, conversations, broker, tenants)
        health = telemetry.health(settings, data_dir, pool, tenants, broker, blobs=resources.blobs)
        stack.push_async_callback(health.close)

        deps = Deps(
            settings=ApiSettings(
                max_body_bytes=settings.max_body_bytes,
                turn_seconds=settings.turn_seconds,
                max_processes_per_org=settings.max_processes_per_org,
                queue_seconds=settings.queue_seconds,
                queue_length=settings.queue_length,
                model_aliases=MODEL_ALIASES,
                metrics_public=settings.metrics_public,
            ),
            conversations=conversations,
            pool=pool,
            direct=direct,
            credentials=credentials,
            sessions=sessions,
            work_queue=WorkQueue(
                tenants.database,
                tenants.state,
                clock,
                tenants.pepper,
                lease_seconds=settings.work_lease_seconds,
                new_id=ids.new,
            ),
            versions=versions,
            forwarder=await stack.enter_async_context(_forwarder(settings, own, tenants, books, telemetry)),
            authenticate=authenticate,
            tenants=tenants,
            resources=resources,
            mcp_tokens=mcp_tokens,
            remotes=remotes,
            spawn=tasks.spawn,
            security=security.policy,
            security_levels=levels,
            security_report=lambda mine: security_report(sandbox, levels, mine, host.report),
            health=health.report,
            metrics=telemetry.metrics,
            refuse_while_shut=broker.refuse_while_shut,
            protect=telemetry.protection(settings),
            lifecycle=lifecycle,
            clock=clock,
            ids=ids,
            version=__version__,
            erasers=(ErasedSnapshots(store),),
        )
        yield Server(
            app=create_app(deps, watch=telemetry.requests, flight=flight),
            pool=pool,
            conversations=conversations,
            sessions=sessions,
            broker=broker,
            lifecycle=lifecycle,
            tasks=tasks,
            clock=clock,
            data_dir=data_dir,
            sandbox_level=sandbox.level.value,
            security_level=policy.level.value,
            new_admin_key=tenants.new_operator_key,
            requests=flight,
            telemetry=telemetry,
            reloading=Reloading(settings, telemetry, tenants, egress),
            keeper=keeper,
        )


@contextlib.asynccontextmanager
async def _forwarder(
    settings: Settings, own: Ownership, tenants: Tenants, books: Books, telemetry: Telemetry
) -> AsyncIterator[Forwarder]:
    forwarder = Forwarder(own, tenants.pepper, telemetry.clock, patience_seconds=settings.drain_seconds)
    telemetry.follow_replica(books.log, forwarder)
    try:
        yield forwarder
    finally:
        await forwarder.close()


async def _all(*work: Coroutine[Any, Any, None]) -> None:
    await asyncio.gather(*work)


class _Keeper:
    """The pool keeps sessions' state through the conversations, which are made after it."""

    conversations: Conversations

    async def on_hibernate(self, session: str, slot: str, process: SlotProcess, reason: Reason) -> Resume | None:
        return await self.conversations.on_hibernate(session, slot, process, reason)

    def on_lost(self, session: str, slot: str) -> None:
        self.conversations.on_lost(session, slot)


async def _sweep(conversations: Conversations, clock: Clock, seconds: float) -> None:
    while True:
        await clock.sleep(seconds)
        await conversations.sweep()


def _data_dir(path: Path) -> Path:
    path = path.expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    # Passable, so that processes with their own uid reach their slot; what lies inside is closed one by one.
    path.chmod(0o711)
    return path


@dataclass(frozen=True, slots=True)
class _Host:
    """What this machine enforces, and what the operator allows on it."""

    report: HostReport
    sandbox: Sandbox
    levels: SecurityLevels
    policy: SecurityPolicy
    """Of the server's own level."""


async def _host(settings: Settings) -> _Host:
    report = await asyncio.to_thread(probe)
    required = Level(settings.sandbox_require) if settings.sandbox_require else None
    sandbox = choose(settings.sandbox, required, report)
    levels = security_levels(settings, sandbox.level)
    policy = levels.policy(levels.default)
    log.info("sandbox.chosen", sandbox=sandbox.level.value, security_level=policy.level.value, lowered=policy.lowered)
    return _Host(report, sandbox, levels, policy)


def _loop_disks(settings: Settings, report: HostReport) -> bool:
    """Raises SandboxUnavailable when the operator wants them and this host has none."""
    if settings.sandbox_disk != "loop":
        return False
    found = report.finding("loop_disk")
    if not found.present:
        raise SandboxUnavailable(f"CLAUDE_WRAPPER_SANDBOX_DISK=loop: {found.detail}; {found.fix}")
    return True


@contextlib.asynccontextmanager
async def _own_slots(data_dir: Path) -> AsyncIterator[Path]:
    """The directory of the slots, without what a server that was killed left there; nothing stays mounted in it."""
    slots = data_dir / "slots"
    await asyncio.to_thread(loopdisk.unmount_below, data_dir)
    for leftover in (*leftover_slots(slots), *leftover_slots(data_dir / "kept"), *leftover_slots(data_dir / "clones")):
        await asyncio.to_thread(remove_tree, leftover)
    try:
        yield slots
    finally:
        await asyncio.to_thread(loopdisk.unmount_below, data_dir)


async def _running_broker(
    settings: Settings,
    tenants: Tenants,
    telemetry: Telemetry,
    stack: contextlib.AsyncExitStack,
    *,
    clock: Clock,
    ids: Ids,
) -> tuple[Broker, Direct]:
    broker = Broker(
        _broker_settings(settings),
        clock,
        ids,
        telemetry.gate(tenants.admission.gate),
        telemetry.sink(tenants.ledger, tenants.prices),
        observer=telemetry.calls,
        caching=tenants.caches.of_broker(),
    )
    await broker.start()
    stack.push_async_callback(broker.close)
    direct = Direct(
        connect_seconds=settings.upstream_connect_seconds,
        read_seconds=settings.upstream_read_seconds,
        caching=tenants.caches.of_broker(),
        hedge_seconds=settings.upstream_hedge_seconds,
        clock=clock,
        on_hedge=telemetry.metrics.upstream_hedges.inc,
    )
    await direct.start()
    stack.push_async_callback(direct.close)
    return broker, direct


def security_levels(settings: Settings, sandbox: Level) -> SecurityLevels:
    """The operator's decision. Raises ConfigurationError."""
    default = SecurityLevel(settings.security_level)
    return SecurityLevels(sandbox, default, SecurityLevel(settings.security_loosest or default))


def _egress_lists(settings: Settings, security: OrgSecurity, org_settings: OrgSettings) -> EgressLists | None:
    """None when no level that an organisation may have gives its agents a network."""
    levels = security.levels
    lists = EgressLists(security.egress, settings.egress_hosts, org_settings.egress_hosts)
    return lists if any(levels.policy(one).egress is not Egress.NONE for one in levels.allowed) else None


def _uids(settings: Settings, sandbox: Sandbox) -> UidAllocator | None:
    if not sandbox.separate_uid:
        return None
    return UidAllocator(UidRange.parse(settings.sandbox_uids) if settings.sandbox_uids else DEFAULT_RANGE)


def _broker_settings(settings: Settings) -> BrokerSettings:
    return BrokerSettings(
        connect_seconds=settings.upstream_connect_seconds,
        read_seconds=settings.upstream_read_seconds,
        retry_attempts=settings.upstream_attempts,
        retry_budget_ratio=settings.upstream_retry_share,
        hedge_seconds=settings.upstream_hedge_seconds,
        breaker_failures=settings.breaker_failures,
        breaker_seconds=settings.breaker_seconds,
        max_body_bytes=settings.max_body_bytes + 2 * 2**20,
        permitted_networks=_networks(settings.private_networks),
    )


def _networks(texts: Sequence[str]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as error:
        raise ConfigurationError(f"CLAUDE_WRAPPER_PRIVATE_NETWORKS: {error}") from error


def _agent_spares(settings: Settings, policy: SecurityPolicy) -> dict[LaunchProfile, int]:
    """Spares for agents of Messages callers with all tools of the level, and for sessions' agents with the whole toolset."""
    room = max(0, settings.max_processes - settings.spares)
    kept: dict[LaunchProfile, int] = {}
    for tools in (policy.tools, set(policy.tools) & set(TO_CLI.values())):
        profile = agent_profile(tuple(sorted(tools)), security=policy.level.value)
        count = min(settings.agent_spares, room) if tools else 0
        if count < settings.agent_spares:
            log.info("pool.fewer_agent_spares", wanted=settings.agent_spares, kept=count, tools=len(tools))
        if count and profile not in kept:
            kept[profile] = count
            room -= count
    return kept


def _pool_settings(settings: Settings, policy: SecurityPolicy) -> PoolSettings:
    return PoolSettings(
        spares={CHAT: settings.spares} | _agent_spares(settings, policy),
        max_processes=settings.max_processes,
        max_processes_per_org=settings.max_processes_per_org,
        max_processes_per_principal=settings.max_processes_per_principal,
        parallel_spawns=settings.parallel_spawns,
        idle_seconds=settings.idle_seconds,
        sweep_seconds=settings.sweep_seconds,
        freeze_after_seconds=settings.freeze_seconds or None,
        queue_seconds=settings.queue_seconds,
        queue_length=settings.queue_length,
        max_age_seconds=settings.max_age_seconds,
        max_turns=settings.max_turns,
        max_resident_bytes=settings.max_resident_bytes,
    )
