"""What idle conversations cost: memory and CPU while they just wait, frozen, and hibernated; and what waking costs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from bench.client import Connection, Conversation
from bench.engine import Scene
from bench.figures import Figure, Findings, ms
from bench.processes import calm, cpu_seconds, exact_cpu_seconds, memory_mb


async def measure(at: Scene) -> Findings:
    """One server whose conversations pass through all three states."""
    count, freeze, idle, window, wakes = (6, 4, 8, 1.5, 2) if at.quick else (20, 10, 24, 4.0, 4)
    found = Findings()
    states: dict[str, dict[str, float]] = {}
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            at.server("idle", spares=0, freeze_seconds=freeze, idle_seconds=idle, sweep_seconds=1)
        )
        connection = await stack.enter_async_context(Connection(running))
        sessions = [Conversation(connection, session=f"bench-{number}") for number in range(count)]
        states["empty server"] = await _cost(running.pid, [], window)
        for number, one in enumerate(sessions):
            await one.ask("hello")
            at.progress.step("idle conversations", number + 1, count)
        for one in sessions:
            await one.ask("hello again")  # so that they all begin to be idle together

        async def users() -> list[dict[str, Any]]:
            return list((await connection.get("/v1/pool/stats"))["active_users"])

        pids = [user["pid"] for user in await users()]
        await calm(pids, limit=1.5)
        states["waiting"] = await _cost(running.pid, pids, window)
        at.progress.say("idle conversations: until they are frozen")
        await _until(users, lambda all_: all(user["frozen"] for user in all_), freeze + 10)
        states["frozen"] = await _cost(running.pid, pids, window)
        awake = [(await one.ask("hello from the cold")).total for one in sessions[:wakes]]
        at.progress.say("idle conversations: until they are hibernated")
        await _until(users, lambda all_: not all_, idle + 20)
        states["hibernated"] = await _cost(running.pid, [], window)
        back = [(await one.ask("hello from far away")).total for one in sessions[:wakes]]
    found.raw["states"] = states
    for name in ("waiting", "frozen", "hibernated"):
        state = states[name]
        found.figures += [
            Figure(
                f"{count} conversations {name}: CPU", "ms/s", [state["cli_cpu_ms_per_s"] + state["server_cpu_ms_per_s"]]
            ),
            Figure(
                f"{count} conversations {name}: memory",
                "MB",
                [state["pss_mb"] + state["server_mb"]],
                note=f"shared pages counted once; {state['rss_mb']:.0f} MB resident in the CLIs, {state['server_mb']:.0f} MB the server",
            ),
        ]
    found.figures += [
        Figure("a frozen conversation's next answer", "ms", ms(awake)),
        Figure("a hibernated conversation's next answer (no spares)", "ms", ms(back)),
    ]
    return found


async def _cost(server: int, pids: list[int], window: float) -> dict[str, float]:
    before, began = cpu_seconds(pids), time.perf_counter()
    own = exact_cpu_seconds(server)
    await asyncio.sleep(window)
    elapsed = time.perf_counter() - began
    resident, share = memory_mb(pids)
    return {
        "cli_cpu_ms_per_s": (cpu_seconds(pids) - before) * 1000 / elapsed,
        "server_cpu_ms_per_s": (exact_cpu_seconds(server) - own) * 1000 / elapsed,
        "rss_mb": resident,
        "pss_mb": share,
        "server_mb": memory_mb([server])[0],
    }


async def _until(users: Callable[[], Any], condition: Callable[[list[dict[str, Any]]], bool], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not condition(await users()):
            await asyncio.sleep(0.3)
