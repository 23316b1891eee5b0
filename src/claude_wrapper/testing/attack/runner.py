"""Runs every attack in every level that this host offers, and judges the outcome from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from claude_wrapper.errors import WrapperError
from claude_wrapper.sandbox import HostReport, Level, Sandbox, SlotDirs, choose, files, processes
from claude_wrapper.testing.attack.catalogue import ATTACKS, PRELUDE, Attack
from claude_wrapper.testing.attack.scenery import Scenery, scenery, start

VICTIM = 300_100  # outside of the default range, so that a server beside this run is not disturbed
ATTACKERS = VICTIM + 1
"""The first of one uid per attack: processes of an attack count against its uid until init has reaped them."""
QUOTA = "quota"
"""The fact of a disk of its own for each slot."""
_SECONDS = 60.0
_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")


@dataclass(frozen=True, slots=True)
class Column:
    """One way to contain a process on this host."""

    label: str
    sandbox: Sandbox
    own_uid: bool
    facts: frozenset[str]

    @property
    def disks(self) -> bool:
        """Slots have a disk of their own."""
        return QUOTA in self.facts

    def meets(self, attack: Attack) -> bool:
        """Whether the attack says something here that it does not say in the column without disks."""
        return not self.disks or any(QUOTA in condition for condition in attack.holds)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one attack in one column."""

    attack: str
    column: str
    held: bool
    promised: bool
    detail: str
    """The first breach, or what went wrong with the attack itself."""
    failed: bool = False
    """The attack could not be carried out: neither held nor breached."""


def promised(attack: Attack, facts: frozenset[str]) -> bool:
    """Whether a level with these facts promises that the attack fails."""
    return any(set(condition.split("+")) <= facts for condition in attack.holds)


def columns(report: HostReport) -> Iterator[Column]:
    """Every level that the host offers, with own uids and without, strongest first; the strongest also with disks."""
    present = frozenset(found.name for found in report.findings if found.present and found.name.startswith("cgroup"))
    for level in (Level.BWRAP, Level.RESTRICTED, Level.NONE):
        if level in report.unavailable:
            continue
        if level is not Level.NONE and report.uids:
            facts = present | {level.value, "uid"}
            yield Column(level, choose(level, None, report), own_uid=True, facts=facts)
            if level is Level.BWRAP and report.finding("loop_disk").present:
                label = f"{level}, own disk"
                yield Column(label, choose(level, None, report), own_uid=True, facts=facts | {QUOTA})
        label = "none" if level is Level.NONE else f"{level}, server's uid"
        if level is Level.RESTRICTED and not report.landlock_abi:
            continue
        sandbox = choose(level, None, report, use_uids=False, unix_socket=True)
        facts = frozenset({"none"}) if level is Level.NONE else present | {level.value}
        yield Column(label, sandbox, own_uid=False, facts=facts)


def python_inside() -> str:
    """The interpreter that attacks run with. Raises FileNotFoundError where there is none below /usr."""
    for path in _PYTHONS:
        if Path(path).exists():
            return path
    raise FileNotFoundError("the attacks need /usr/bin/python3 or /usr/local/bin/python3: apt-get install python3")


async def run_column(column: Column, attacks: tuple[Attack, ...] = ATTACKS) -> list[Outcome]:
    """Every attack in one column, one after the other, each in a fresh slot."""
    base = Path(tempfile.mkdtemp(prefix="claude-wrapper-attack-"))
    try:
        async with scenery(base, column.sandbox, VICTIM if column.own_uid else None) as made:
            uids = [ATTACKERS + number if column.own_uid else None for number in range(len(attacks))]
            return [await _one(column, made, attack, uid) for attack, uid in zip(attacks, uids, strict=True)]
    finally:
        await asyncio.to_thread(files.remove_tree, base)
        column.sandbox.close()


async def _one(column: Column, made: Scenery, attack: Attack, uid: int | None) -> Outcome:
    def outcome(held: bool, detail: str, failed: bool = False) -> Outcome:
        return Outcome(attack.name, column.label, held, promised(attack, column.facts), detail, failed)

    async with _slot(column.sandbox, made.slots / "attacker", uid) as dirs:
        files.write_beneath(dirs.work, "attack.py", (PRELUDE + attack.program + "\nprint('END')\n").encode())
        files.write_beneath(dirs.work, "attack.json", json.dumps(made.targets).encode())
        process = await start(
            column.sandbox, dirs, f"(exec {python_inside()} attack.py > report 2>&1); exit 0", {}, uid
        )
        try:
            async with asyncio.timeout(_SECONDS):
                printed, _ = await process.communicate()
        except TimeoutError:
            return outcome(held=False, detail=f"did not end within {_SECONDS:g} s", failed=True)
        finally:
            await column.sandbox.kill(process.pid, dirs)
            if process.returncode is None:
                await process.wait()
        try:
            said = files.read_beneath(dirs.work, "report", 1 << 20).decode(errors="replace").splitlines()
        except WrapperError as error:
            return outcome(held=False, detail=f"{error}: {printed[-200:]!r}", failed=True)
        breaches = [line.removeprefix("BREACH ") for line in said if line.startswith("BREACH")]
        breaches += [found async for found in from_outside(made, dirs, printed)]
    if not breaches and "END" not in said and "memory" not in attack.name:
        return outcome(held=False, detail=(said or ["no output"])[-1], failed=True)
    return outcome(held=not breaches, detail=breaches[0] if breaches else "")


@contextlib.asynccontextmanager
async def _slot(sandbox: Sandbox, root: Path, uid: int | None) -> AsyncIterator[SlotDirs]:
    dirs = sandbox.create_dirs(root, uid)
    try:
        yield dirs
    finally:
        await asyncio.to_thread(sandbox.remove_dirs, dirs)


async def from_outside(made: Scenery, dirs: SlotDirs, printed: bytes) -> AsyncIterator[str]:
    """What only the host can see."""
    targets = made.targets
    if targets["forged"].encode() in printed:
        yield "a forged line reached the server"
    for left in _left_behind(targets["marker"]):
        yield f"left {left}"
    with contextlib.suppress(BlockingIOError):
        while made.udp.recv(1):
            yield "a datagram arrived at a service of the host"
    for survivor in [p for p in processes.all_processes() if p.alive and _has(p.pid, targets["survivor"])]:
        os.kill(survivor.pid, 9)
        yield f"{survivor.pid} survived"
    if made.other_process.returncode is not None or made.server_process.returncode is not None:
        yield "ended another's process"
    for name in ("file", "dir/etc/passwd", "proc", "loop", "fifo"):
        with contextlib.suppress(WrapperError):
            files.read_beneath(dirs.work, f"trap/{name}", 1 << 20)
            yield f"the server followed trap/{name}"
    if (dirs.work / "trap/dir").is_symlink():
        with contextlib.suppress(WrapperError):
            files.write_beneath(dirs.work, f"trap/dir{made.base}/written", b"x")
            yield "the server wrote through trap/dir"
        if any(entry.path.startswith("trap/dir/") for entry in files.walk_beneath(dirs.work, max_entries=100_000)):
            yield "the server walked into trap/dir"


def _left_behind(marker: str) -> list[str]:
    found: list[str] = []
    for directory in ("/tmp", "/var/tmp", "/dev/shm", "/run"):  # noqa: S108 - looking for what was left there
        for left in Path(directory).glob(marker + "*"):
            left.unlink()
            found.append(str(left))
    return found


def _has(pid: int, word: str) -> bool:
    try:
        return word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def table(outcomes: list[Outcome], attacks: tuple[Attack, ...] = ATTACKS) -> str:
    """Attacks × levels as Markdown: H held, B breached, B! breached against a promise, ? not carried out."""
    labels = list(dict.fromkeys(outcome.column for outcome in outcomes))
    found = {(outcome.attack, outcome.column): outcome for outcome in outcomes}
    lines = ["| attack | " + " | ".join(labels) + " |", "|---|" + "---|" * len(labels)]
    for attack in attacks:
        marks = [_mark(found[attack.name, label]) if (attack.name, label) in found else "" for label in labels]
        lines.append(f"| {attack.name} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def _mark(outcome: Outcome) -> str:
    if outcome.failed:
        return "?"
    if outcome.held:
        return "H"
    return "**B!**" if outcome.promised else "B"


def broken(outcomes: list[Outcome]) -> list[Outcome]:
    """Outcomes that break a promise, and attacks that could not be carried out."""
    return [outcome for outcome in outcomes if outcome.failed or (outcome.promised and not outcome.held)]
