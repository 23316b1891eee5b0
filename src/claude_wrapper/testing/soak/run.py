"""The soak itself: callers, faults, and a look at everything at the end. Thin: what to do is `plan`, what must hold is
`outcomes`."""

from __future__ import annotations

import asyncio
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from claude_wrapper.testing.soak import outcomes, plan
from claude_wrapper.testing.soak.asking import Asker
from claude_wrapper.testing.soak.books import Books, read_books
from claude_wrapper.testing.soak.harm import Harm
from claude_wrapper.testing.soak.logs import LogSummary, summarize
from claude_wrapper.testing.soak.managed import Agents, ManagedConversation, make_agents
from claude_wrapper.testing.soak.messages import MODEL, TURN_SECONDS, MessagesConversation
from claude_wrapper.testing.soak.outcomes import Invariant, UpstreamRequest
from claude_wrapper.testing.soak.pace import Pace
from claude_wrapper.testing.soak.plan import ConversationPlan
from claude_wrapper.testing.soak.record import Record
from claude_wrapper.testing.soak.served import ADMIN_KEY, Served, alive, descendants, descriptors, resident_bytes
from claude_wrapper.testing.soak.surroundings import Surroundings, surroundings
from claude_wrapper.testing.upstream import ScriptedUpstream

FAULTS_PER_SECOND: Final = 500 / 600
_STEP_SECONDS: Final = 5.0
_REST_SECONDS: Final = 40.0
_OVERTIME_SECONDS: Final = 420.0
"""What the start, the last conversations and the look at the end may take beyond the load, on a slow machine."""
_COLD_STARTS: Final = 20.0
"""An untouched tenant may wait 20 seconds, or this many cold starts where a cold start takes longer than a second."""
_RESTING: Final = ("requests_in_flight", "turns_in_flight", "pool_waiting", "ledger_rows_pending")


@dataclass(frozen=True, slots=True)
class SoakSettings:
    """How long, how hard, and what must hold."""

    seconds: float = 600.0
    seed: int = 1
    callers: int = 10
    """At most; fewer while answers are slow."""
    max_processes: int = 16
    process_fault_every: float = 3.0
    large_fault_every: float = 12.0
    """Between the end of one fault of a store or the server and the next one."""
    faults_least: int | None = None
    """None: 500 in ten minutes."""
    calm_p99_seconds: float = 20.0
    most_resident_bytes: float = 700 * 2**20
    most_growth_bytes: float = 120 * 2**20
    most_descriptors: float = 600.0
    embedded: bool = False
    """SQLite and memory, also where Postgres and Redis could be had."""
    database_url: str | None = None
    redis_url: str | None = None
    server_settings: dict[str, str] = field(default_factory=dict)

    @property
    def wanted_faults(self) -> int:
        return int(self.seconds * FAULTS_PER_SECOND) if self.faults_least is None else self.faults_least


@dataclass(frozen=True, slots=True)
class Finished:
    """The result."""

    settings: SoakSettings
    record: Record
    invariants: tuple[Invariant, ...]
    seconds: float
    surroundings: str
    log: LogSummary = field(default_factory=LogSummary)

    @property
    def passed(self) -> bool:
        return all(one.holds for one in self.invariants)


async def soak(settings: SoakSettings, directory: Path, say: Callable[[str], None] = lambda _: None) -> Finished:
    """Run it; `say` hears of the progress. `directory` must be passable for processes with their own uid.

    It ends by itself: whatever fails or hangs becomes an invariant that does not hold.
    """
    invariants: tuple[Invariant, ...] = ()
    record = Record(time.monotonic(), time.monotonic)
    described, log, trouble = "", LogSummary(), ""
    try:
        async with (
            asyncio.timeout(settings.seconds + _OVERTIME_SECONDS),
            ScriptedUpstream(keep=1_000_000) as upstream,
            surroundings(
                directory,
                embedded=settings.embedded,
                database_url=settings.database_url,
                redis_url=settings.redis_url,
            ) as around,
        ):
            described = around.described
            record.skipped += [f"{kind}: {why}" for kind, why in around.without.items()]
            server = Served(
                around.data_dir,
                upstream.url,
                {**_server_settings(settings), **around.settings, **settings.server_settings},
                {"TMPDIR": str(around.temporary)},
            )
            run = _Run(settings, server, upstream, around, record=record, say=say)
            try:
                await run.load()
                invariants = await run.look()
            finally:
                await server.close()
                log = await asyncio.to_thread(_log, server.log_file)
    except Exception:  # noqa: BLE001 - whatever stops a soak is what its report must say
        trouble = traceback.format_exc()[-3000:]
    ended = Invariant("the soak itself ran to its end", not trouble, trouble or "it did")
    surprises = outcomes.no_surprises(log.unexpected, log.unreadable)
    return Finished(settings, record, (ended, *invariants, surprises), record.now, described, log)


def _server_settings(settings: SoakSettings) -> dict[str, str]:
    return {
        "log_level": "warning",
        "max_processes": str(settings.max_processes),
        # The tenant that is struck cannot take the places of the one that is not.
        "max_processes_per_org": str(max(2, settings.max_processes * 3 // 4)),
        "max_processes_per_principal": str(max(2, settings.max_processes * 3 // 4)),
        "spares": "2",
        "agent_spares": "0",
        "idle_seconds": "20",
        "sweep_seconds": "5",
        "session_seconds": "60",
        "held_session_seconds": "60",
        "turn_seconds": str(TURN_SECONDS),
        "queue_seconds": "60",
        "drain_seconds": "5",
        "breaker_failures": "20",
        "breaker_seconds": "2",
        "upstream_attempts": "2",
        "upstream_private": "true",
    }


@dataclass(frozen=True, slots=True)
class _Tenant:
    asker: Asker
    agents: Agents


class _Run:
    def __init__(
        self,
        settings: SoakSettings,
        server: Served,
        upstream: ScriptedUpstream,
        around: Surroundings,
        *,
        record: Record,
        say: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.server = server
        self.upstream = upstream
        self.around = around
        self.record = record
        self.say = say
        self._plans: Iterator[ConversationPlan] = plan.conversations(settings.seed)
        self._up = asyncio.Event()
        self._seen_children: set[int] = set()
        self._pace = Pace(settings.callers, min(4, settings.callers))
        self._calm_bound = settings.calm_p99_seconds
        self._forgotten = 0
        self._gauges: dict[str, float] = {}
        self._failing: list[str] = []

    async def load(self) -> None:
        """Callers and faults, side by side, until the time is over; then the server comes to rest."""
        server, record = self.server, self.record
        if "database_url" in self.around.settings:
            await server.migrate()
        await server.start()
        server.settings = {**server.settings, "port": server.url.rsplit(":", 1)[1]}
        self._up.set()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            operator = Asker(http, server.url, ADMIN_KEY, self._up)
            steady, stormy, victim = await self._tenants(operator)
            self._calm_bound = max(self._calm_bound, _COLD_STARTS * await self._cold_start(operator))
            record.began = time.monotonic()
            harm = Harm(
                server,
                self.around,
                record,
                operator,
                victim,
                self.settings.seconds,
                lambda: int(record.now * self.settings.wanted_faults / self.settings.seconds / 0.8),
                self._seen_children,
            )
            seed, settings = self.settings.seed, self.settings
            self.say(f"{self.around.described}; {settings.seconds:g} s of load, seed {seed}")
            for one in record.skipped:
                self.say(f"not done: {one}")
            watching = [asyncio.ensure_future(watch()) for watch in (self._sample, self._tell)]
            try:
                async with asyncio.TaskGroup() as group:
                    every = settings.process_fault_every
                    group.create_task(harm.processes(plan.process_faults(seed, every)))
                    large = plan.large_faults(seed, settings.large_fault_every, stores=harm.available)
                    group.create_task(harm.large(large))
                    for number in range(settings.callers):
                        group.create_task(self._call(number, steady, stormy))
                self.say("the load is over; waiting for rest")
                await self._rest(operator)
            finally:
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)

    # Before ---------------------------------------------------------------------------------------------------------------

    async def _tenants(self, operator: Asker) -> tuple[_Tenant, _Tenant, str]:
        """One organisation that is spared, one that is not, and the id of the latter's key."""
        security = await operator.insist("GET", "/v1/security")
        shell = "Bash" in security.body["allowed"]["tools"]
        if not shell:
            self.record.skipped.append(f"agents with a shell: {'; '.join(security.body['lowered'])[:200]}")
        made, key_id = [], ""
        for name in ("steady", "stormy"):
            org = await self._made(operator, "/v1/organizations", {"name": name})
            inside = {"cw-organization": str(org["id"])}
            key = await self._made(operator, "/v1/organizations/api_keys", {"name": name}, inside)
            key_id = str(key["id"])
            # Its own credential: an open breaker of one tenant is none of the other's.
            secret = {"api_key": f"sk-ant-scripted-{name}-key"}
            credential = {"kind": "custom", "name": name, "secret": secret, "base_url": self.upstream.url}
            await self._made(operator, "/v1/organizations/credentials", credential, inside)
            asker = Asker(operator.http, operator.base, str(key["secret"]), self._up)
            made.append(_Tenant(asker, await make_agents(asker, shell=shell)))
        return made[0], made[1], key_id

    async def _made(
        self, operator: Asker, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        reply = await operator.ask("POST", path, json=body, headers=headers)
        if not reply.ok:
            raise RuntimeError(f"{path}: {reply.status} {reply.body}")
        return dict(reply.body)

    async def _cold_start(self, operator: Asker) -> float:
        """Seconds until a first answer without a warm process: how fast this machine is."""
        waits = []
        for number in range(3):
            body = {
                "model": MODEL,
                "max_tokens": 16,
                "system": f"You are number {number}.",
                "messages": [{"role": "user", "content": "[[say ready]]"}],
            }
            began = time.monotonic()
            reply = await operator.ask("POST", "/v1/messages", json=body)
            if not reply.ok:
                raise RuntimeError(f"the first answer failed: {reply.status} {reply.body} {reply.detail}")
            waits.append(time.monotonic() - began)
        return max(waits)

    # Load -----------------------------------------------------------------------------------------------------------------

    async def _call(self, number: int, steady: _Tenant, stormy: _Tenant) -> None:
        record, seconds = self.record, self.settings.seconds
        while record.now < seconds:
            if number >= self._pace.allowed:
                await asyncio.sleep(0.5)
                continue
            one = next(self._plans)
            tenant = steady if one.calm else stormy
            record.conversations[one.door] += 1
            if one.door == plan.MESSAGES:
                await MessagesConversation(tenant.asker, one, record, seconds).hold()
            else:
                await ManagedConversation(tenant.asker, tenant.agents, one, record, seconds).hold()

    async def _sample(self) -> None:
        while True:
            pid = self.server.pid
            sample = {"at": self.record.now, "resident_bytes": resident_bytes(pid), "descriptors": descriptors(pid)}
            children = descendants(pid)
            self._seen_children |= children
            if sample["resident_bytes"]:
                sample |= {"processes": float(len(children)), "life": float(len(self.record.downs))}
                self.record.samples.append({**sample, "callers": float(self._pace.allowed)})
            self._forget_bodies()
            await asyncio.sleep(1.0)

    def _forget_bodies(self) -> None:
        """What was asked of the upstream is counted, not kept: bodies of ten minutes would fill the memory."""
        requests = self.upstream.requests
        while self._forgotten < len(requests) and requests[self._forgotten].done.is_set():
            requests[self._forgotten].body = {}
            self._forgotten += 1

    async def _tell(self) -> None:
        """The pace, every few seconds, and a line of progress now and then."""
        record = self.record
        for step in range(10**9):
            await asyncio.sleep(_STEP_SECONDS)
            record.callers = self._pace.after(record.recent_waits())
            if step % 2:
                answered = sum(one.how == "answered" for one in record.outcomes)
                unclear = sum(one.how == "unclear" for one in record.outcomes)
                calm = outcomes.calm_latency(record.outcomes, self._calm_bound).detail
                memory = record.samples[-1]["resident_bytes"] / 2**20 if record.samples else 0.0
                self.say(
                    f"{record.now:4.0f} of {self.settings.seconds:g} s: {len(record.outcomes)} requests, {answered} answered, "
                    f"{unclear} unclear, {record.fault_count} faults, {record.callers} callers, {memory:.0f} MB, {calm}"
                )

    async def _rest(self, operator: Asker) -> None:
        """Wait until nothing is in flight and every check is well, and keep what was found last."""
        deadline = time.monotonic() + _REST_SECONDS
        while True:
            page = await operator.insist("GET", "/metrics", raw=True)
            self._gauges = _gauges(bytes(page.body or b"").decode())
            self._gauges["requests_in_flight"] -= 1  # this very one
            health = await operator.ask("GET", "/health")
            failing = health.body.get("failing", ["no answer"]) if isinstance(health.body, dict) else ["no answer"]
            self._failing = [one for one in failing if one != "upstream"]
            if outcomes.at_rest(self._gauges, self._failing).holds or time.monotonic() > deadline:
                return
            await asyncio.sleep(0.5)

    # The end --------------------------------------------------------------------------------------------------------------

    async def look(self) -> tuple[Invariant, ...]:
        """End the server and see what is left, in its books and on the machine."""
        self._seen_children |= descendants(self.server.pid)
        self.server.signal(signal.SIGTERM)
        code = await self.server.ended(60)
        left = await asyncio.to_thread(self._left)
        url = self.around.settings.get("database_url") or f"sqlite:///{self.server.data_dir / 'claude-wrapper.db'}"
        books = await read_books(url)
        left["leases"] += books.leases
        return self._judge(code, left, books)

    def _judge(self, code: int, left: dict[str, list[Any]], books: Books) -> tuple[Invariant, ...]:
        record, settings = self.record, self.settings
        seen = [
            UpstreamRequest(
                one.request_id,
                one.status,
                one.whole and not one.cancelled,
                one.finished or 0.0,
                one.usage.input_tokens,
                one.usage.output_tokens,
            )
            for one in self.upstream.calls
        ]
        return (
            Invariant("the server ended by itself when asked", code == 0, f"exit code {code}"),
            outcomes.enough(record.fault_count, settings.wanted_faults),
            outcomes.answered_once(record.outcomes, record.downs),
            outcomes.no_bugs(record.outcomes),
            outcomes.not_crossed(record.outcomes),
            outcomes.answered_whole(record.outcomes),
            outcomes.ledger_is_upstreams(seen, books.ledger, record.kills),
            outcomes.gapless(books.sequences),
            outcomes.streams_complete(record.followed, books.streams),
            outcomes.files_kept(record.files_lost, record.files),
            outcomes.calm_latency(record.outcomes, self._calm_bound),
            outcomes.at_rest(self._gauges, self._failing),
            outcomes.bounded(
                record.samples, bytes_most=settings.most_resident_bytes, descriptors_most=settings.most_descriptors
            ),
            outcomes.no_creep(record.samples, growth_most=settings.most_growth_bytes),
            outcomes.nothing_left(left),
        )

    def _left(self) -> dict[str, list[Any]]:
        deadline = time.monotonic() + 10
        while (living := [pid for pid in self._seen_children if alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        data, redis = self.server.data_dir, self.around.redis
        return {
            "processes": living,
            "slots": [path.name for path in (data / "slots").iterdir()],
            "kept sessions": [path.name for path in (data / "kept").glob("*")],
            "spilled rows": [path.name for path in (data / "ledger-spill").glob("*") if path.stat().st_size],
            "temporary files": [path.name for path in self.around.temporary.iterdir()],
            "half-written blobs": [path.name for path in self.around.blobs.rglob("*#*")],
            "leases": redis.keys("cw:l:*") if redis is not None else [],
        }


def _gauges(page: str) -> dict[str, float]:
    """The sums of the gauges that must be 0 at rest."""
    found = dict.fromkeys(_RESTING, 0.0)
    for line in page.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in found:
            found[name] += float(line.rsplit(" ", 1)[1])
    return found


def _log(path: Path) -> LogSummary:
    with path.open(encoding="utf-8", errors="replace") as lines:
        return summarize(lines)
