"""What each sandbox level costs, all levels in turn within one run, held against `none`.

The CLI is the real one, started as the server starts it; the model is the scripted one. A level's first spawns pay for the
page cache, so one round of each is thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.figures import Compare, Figure, Findings, ms
from bench.processes import memory_mb, tree
from bench.progress import Progress
from claude_wrapper.agent.launch import Auth, LaunchProfile, locate_cli
from claude_wrapper.agent.settings import AgentSettings
from claude_wrapper.broker.broker import Broker
from claude_wrapper.broker.calls import Binding, Credential, CredentialKind, NoGate, NoSink, TurnContext
from claude_wrapper.broker.settings import BrokerSettings
from claude_wrapper.clock import SystemClock
from claude_wrapper.ids import RandomIds
from claude_wrapper.sandbox import Containment, SecurityLevel
from claude_wrapper.sandbox.probe import probe
from claude_wrapper.sandbox.security import POLICIES
from claude_wrapper.sandbox.staging import reachable_cli
from claude_wrapper.sandbox.uids import UidAllocator, UidRange
from claude_wrapper.sessions.process import ProcessFactory, SlotProcess
from claude_wrapper.testing.attack.runner import Column, columns
from claude_wrapper.testing.upstream import ScriptedUpstream

_MODEL = "claude-sonnet-5-5"
_PROFILE = LaunchProfile("agent", bare=False, tools=("Bash", "Read", "Write"), auth=Auth.API_KEY)
_UIDS = UidRange(320_000, 320_999)
_LIMITS = POLICIES[SecurityLevel.BALANCED].limits
_ADDED_MS = 20.0
"""What the full sandbox may add to a spawn."""


@dataclass(slots=True)
class _Samples:
    """Seconds, and MB."""

    launch: list[float] = field(default_factory=list)
    """A program that does nothing: directories made → exit."""
    spawn: list[float] = field(default_factory=list)
    """Slot asked for → CLI started."""
    first: list[float] = field(default_factory=list)
    """`initialize` and the first answer."""
    steady: list[float] = field(default_factory=list)
    end: list[float] = field(default_factory=list)
    """The slot's end, directories removed."""
    share: list[float] = field(default_factory=list)


async def measure(*, quick: bool, progress: Progress) -> Findings:
    """Levels that this host lacks are named in the raw part."""
    report = await asyncio.to_thread(probe)
    offered = list(columns(report))
    rounds, launches, turns = (2, 5, 3) if quick else (9, 31, 8)
    samples = {column.label: _Samples() for column in offered}
    base = Path(tempfile.mkdtemp(prefix="cw-bench-"))
    base.chmod(0o711)
    try:
        async with _broker() as (broker, upstream):
            for number in range(launches + 1):
                progress.step("launches per level", number, launches)
                for column in offered:
                    seconds = await _launch(column, base / f"launch-{number}")
                    if number:
                        samples[column.label].launch.append(seconds)
            for number in range(rounds + 1):
                progress.step("CLIs per level", number, rounds)
                for column in offered:
                    into = samples[column.label] if number else _Samples()
                    await _round(column, broker, upstream.url, base / str(number), into=into, turns=turns)
    finally:
        for column in offered:
            column.sandbox.close()
        await asyncio.to_thread(shutil.rmtree, base, ignore_errors=True)
    return Findings(_figures(samples), {"unavailable": {str(key): why for key, why in report.unavailable.items()}})


@contextlib.asynccontextmanager
async def _broker() -> AsyncIterator[tuple[Broker, ScriptedUpstream]]:
    async with ScriptedUpstream() as upstream:
        broker = Broker(BrokerSettings(), SystemClock(), RandomIds(), NoGate(), NoSink())
        await broker.start()
        try:
            yield broker, upstream
        finally:
            await broker.close()


async def _launch(column: Column, root: Path) -> float:
    uid = _UIDS.first if column.own_uid else None
    program = Path(shutil.which("true") or "/bin/true").resolve()
    began = time.perf_counter()
    dirs = column.sandbox.create_dirs(root, uid)
    env = {"PATH": "/usr/bin:/bin"}
    launch = column.sandbox.prepare(Containment(dirs=dirs, cli=program, argv=(), env=env, limits=_LIMITS, uid=uid))
    try:
        process = await asyncio.create_subprocess_exec(
            *launch.argv, env=launch.env, cwd=launch.cwd, pass_fds=launch.pass_fds, start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        launch.close_fds()
    if await process.wait() != 0:
        raise RuntimeError(f"{column.label}: a program that does nothing ended with {process.returncode}")
    seconds = time.perf_counter() - began
    await asyncio.to_thread(column.sandbox.remove_dirs, dirs)
    return seconds


async def _round(column: Column, broker: Broker, upstream: str, slots: Path, *, into: _Samples, turns: int) -> None:
    uid = _UIDS.first if column.own_uid else None
    factory = ProcessFactory(
        loop_disks=column.disks,
        cli=await asyncio.to_thread(reachable_cli, locate_cli(), slots.parent / "cli", uid),
        slots_dir=slots,
        sandbox=column.sandbox,
        limits=_LIMITS,
        broker=broker,
        settings=AgentSettings(),
        default_model=_MODEL,
        clock=SystemClock(),
        ids=RandomIds(),
        uids=UidAllocator(_UIDS) if column.own_uid else None,
    )
    began = time.perf_counter()
    process = await factory.spawn(column.label.partition(",")[0], _PROFILE, None)
    try:
        into.spawn.append(time.perf_counter() - began)
        began = time.perf_counter()
        credential = Credential("cred", CredentialKind.API_KEY, "sk-ant-bench", upstream)
        process.endpoint.bind(Binding("org", None, None, None, "sesn", credential))
        process.endpoint.begin(TurnContext("turn", _MODEL))
        await process.agent.initialize()
        await _turn(process)
        into.first.append(time.perf_counter() - began)
        into.steady += [await _turn(process) for _ in range(turns)]
        into.share.append(memory_mb([process.agent.pid, *tree(process.agent.pid)])[1])
    finally:
        began = time.perf_counter()
        await process.stop("bench")
        into.end.append(time.perf_counter() - began)


async def _turn(process: SlotProcess) -> float:
    began = time.perf_counter()
    async with process.agent.turn("hello") as turn:
        async for _ in turn:
            pass
    return time.perf_counter() - began


def _figures(samples: dict[str, _Samples]) -> list[Figure]:
    bare = samples["none"]
    figures: list[Figure] = []
    for label, mine in samples.items():
        if mine is bare:
            continue
        added = {"compare": Compare.ADDED}
        goal = {"target": _ADDED_MS} if label.startswith("bwrap") else {}
        figures += [
            Figure(f"{label}: a program that does nothing", "ms", ms(mine.launch), ms(bare.launch), **added, **goal),
            Figure(f"{label}: spawn of the CLI", "ms", ms(mine.spawn), ms(bare.spawn), **added),
            Figure(f"{label}: first answer", "ms", ms(mine.first), ms(bare.first), **added),
            Figure(f"{label}: a later turn", "ms", ms(mine.steady), ms(bare.steady), **added),
            Figure(f"{label}: end of the slot", "ms", ms(mine.end), ms(bare.end), **added),
            Figure(f"{label}: memory, shared pages counted once", "MB", mine.share, bare.share, Compare.RATIO),
        ]
    return figures
