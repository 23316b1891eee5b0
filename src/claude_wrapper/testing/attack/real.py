"""Attacks through the agent's own Bash tool: the real CLI in its slot, the real broker, a scripted model that says what to run.

For each attack a fresh slot is started. The broker's ledger and the scripted upstream are compared after it. Attacks that
use up what neighbours need are measured by the turns of another tenant, before and meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from claude_wrapper.agent.launch import Auth, LaunchProfile, locate_cli
from claude_wrapper.agent.settings import AgentSettings
from claude_wrapper.broker.broker import Broker
from claude_wrapper.broker.calls import (
    Binding,
    CallSink,
    Credential,
    CredentialKind,
    NoGate,
    TurnContext,
    UpstreamCall,
)
from claude_wrapper.broker.settings import BrokerSettings
from claude_wrapper.clock import SystemClock
from claude_wrapper.errors import WrapperError
from claude_wrapper.ids import RandomIds
from claude_wrapper.sandbox import files, processes, reachable_cli
from claude_wrapper.sandbox.uids import UidAllocator, UidRange
from claude_wrapper.sessions.process import ProcessFactory, SlotProcess
from claude_wrapper.testing.attack.catalogue import PRELUDE, Attack
from claude_wrapper.testing.attack.catalogue_broker import BROKER_PRELUDE
from claude_wrapper.testing.attack.runner import (
    ATTACKERS,
    VICTIM,
    Column,
    Outcome,
    from_outside,
    promised,
    python_inside,
)
from claude_wrapper.testing.attack.scenery import LIMITS, Scenery, scenery
from claude_wrapper.testing.upstream import ScriptedUpstream

PROFILE = LaunchProfile("agent", bare=False, tools=("Bash",), auth=Auth.API_KEY)
MODEL = "claude-sonnet-5-5"
_SECONDS = 60.0
_BASELINE_TURNS = 8
_MAX_GROWTH = 400 << 20
_PATHS = ("/v1/messages", "/v1/messages/count_tokens", "/v1/models")


class Ledger(CallSink):
    """What the broker counted."""

    def __init__(self) -> None:
        self.calls: list[UpstreamCall] = []

    async def record(self, call: UpstreamCall) -> None:
        self.calls.append(call)


@dataclass(frozen=True, slots=True)
class Latency:
    """What a neighbour felt of one attack, in seconds per turn."""

    attack: str
    column: str
    before: float
    meanwhile: float
    worst: float
    turns: int

    @property
    def ratio(self) -> float:
        return self.meanwhile / self.before


@dataclass(slots=True)
class _Stage:
    """One column's server: without HTTP, with everything that touches a process."""

    column: Column
    scenery: Scenery
    upstream: ScriptedUpstream
    ledger: Ledger
    factory: ProcessFactory
    neighbour: SlotProcess
    before: float = 0.0
    latencies: list[Latency] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    """What the attacker's CLI printed in its turn."""


async def run_column_with_cli(
    column: Column, attacks: tuple[Attack, ...], tell: Any = None
) -> tuple[list[Outcome], list[Latency]]:
    """Every attack in one column, one after the other, each in a fresh slot. `tell` is called with each outcome."""
    base = Path(tempfile.mkdtemp(prefix="claude-wrapper-attack-"))
    try:
        async with _stage(column, base) as stage:
            outcomes = []
            for number, attack in enumerate(attacks):
                outcomes.append(await _one(stage, attack, f"attacker{number}"))
                if tell is not None:
                    tell(outcomes[-1])
            return outcomes, stage.latencies
    finally:
        await asyncio.to_thread(files.remove_tree, base)
        column.sandbox.close()


@contextlib.asynccontextmanager
async def _stage(column: Column, base: Path) -> AsyncIterator[_Stage]:
    uid = VICTIM if column.own_uid else None
    clock, ids, ledger = SystemClock(), RandomIds(), Ledger()
    async with contextlib.AsyncExitStack() as stack:
        made = await stack.enter_async_context(scenery(base, column.sandbox, uid))
        upstream = await stack.enter_async_context(ScriptedUpstream())
        broker = Broker(BrokerSettings(), clock, ids, NoGate(), ledger)
        await broker.start()
        stack.push_async_callback(broker.close)
        cli = await asyncio.to_thread(reachable_cli, locate_cli(), base / "cli", uid)
        factory = ProcessFactory(
            cli=cli,
            slots_dir=made.slots,
            sandbox=column.sandbox,
            limits=LIMITS,
            loop_disks=column.disks,
            broker=broker,
            settings=AgentSettings(),
            default_model=MODEL,
            clock=clock,
            ids=ids,
            uids=UidAllocator(UidRange(ATTACKERS, ATTACKERS + 999)) if column.own_uid else None,
        )
        neighbour = await factory.spawn("neighbour", PROFILE, None)
        stack.push_async_callback(neighbour.stop, "end")
        stage = _Stage(column, made, upstream, ledger, factory, neighbour)
        await _bind(stage, neighbour, "org_neighbour")
        made.targets["other_token"] = neighbour.endpoint.token
        times = [await _turn(neighbour, "hello") for _ in range(_BASELINE_TURNS)]
        stage.before = statistics.median(times[2:])
        yield stage


async def _bind(stage: _Stage, process: SlotProcess, org: str) -> None:
    secret = stage.scenery.targets["credential"] + ("" if org == "org_attacker" else "-other")
    credential = Credential(f"cred_{org}", CredentialKind.API_KEY, secret, stage.upstream.url)
    await process.agent.initialize()
    process.agent.on_control = _allow
    process.endpoint.bind(Binding(org, None, None, None, f"ses_{org}", credential))
    process.endpoint.begin(TurnContext("turn", MODEL))


async def _allow(subtype: str, request: dict[str, Any]) -> dict[str, Any]:
    del subtype
    return {"behavior": "allow", "updatedInput": request.get("input", {})}


async def _turn(process: SlotProcess, text: str, frames: list[bytes] | None = None) -> float:
    """One turn; returns its seconds."""
    began = monotonic()
    async with process.agent.turn(text) as turn:
        async for frame in turn:
            if frames is not None:
                frames.append(frame.raw)
    return monotonic() - began


async def _one(stage: _Stage, attack: Attack, slot: str) -> Outcome:
    def outcome(held: bool, detail: str, failed: bool = False) -> Outcome:
        facts = stage.column.facts
        return Outcome(attack.name, stage.column.label, held, promised(attack, facts), detail, failed)

    try:
        async with asyncio.timeout(_SECONDS):
            process = await stage.factory.spawn(slot, PROFILE, None)
    except (WrapperError, TimeoutError) as error:
        return outcome(held=False, detail=f"no slot: {error}", failed=True)
    try:
        async with asyncio.timeout(3 * _SECONDS):
            said, breaches = await _attack(stage, attack, process)
    except (WrapperError, TimeoutError) as error:
        return outcome(held=False, detail=f"{type(error).__name__}: {error}", failed=True)
    finally:
        await process.stop("end")
    if not breaches and "END" not in said and not attack.bomb:
        return outcome(held=False, detail=(said or ["no output"])[-1], failed=True)
    return outcome(held=not breaches, detail=breaches[0] if breaches else "")


async def _attack(stage: _Stage, attack: Attack, process: SlotProcess) -> tuple[list[str], list[str]]:
    """(what the attack said, the breaches)."""
    dirs = process.dirs
    await _bind(stage, process, "org_attacker")
    targets = stage.scenery.targets | {
        "cli_pid": (processes.namespace_pids(process.pid) or (process.pid,))[-1],
        "token": process.endpoint.token,
        "socket": str(stage.column.sandbox.layout(dirs, Path("/bin/sh")).socket),
    }
    program = PRELUDE + (BROKER_PRELUDE if attack.needs_cli else "") + attack.program + "\nprint('END')\n"
    files.write_beneath(dirs.work, "attack.py", program.encode())
    files.write_beneath(dirs.work, "attack.json", json.dumps(targets).encode())
    stage.upstream.forget()
    stage.ledger.calls.clear()
    stage.frames.clear()
    size = processes.resident_bytes([_own_pid()])
    command = {"command": f"{python_inside()} attack.py > report 2>&1; true", "timeout": int(_SECONDS * 1000)}
    async with _felt_by_neighbour(stage, attack):
        with contextlib.suppress(WrapperError, TimeoutError):  # the attack may end its own CLI
            async with asyncio.timeout(_SECONDS):
                await _turn(process, f"[[tool Bash {json.dumps(command)}]] [[then]]", stage.frames)
    breaches = [found async for found in _from_broker(stage, process, size)]
    await process.agent.stop(grace=1.0)
    said: list[str] = []
    with contextlib.suppress(WrapperError):
        said = files.read_beneath(dirs.work, "report", 1 << 20).decode(errors="replace").splitlines()
    breaches = [line.removeprefix("BREACH ") for line in said if line.startswith("BREACH")] + breaches
    breaches += [found async for found in from_outside(stage.scenery, dirs, b"\n".join(stage.frames))]
    return said, breaches


def _own_pid() -> int:
    return int(Path("/proc/self").readlink().name)


async def _from_broker(stage: _Stage, process: SlotProcess, size: int) -> AsyncIterator[str]:
    """What the upstream and the ledger say of the attack."""
    await process.endpoint.end()
    targets = stage.scenery.targets
    asked = [call for call in stage.upstream.requests if call.headers.get("x-api-key") == targets["credential"]]
    strange = [
        call
        for call in stage.upstream.requests
        if call.headers.get("x-api-key") not in {targets["credential"], targets["credential"] + "-other"}
        or "authorization" in call.headers
        or "cookie" in call.headers
    ]
    for call in strange:
        yield f"the upstream was asked with a credential that is not the slot's: {call.method} {call.path}"
    for call in asked:
        if not call.path.startswith(_PATHS):
            yield f"the upstream was asked for {call.path}"
    counted = [call for call in stage.ledger.calls if call.org == "org_attacker" and call.attempts]
    messages = [call for call in asked if call.path == "/v1/messages"]
    if len(messages) > len([call for call in counted if call.path.partition("?")[0] == "/v1/messages"]):
        yield f"the upstream answered {len(messages)} requests and the ledger holds {len(counted)}"
    grown = processes.resident_bytes([_own_pid()]) - size
    if grown > _MAX_GROWTH:
        yield f"the server grew by {grown >> 20} MiB"
    if not stage.neighbour.alive:
        yield "ended another tenant's process"


@contextlib.asynccontextmanager
async def _felt_by_neighbour(stage: _Stage, attack: Attack) -> AsyncIterator[None]:
    """Turns of another tenant while a bomb goes off."""
    if not (attack.bomb or "1,000" in attack.name):
        yield
        return
    times: list[float] = []

    async def go_on() -> None:
        while True:
            times.append(await _turn(stage.neighbour, "hello"))

    turns = asyncio.create_task(go_on())
    try:
        yield
    finally:
        turns.cancel()
        with contextlib.suppress(asyncio.CancelledError, WrapperError):
            await turns
        if times:
            median = statistics.median(times)
            stage.latencies.append(
                Latency(attack.name, stage.column.label, stage.before, median, max(times), len(times))
            )
