"""The engine against the floor: the same CLI, the same scripted upstream, with and without the server between.

Four processes: the upstream, the server, the CLIs, and this one, which is the client of the one and the driver of the
other. Every sample of ours has one of the floor taken right before or after it, in changing order, so that a busy
machine slows both; the figures are ratios and paired differences.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.client import Connection, Conversation, Reply, WrongAnswer, wait_for_spares
from bench.figures import Compare, Figure, Findings, ms
from bench.floor import RawCli, Timing, floor
from bench.processes import ServerProcess, Upstream, calm, exact_cpu_seconds, scratch, server, upstream
from bench.progress import Progress

CORES = os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a measurement takes place."""

    directory: Path
    upstream: Upstream
    quick: bool
    progress: Progress
    source: Path | None
    """Another checkout's `src` for the server."""

    def server(self, name: str, **settings: object) -> contextlib.AbstractAsyncContextManager[ServerProcess]:
        return server(self.directory, name, self.upstream.url, source=self.source, **settings)

    def floor(self, count: int) -> contextlib.AbstractAsyncContextManager[list[RawCli]]:
        return floor(self.directory, self.upstream.url, count, together=CORES)


@contextlib.asynccontextmanager
async def scene(*, quick: bool, progress: Progress, source: Path | None = None) -> AsyncIterator[Scene]:
    """A directory and an upstream for one suite."""
    async with scratch() as directory, upstream(directory) as model_api:
        yield Scene(directory, model_api, quick, progress, source)


async def measure(at: Scene) -> Findings:
    """Turns, first answers, many at once."""
    found = Findings()
    for part in (turns, first_answers, many):
        await part(at, found)
    return found


# Second and later turns --------------------------------------------------------------------------------------------------


async def turns(at: Scene, found: Findings) -> None:
    """Turn by turn in changing order; a fresh process on both sides for every block, so that histories stay short."""
    blocks, length = (2, 12) if at.quick else (4, 25)
    ours: list[Reply] = []
    its: list[Timing] = []
    cpu: dict[str, list[float]] = {"server": [], "cli": [], "floor cli": []}
    async with at.server("turns", spares=1) as running, Connection(running) as connection:
        found.raw["sandbox"] = running.sandbox
        for block in range(blocks):
            await wait_for_spares(connection, 1)
            conversation = Conversation(connection)
            async with at.floor(1) as (cli,):
                await cli.first_answer("hello")
                await conversation.ask("hello")
                for number in range(4):
                    await cli.turn(f"warm up {number}")
                    reply = await conversation.ask(f"warm up {number}")
                await wait_for_spares(connection, 1)
                await calm([*running.agents(), cli.pid])
                pids = {"server": running.pid, "cli": reply.pid, "floor cli": cli.pid}
                before = {name: exact_cpu_seconds(pid) for name, pid in pids.items()}

                async def mine(number: int, conversation: Conversation = conversation) -> None:
                    ours.append(await conversation.ask(f"question number {number}"))

                async def its_own(number: int, cli: RawCli = cli) -> None:
                    its.append(await cli.turn(f"question number {number}"))

                for number in range(length):
                    await _in_turn(number, mine, its_own)
                    at.progress.step("turns", block * length + number + 1, blocks * length)
                for name, pid in pids.items():
                    cpu[name].append((exact_cpu_seconds(pid) - before[name]) / length)
    added = Compare.ADDED
    found.figures += [
        Figure("a later turn, to its end", "ms", _totals(ours), _totals(its), added, 3.0),
        Figure("a later turn, to its first text", "ms", _firsts(ours), _firsts(its), added),
        Figure("CPU of the CLI per turn", "ms", ms(cpu["cli"]), ms(cpu["floor cli"]), Compare.RATIO),
        Figure("CPU of the server per turn", "ms", ms(cpu["server"])),
    ]


# First answers ---------------------------------------------------------------------------------------------------------


async def first_answers(at: Scene, found: Findings) -> None:
    """A new caller while spares wait, and without any; the floor in the same three states."""
    rounds = 2 if at.quick else 8
    seen: dict[str, list[Reply]] = {"spare": [], "refilling": [], "cold": []}
    raw: dict[str, list[Timing]] = {"spare": [], "primed": [], "cold": []}
    async with contextlib.AsyncExitStack() as stack:
        # With as many processes as spares nothing is started while the answer runs; the second server starts the next
        # spare at once, on the same cores.
        bounded = await stack.enter_async_context(
            at.server("bounded", spares=1, max_processes=1, idle_seconds=1, sweep_seconds=0.2)
        )
        refilling = await stack.enter_async_context(at.server("refilling", spares=1, idle_seconds=1, sweep_seconds=0.2))
        cold = await stack.enter_async_context(at.server("cold", spares=0, idle_seconds=1, sweep_seconds=0.2))
        servers = {"spare": bounded, "refilling": refilling, "cold": cold}
        connections = {name: await stack.enter_async_context(Connection(running)) for name, running in servers.items()}
        for number in range(rounds):
            async with at.floor(2) as (spare, primed):
                await primed.prime()
                text = f"good morning {number}"

                async def settled(raw_pids: tuple[int, ...] = (spare.pid, primed.pid)) -> None:
                    await calm([*raw_pids, *(pid for one in servers.values() for pid in one.agents())])

                async def ask(name: str, text: str = text) -> None:
                    if name != "cold":
                        await wait_for_spares(connections[name], 1)
                    await settled()
                    reply = await Conversation(connections[name]).ask(text)
                    expected = "cold" if name == "cold" else "spare"
                    if reply.kind != expected:
                        raise WrongAnswer(f"the answer came from a {reply.kind} process, not from a {expected} one")
                    seen[name].append(reply)

                async def floor_spare(text: str = text, cli: RawCli = spare) -> None:
                    await settled()
                    raw["spare"].append(await cli.first_answer(text))

                async def floor_primed(text: str = text, cli: RawCli = primed) -> None:
                    await settled()
                    raw["primed"].append(await cli.turn(text))

                async def floor_cold(text: str = text) -> None:
                    await settled()
                    began = time.perf_counter()
                    cli = await RawCli.spawn(at.directory, at.upstream.url)
                    try:
                        timing = await cli.first_answer(text)
                        total = time.perf_counter() - began
                        raw["cold"].append(Timing(total - timing.total + timing.first, total))
                    finally:
                        await cli.end()

                steps: list[Callable[[], Awaitable[None]]] = [
                    floor_spare,
                    lambda: ask("spare"),
                    floor_primed,
                    lambda: ask("refilling"),
                    floor_cold,
                    lambda: ask("cold"),
                ]
                for step in steps[number % 6 :] + steps[: number % 6]:
                    await step()
            at.progress.step("first answers", number + 1, rounds)
    compare = Compare.RATIO
    on_spare, refill, fresh = (_totals(seen[name]) for name in ("spare", "refilling", "cold"))
    found.figures += [
        Figure("new caller on a spare, floor: spare", "ms", on_spare, _totals(raw["spare"]), compare, 1.15),
        Figure("new caller on a spare, floor: primed spare", "ms", on_spare, _totals(raw["primed"]), compare, 1.3),
        Figure("the same, to the first text", "ms", _firsts(seen["spare"]), _firsts(raw["primed"]), compare),
        Figure(
            "new caller while the next spare starts, floor: primed spare",
            "ms",
            refill,
            _totals(raw["primed"]),
            compare,
            note="the floor starts nothing meanwhile",
        ),
        Figure("new caller without spares (cold)", "ms", fresh, _totals(raw["cold"]), compare),
    ]


# Many at once ----------------------------------------------------------------------------------------------------------


async def many(at: Scene, found: Findings) -> None:
    """32 new callers at once (a quick run: 16); then turns per second of 8 and of as many conversations."""
    callers = 16 if at.quick else 32
    sizes = (8, callers)
    blocks, seconds = (2, 1.5) if at.quick else (6, 2.0)
    async with contextlib.AsyncExitStack() as stack:
        clis: list[RawCli] = []
        stack.push_async_callback(_end_all, clis)
        at.progress.say(f"{callers} new callers at once: floor")
        its_burst = await _floor_burst(at, callers, clis)
        with _stopped([cli.pid for cli in clis]):
            running = await stack.enter_async_context(at.server("many", freeze_seconds=0))
            connections = [await stack.enter_async_context(Connection(running)) for _ in range(callers)]
            await wait_for_spares(connections[0], 2)
            await calm(running.agents())
            conversations = [Conversation(connection) for connection in connections]
            at.progress.say(f"{callers} new callers at once: server")
            our_burst, failures = await _our_burst(conversations, running)
            await wait_for_spares(connections[0], 2)
        rates = {size: {"ours": [], "floor": []} for size in sizes}  # type: ignore[var-annotated]
        costs: list[dict[str, Any]] = []
        done = 0
        for block in range(blocks):
            for size in sizes if block % 2 else reversed(sizes):
                for side in ("floor", "ours") if block % 2 else ("ours", "floor"):
                    with _stopped(await _agent_pids(connections[0]) if side == "floor" else [c.pid for c in clis]):
                        workers: Sequence[Any] = clis[:size] if side == "floor" else conversations[:size]
                        rate, cost = await _rate(at, workers, running, seconds)
                    rates[size][side].append(rate)
                    costs.append({"side": side, "size": size, "turns_per_second": rate, "cpu_ms_per_turn": cost})
                    done += 1
                    at.progress.step("turns per second", done, blocks * len(sizes) * 2)
    found.raw["throughput"] = costs
    found.raw["burst_failures"] = failures
    found.figures += [
        Figure(f"{callers} new callers at once: failed", "", [float(len(failures))], target=0.0),
        Figure(
            f"{callers} new callers at once: until all are answered",
            "s",
            [our_burst["seconds"]],
            [its_burst["seconds"]],
            Compare.RATIO,
            note="spawn CPU is the limit: see the next line",
        ),
        Figure(
            f"{callers} new callers at once: CPU per caller, CLI and server",
            "ms",
            [our_burst["cpu_ms"]],
            [its_burst["cpu_ms"]],
            Compare.RATIO,
        ),
        *(
            Figure(
                f"turns per second, {size} conversations",
                "/s",
                rates[size]["ours"],
                rates[size]["floor"],
                Compare.RATE,
                0.9,
                note=_cost_note([cost for cost in costs if cost["size"] == size]),
            )
            for size in sizes
        ),
        *(
            Figure(
                f"CPU per turn of all parties, {size} conversations",
                "ms",
                _cpu_per_turn(costs, size, "ours"),
                _cpu_per_turn(costs, size, "floor"),
                Compare.RATIO,
                note="what the rates come to on a machine that does nothing else",
            )
            for size in sizes
        ),
    ]


async def _floor_burst(at: Scene, callers: int, clis: list[RawCli]) -> dict[str, float]:
    room = asyncio.Semaphore(CORES)
    began = time.perf_counter()

    async def one(number: int) -> None:
        async with room:
            cli = await RawCli.spawn(at.directory, at.upstream.url)
            clis.append(cli)
            await cli.first_answer(f"caller {number}")

    await asyncio.gather(*(one(number) for number in range(callers)))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "cpu_ms": sum(exact_cpu_seconds(cli.pid) for cli in clis) * 1000 / callers}


async def _our_burst(
    conversations: Sequence[Conversation], running: ServerProcess
) -> tuple[dict[str, float], list[str]]:
    before = sum(map(exact_cpu_seconds, [running.pid, *running.agents()]))
    began = time.perf_counter()
    replies = await asyncio.gather(
        *(one.ask(f"caller {number}") for number, one in enumerate(conversations)), return_exceptions=True
    )
    seconds = time.perf_counter() - began
    cpu = sum(map(exact_cpu_seconds, [running.pid, *running.agents()])) - before
    failures = [repr(reply) for reply in replies if not isinstance(reply, Reply)]
    return {"seconds": seconds, "cpu_ms": cpu * 1000 / len(conversations)}, failures


async def _rate(
    at: Scene, workers: Sequence[Any], running: ServerProcess, seconds: float
) -> tuple[float, dict[str, float]]:
    """(turns a second, milliseconds of CPU per turn of each party) with all workers asking again and again."""
    ours = isinstance(workers[0], Conversation)
    pids = {
        "client": [os.getpid()],
        "upstream": [at.upstream.pid],
        "server": [running.pid] if ours else [],
        "cli": running.agents() if ours else [worker.pid for worker in workers],
    }
    # Once round: what was stopped wakes up, what is lazy is done.
    await asyncio.gather(*(_turn(worker, "wake up") for worker in workers))
    before = {name: sum(map(exact_cpu_seconds, some)) for name, some in pids.items()}
    began = time.perf_counter()
    deadline = began + seconds

    async def work(worker: Any) -> int:
        count = 0
        while time.perf_counter() < deadline:
            await _turn(worker, f"question {count}")
            count += 1
        return count

    count = sum(await asyncio.gather(*(work(worker) for worker in workers)))
    elapsed = time.perf_counter() - began
    cost = {
        name: round((sum(map(exact_cpu_seconds, some)) - before[name]) * 1000 / count, 3) for name, some in pids.items()
    }
    return count / elapsed, cost


async def _turn(worker: Any, text: str) -> None:
    await (worker.ask(text) if isinstance(worker, Conversation) else worker.turn(text))


def _cpu_per_turn(costs: Sequence[dict[str, Any]], size: int, side: str) -> list[float]:
    return [sum(one["cpu_ms_per_turn"].values()) for one in costs if one["size"] == size and one["side"] == side]


def _cost_note(costs: Sequence[dict[str, Any]]) -> str:
    """CPU per turn of each party, medians over the blocks."""
    sides = []
    for side in ("ours", "floor"):
        mine = [cost["cpu_ms_per_turn"] for cost in costs if cost["side"] == side]
        names = [name for name in mine[0] if side == "ours" or name != "server"]
        parts = (f"{name} {sorted(one[name] for one in mine)[len(mine) // 2]:.1f}" for name in names)
        sides.append(f"{side} {', '.join(parts)}")
    return f"CPU ms per turn: {'; '.join(sides)}"


# Small things ----------------------------------------------------------------------------------------------------------


async def _in_turn(number: int, one: Callable[[int], Awaitable[None]], other: Callable[[int], Awaitable[None]]) -> None:
    """Both, in changing order."""
    for step in (one, other) if number % 2 else (other, one):
        await step(number)


async def _agent_pids(connection: Connection) -> list[int]:
    return [user["pid"] for user in (await connection.get("/v1/pool/stats"))["active_users"] if user["pid"]]


@contextlib.contextmanager
def _stopped(pids: Sequence[int]) -> Iterator[None]:
    """These processes take no CPU meanwhile: idle ones take 4 ms a second each, which adds up."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def _end_all(clis: list[RawCli]) -> None:
    await asyncio.gather(*(cli.end() for cli in clis))


def _totals(timings: Sequence[Reply] | Sequence[Timing]) -> list[float]:
    return ms([one.total for one in timings])


def _firsts(timings: Sequence[Reply] | Sequence[Timing]) -> list[float]:
    return ms([one.first for one in timings])
