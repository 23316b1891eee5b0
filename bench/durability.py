"""What durability costs: snapshots, the first word of a session that comes back, and sessions that only wait to.

A session that comes back "here" was hibernated by this server, which still has its files; one that comes back "elsewhere"
was forgotten by its server, files included: it comes from the database and the blob store, as on another replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import sqlalchemy as sa

import claude_wrapper.storage.tables  # noqa: F401 (declares the tables)
from bench.client import Connection, Conversation, Reply, WrongAnswer
from bench.engine import Scene
from bench.figures import Compare, Figure, Findings, ms
from bench.processes import KEY, MODEL, ServerProcess, calm, memory_mb
from bench.scripts import run
from claude_wrapper.storage.schema import metadata

_TOOLS = [{"type": "agent_toolset_20260401", "default_config": {"permission_policy": {"type": "always_allow"}}}]
_WRITE = '[[tool Bash {"command":"head -c 6000 /dev/urandom | base64 > note; echo written"}]] [[then]]'
_HEADERS = {"authorization": f"Bearer {KEY}", "anthropic-version": "2023-06-01"}
_SECONDS = 60.0
_PAGE = 100


async def measure(at: Scene) -> Findings:
    """Snapshots, coming back, waiting."""
    found = Findings()
    await snapshots(at, found)
    session = await coming_back(at, found)
    await waiting(at, found, session)
    return found


# Snapshots ---------------------------------------------------------------------------------------------------------------


async def snapshots(at: Scene, found: Findings) -> None:
    """`bench/snapshots.py`: the store alone, on SQLite and a directory."""
    at.progress.say("snapshots")
    sizes = ["10"] if at.quick else ["10", "1000"]
    raw = await run("snapshots.py", ["--megabytes", *sizes], seconds=900)
    found.raw["snapshots"] = raw
    for size, seen in raw.items():
        files, copy = f"{seen['files']} files", [seen["floor_copytree"]["seconds"]]
        steps = {"first snapshot": "first_save", "snapshot, nothing changed": "unchanged_save"}
        steps |= {"snapshot, one file changed": "one_file_save"}
        for what, step in steps.items():
            stored = f"{seen[step]['bytes_written']:,} bytes stored, {seen[step]['cpu']:g} s of CPU"
            found.figures.append(Figure(f"{size}: {what}", "s", [seen[step]["seconds"]], note=f"{files}, {stored}"))
        found.figures += [
            Figure(
                f"{size}: restore (floor: copying the directory)",
                "s",
                [seen["restore"]["seconds"]],
                copy,
                Compare.RATIO,
            ),
            Figure(f"{size}: stored for one changed file", "B", [seen["one_file_save"]["bytes_written"]]),
            Figure(f"{size}: longest stop of the event loop", "ms", ms([_longest(seen)])),
        ]


def _longest(seen: dict[str, Any]) -> float:
    return max(float(seen[step]["longest_pause"]) for step in ("first_save", "one_file_save", "restore"))


# Sessions over HTTP ------------------------------------------------------------------------------------------------------


class _Client:
    """A caller of `/v1/sessions`."""

    def __init__(self, http: aiohttp.ClientSession, server: ServerProcess) -> None:
        self._http = http
        self._url = f"http://{server.host}:{server.port}"

    async def get(self, path: str) -> Any:
        async with self._http.get(f"{self._url}{path}") as answer:
            answer.raise_for_status()
            return await answer.json()

    async def _made(self, path: str, body: dict[str, Any]) -> str:
        async with self._http.post(f"{self._url}{path}", json=body) as answer:
            answer.raise_for_status()
            return str((await answer.json())["id"])

    async def session(self) -> str:
        """A session of an agent with all tools."""
        agent = await self._made("/v1/agents", {"name": "bench", "model": MODEL, "tools": _TOOLS})
        environment = await self._made("/v1/environments", {"name": "bench"})
        return await self._made("/v1/sessions", {"agent": agent, "environment_id": environment})

    async def turn(self, session: str, text: str) -> None:
        """Returns when the turn is over."""
        path = f"{self._url}/v1/sessions/{session}/events"
        async with self._http.get(f"{path}/stream") as stream:
            body = {"events": [{"type": "user.message", "content": [{"type": "text", "text": text}]}]}
            async with self._http.post(path, json=body) as answer:
                answer.raise_for_status()
            async for line in stream.content:
                if line.startswith(b"event: session.error"):
                    told = await stream.content.readline()
                    raise RuntimeError(f"the session was told of an error: {told.decode()}")
                if line.startswith(b"event: session.status_idle"):
                    return
        raise RuntimeError("the stream ended before the answer")

    async def asleep(self) -> None:
        """Return when no session has a process."""
        async with asyncio.timeout(_SECONDS):
            while (await self.get("/v1/pool/stats"))["active_users"]:
                await asyncio.sleep(0.05)


@asynccontextmanager
async def _together(
    starting: Mapping[str, AbstractAsyncContextManager[ServerProcess]],
) -> AsyncIterator[dict[str, ServerProcess]]:
    """Servers that are started and stopped at the same time."""
    stacks = {name: AsyncExitStack() for name in starting}
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(stacks[name].enter_async_context(one)) for name, one in starting.items()}
        yield {name: task.result() for name, task in tasks.items()}
    finally:
        await asyncio.gather(*(stack.aclose() for stack in stacks.values()))


# Coming back -------------------------------------------------------------------------------------------------------------


async def coming_back(at: Scene, found: Findings) -> str:
    """The first text of a new conversation on a warm spare, and of one that was hibernated, in turn.

    "Here" and "elsewhere" come back on a spare, which is told the past; "resumed" finds none and is started with --resume.

    All are named conversations of `/v1/messages` with the default tools, which the spares of agents are for. Returns a
    hibernated session of the server "elsewhere".
    """
    rounds = 2 if at.quick else 8
    seen: dict[str, list[Reply]] = {"spare": [], "here": [], "elsewhere": [], "resumed": []}
    settings = {"spares": 0, "agent_spares": 1, "idle_seconds": 1, "sweep_seconds": 0.2}
    starting = {
        # With as many processes as spares nothing is started while the new conversation's answer runs.
        "spare": at.server("spare", **settings | {"max_processes": 1}),
        "here": at.server("here", **settings),
        "elsewhere": at.server("elsewhere", **settings, kept_seconds=1),
        "resumed": at.server("resumed", **settings | {"agent_spares": 0}),
    }
    wanted = {"spare": 1, "here": 2, "elsewhere": 2, "resumed": 0}
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(_together(starting))
        found.raw["sandbox"] = servers["here"].sandbox
        connections = {name: await stack.enter_async_context(Connection(one)) for name, one in servers.items()}

        def conversation(name: str, number: int = 0) -> Conversation:
            return Conversation(connections[name], session=f"bench-{number}", agent={"tools": "default"})

        returning = {name: conversation(name) for name in seen if name != "spare"}
        for one in returning.values():
            await one.ask(_WRITE, expect="Tool said: written")

        async def rested(name: str) -> None:
            """Nothing has a process, a spare waits, and where it must be so nothing is left on this server."""
            kept = at.directory / name / "kept"
            async with asyncio.timeout(_SECONDS):
                while True:
                    stats = await connections[name].get("/v1/pool/stats")
                    gone = name != "elsewhere" or not any(kept.iterdir())
                    spares = stats["spares"].get(
                        "agent", 0
                    )  # one of these tools, and of a session's where there is room
                    if gone and not stats["active_users"] and spares >= wanted[name]:
                        break
                    await asyncio.sleep(0.05)
            await calm([pid for one in servers.values() for pid in one.agents()], limit=2 if at.quick else 4)

        async def ask(name: str, number: int) -> None:
            await rested(name)
            one = returning.get(name) or conversation(name, number)
            reply = await one.ask(f"good morning {number}")
            if reply.kind != (expected := "cold" if name == "resumed" else "spare"):
                raise WrongAnswer(f"{name}: the answer came from a {reply.kind} process, not from a {expected} one")
            seen[name].append(reply)

        for number in range(rounds):
            names = list(seen)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                await ask(name, number)
            at.progress.step("coming back", number + 1, rounds)
        session = await _hibernated(servers["elsewhere"])
    firsts = {name: ms([reply.first for reply in replies]) for name, replies in seen.items()}
    told = (
        f"floor: a new conversation on a warm spare; the hibernated one's past grows by a turn a round, to {rounds + 1}"
    )
    ways = {
        "here": ("here, on a spare", 1.5, told),
        "elsewhere": ("from its snapshot, as on another replica, on a spare", 1.5, told),
        "resumed": ("here, when no spare waits", None, "the same floor; its CLI is started with --resume"),
    }
    for name, (how, target, note) in ways.items():
        title = f"first text of a hibernated agent {how}"
        found.figures.append(Figure(title, "ms", firsts[name], firsts["spare"], Compare.RATIO, target, note))
    return session


async def _hibernated(server: ServerProcess) -> str:
    """A session of `/v1/sessions` that has run two turns and has no process any more."""
    async with aiohttp.ClientSession(headers=_HEADERS) as http:
        client = _Client(http, server)
        session = await client.session()
        for _ in range(2):
            await client.turn(session, _WRITE)
        await client.asleep()
    return session


# Waiting -----------------------------------------------------------------------------------------------------------------


async def waiting(at: Scene, found: Findings, session: str) -> None:
    """Memory and bytes per session that has no process: the rows of a real one of the server "elsewhere", copied."""
    count = 1_000 if at.quick else 10_000
    directory = at.directory / "elsewhere"
    database = directory / "claude-wrapper.db"
    await asyncio.to_thread(copied, database, session, range(_PAGE))
    before = await _memory(at)
    at.progress.say(f"waiting sessions: {count:,} are written")
    size, rows = await asyncio.to_thread(copied, database, session, range(_PAGE, _PAGE + count))
    after = await _memory(at)
    blobs = sum(path.stat().st_size for path in directory.glob(f"blobs/snapshots/*/{session}/*/*"))
    found.raw["waiting"] = {"sessions": count, "rows": rows, "server_mb": [before, after], "blob_bytes": blobs}
    told = ", ".join(f"{number} {table}" for table, number in rows.items())
    found.figures += [
        Figure(
            f"memory of the server per hibernated session ({count:,} of them)",
            "B",
            [max(0.0, (after - before) * (1 << 20) / count)],
            note=f"resident: {before:.1f} MB without and {after:.1f} MB with them, each after a page of sessions was listed",
        ),
        Figure("database per hibernated session of two turns", "B", [size / count], note=f"SQLite; rows: {told}"),
        Figure(
            "blob store for it", "B", [blobs], note="a workspace of one file of 8 KB and the transcript, two snapshots"
        ),
    ]


async def _memory(at: Scene) -> float:
    """MB of a server that was started on this directory, has looked around and has listed sessions."""
    async with at.server("elsewhere", spares=0, agent_spares=0, sweep_seconds=0.2) as server, Connection(server) as one:
        listed = (await one.get(f"/v1/sessions?limit={_PAGE}"))["data"]
        if len(listed) != _PAGE:
            raise RuntimeError(f"the server knows of {len(listed)} sessions, not of {_PAGE} and more")
        await asyncio.sleep(1)
        await calm([server.pid])
        return memory_mb([server.pid])[0]


def copied(database: Path, session: str, names: range) -> tuple[int, dict[str, int]]:
    """Copy all that a SQLite database holds of a session, under these numbers; (bytes it grew by, rows of each by table)."""
    engine = sa.create_engine(f"sqlite:///{database}")

    def size(connection: sa.Connection) -> int:
        pages, free, page = (
            int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * page

    numbers: dict[str, int] = {}
    try:
        with closing(engine.connect()) as connection:
            before = size(connection)
            for table, column in _of_sessions():
                rows = [dict(row._mapping) for row in connection.execute(sa.select(table).where(column == session))]
                if not rows:
                    continue
                numbers[table.name] = len(rows)
                for first in range(0, len(names), 200):
                    copies = [
                        {**row, column.name: f"{session[:-8]}{number:08}"}
                        for number in names[first : first + 200]
                        for row in rows
                    ]
                    connection.execute(sa.insert(table), copies)
            connection.commit()
            return size(connection) - before, numbers
    finally:
        engine.dispose()


def _of_sessions() -> Iterator[tuple[sa.Table, sa.Column[Any]]]:
    """The tables that hold a session, itself first, with the column of its id."""
    for table in metadata.sorted_tables:
        if table.name == "sessions":
            yield table, table.c.id
        elif "session_id" in table.primary_key.columns:
            yield table, table.c.session_id
