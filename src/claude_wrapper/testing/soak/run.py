"""The soak itself: callers and faults side by side. Thin: what to do is `plan`, what must hold is `outcomes`, and who
looks at what is left is `ending`."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from claude_wrapper.testing.soak import outcomes, plan
from claude_wrapper.testing.soak.asking import Asker
from claude_wrapper.testing.soak.canary import Canary
from claude_wrapper.testing.soak.ending import Ending, read_logs
from claude_wrapper.testing.soak.fleet import Fleet, start_all
from claude_wrapper.testing.soak.harm import Harm
from claude_wrapper.testing.soak.logs import LogSummary
from claude_wrapper.testing.soak.managed import Agents, ManagedConversation, make_agents
from claude_wrapper.testing.soak.messages import MODEL, MessagesConversation
from claude_wrapper.testing.soak.outcomes import Invariant
from claude_wrapper.testing.soak.pace import Pace
from claude_wrapper.testing.soak.plan import ConversationPlan
from claude_wrapper.testing.soak.reads import Reads
from claude_wrapper.testing.soak.record import Record
from claude_wrapper.testing.soak.served import ADMIN_KEY, Served, descendants, descriptors, resident_bytes
from claude_wrapper.testing.soak.settings import LEASE_SECONDS, SoakSettings
from claude_wrapper.testing.soak.surroundings import Surroundings, surroundings
from claude_wrapper.testing.upstream import ScriptedUpstream

_STEP_SECONDS: Final = 5.0
_OVERTIME_SECONDS: Final = 420.0
"""What the start, the last conversations and the look at the end may take beyond the load, on a slow machine."""
_COLD_STARTS: Final = 20.0
"""An untouched tenant may wait 20 seconds, or this many cold starts where a cold start takes longer than a second."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The result."""

    settings: SoakSettings
    record: Record
    invariants: tuple[Invariant, ...]
    seconds: float
    surroundings: str
    log: LogSummary = field(default_factory=LogSummary)
    log_files: tuple[Path, ...] = ()
    """What the replicas wrote to standard error."""

    @property
    def passed(self) -> bool:
        return all(one.holds for one in self.invariants)


async def soak(settings: SoakSettings, directory: Path, say: Callable[[str], None] = lambda _: None) -> Finished:
    """Run it; `say` hears of the progress. `directory` must be passable for processes with their own uid.

    It ends by itself: whatever fails or hangs becomes an invariant that does not hold.
    """
    invariants: tuple[Invariant, ...] = ()
    record = Record(time.monotonic(), time.monotonic)
    described, log, trouble, logs = "", LogSummary(), "", list[Path]()
    try:
        async with (
            asyncio.timeout(settings.seconds + _OVERTIME_SECONDS),
            ScriptedUpstream(keep=1_000_000) as upstream,
            surroundings(
                directory,
                replicas=settings.replicas,
                embedded=settings.embedded,
                database_url=settings.database_url,
                redis_url=settings.redis_url,
            ) as around,
        ):
            described = around.described
            record.skipped += [f"{kind}: {why}" for kind, why in around.without.items()]
            canary = Canary(directory / "canary", record.canary)
            await asyncio.to_thread(canary.prepare)
            shared = {
                **settings.of_servers(len(around.data_dirs)),
                "canary_cli": str(canary.path),
                **around.settings,
            }
            replicas = tuple(
                Served(data_dir, upstream.url, shared, {"TMPDIR": str(temporary)}, number)
                for number, (data_dir, temporary) in enumerate(zip(around.data_dirs, around.temporaries, strict=True))
            )
            run = _Run(settings, replicas, upstream, around, record=record, canary=canary, say=say)
            try:
                await run.load()
                invariants = await run.look()
            finally:
                for one in replicas:
                    await one.close()
                logs = [one.log_file for one in replicas]
                log = await asyncio.to_thread(read_logs, logs)
    except Exception:  # noqa: BLE001 - whatever stops a soak is what its report must say
        trouble = traceback.format_exc()[-3000:]
    ended = Invariant("the soak itself ran to its end", not trouble, trouble or "it did")
    surprises = outcomes.no_surprises(log.unexpected, log.unreadable)
    return Finished(settings, record, (ended, *invariants, surprises), record.now, described, log, tuple(logs))


@dataclass(frozen=True, slots=True)
class _Tenant:
    asker: Asker
    agents: Agents


class _Run:
    def __init__(
        self,
        settings: SoakSettings,
        replicas: tuple[Served, ...],
        upstream: ScriptedUpstream,
        around: Surroundings,
        *,
        record: Record,
        canary: Canary,
        say: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.replicas = replicas
        self.upstream = upstream
        self.around = around
        self.record = record
        self.canary = canary
        self.say = say
        self._plans: Iterator[ConversationPlan] = plan.conversations(settings.seed)
        self._fleet = Fleet(replicas, record.losses)
        self._seen_children: set[int] = set()
        self._ending = Ending(settings, replicas, around, record, self._seen_children)
        self._pace = Pace(settings.callers, min(4, settings.callers))
        self._calm_bound = settings.calm_p99_seconds
        self._forgotten = 0
        self._reads: Reads | None = None

    async def load(self) -> None:
        """Callers and faults, side by side, until the time is over; then the server comes to rest."""
        record, settings, seed = self.record, self.settings, self.settings.seed
        if "database_url" in self.around.settings:
            await self.replicas[0].migrate()
        await start_all(self.replicas)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            balancing = asyncio.ensure_future(self._fleet.watch(http))
            watching = [balancing]
            try:
                await self._fleet.up.wait()
                operator = Asker(http, self._fleet, ADMIN_KEY)
                steady, stormy, victim = await self._tenants(operator)
                self._calm_bound = max(self._calm_bound, _COLD_STARTS * await self._cold_start(operator))
                record.began = time.monotonic()
                self.say(f"{self.around.described}; {settings.seconds:g} s of load, seed {seed}")
                for one in record.skipped:
                    self.say(f"not done: {one}")
                self._reads = reads = Reads(stormy.asker, operator, record, settings.seconds)
                watching += [
                    asyncio.ensure_future(watch)
                    for watch in (self._sample(), self._tell(), self.canary.watch(operator), reads.watch())
                ]
                async with asyncio.TaskGroup() as group:
                    for work in self._faults(operator, victim):
                        group.create_task(work)
                    group.create_task(self.canary.breaks(operator, settings.seconds))
                    group.create_task(reads.ask(seed))
                    for number in range(settings.callers):
                        group.create_task(self._call(number, steady, stormy))
                self.say("the load is over; waiting for rest")
                await self._ending.rest(operator)
            finally:
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)

    def _faults(self, operator: Asker, victim: str) -> list[Coroutine[Any, Any, None]]:
        """The lanes of faults, each for a task of its own."""
        settings, record = self.settings, self.record
        harm = Harm(
            self._fleet,
            self.around,
            record,
            operator,
            victim,
            settings.seconds,
            lambda: int(record.now * settings.wanted_faults / settings.seconds / 0.8),
            self._seen_children,
            LEASE_SECONDS,
        )
        large = plan.large_faults(
            settings.seed, settings.large_fault_every, stores=harm.available, replicas=len(self.replicas)
        )
        return [harm.processes(plan.process_faults(settings.seed, settings.process_fault_every)), harm.large(large)]

    async def look(self) -> tuple[Invariant, ...]:
        """End everything and see what is left."""
        assert self._reads is not None  # noqa: S101 - the load came first
        return await self._ending.look(self.upstream.requests, self._reads, self.canary, calm_bound=self._calm_bound)

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
            asker = Asker(operator.http, self._fleet, str(key["secret"]))
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
            for one in self.replicas:
                children = descendants(one.pid)
                self._seen_children |= children
                if not (memory := resident_bytes(one.pid)):
                    continue
                sample = {"at": self.record.now, "replica": float(one.number), "life": float(one.lives)}
                sample |= {"resident_bytes": memory, "descriptors": descriptors(one.pid)}
                sample |= {"processes": float(len(children)), "callers": float(self._pace.allowed)}
                self.record.samples.append(sample)
            self._forget_bodies()
            await asyncio.sleep(1.0)

    def _forget_bodies(self) -> None:
        """What was asked of the upstream is counted, not kept: bodies of ten minutes would fill the memory."""
        requests = self.upstream.requests
        while self._forgotten < len(requests) and requests[self._forgotten].done.is_set():
            if requests[self._forgotten].path == "/v1/messages":
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
                calm = outcomes.calm_latency(record.outcomes, self._calm_bound).detail.partition(";")[0]
                memory = max((one["resident_bytes"] for one in record.samples[-8:]), default=0.0) / 2**20
                self.say(
                    f"{record.now:4.0f} of {self.settings.seconds:g} s: {len(record.outcomes)} requests, {answered} answered, "
                    f"{unclear} unclear, {record.fault_count} faults, {record.callers} callers, {memory:.0f} MB, {calm}"
                )
