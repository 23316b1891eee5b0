"""Carries out the faults: on processes of the tenant that is not to be spared, on stores, on the server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from claude_wrapper.testing.soak import plan
from claude_wrapper.testing.soak.asking import Asker
from claude_wrapper.testing.soak.fleet import Fleet, start_all
from claude_wrapper.testing.soak.outcomes import Down
from claude_wrapper.testing.soak.plan import FaultPlan
from claude_wrapper.testing.soak.record import Record
from claude_wrapper.testing.soak.served import Served, descendants
from claude_wrapper.testing.soak.surroundings import Surroundings

_OUTAGE_SECONDS: Final = (0.5, 4.0)
_PAUSE_SECONDS: Final = 2.0
_HALF_SECONDS: Final = 2.0
_SETTLED: Final = 0.8
"""No fault begins after this share of the run, so that everything can settle."""
_HURRY: Final = 0.3
"""Pauses between faults shrink to this share while there are fewer faults than there should be."""
_FLOODS: Final = (
    b"\x00" * 65_536,
    b'{"type":"assistant"',
    b"not a frame\n" * 4_096,
    b'{"type":"stream_event"}\n' * 2_048,
)
"""Written to a process's own standard output: noise, a line without an end, garbage lines, empty frames."""
_END_SECONDS: Final = 60.0


@dataclass(eq=False)
class Harm:
    """Everything that is broken on purpose."""

    fleet: Fleet
    around: Surroundings
    record: Record
    operator: Asker
    victim: str
    """The key whose processes are struck: those of others are untouched."""
    seconds: float
    expected: Callable[[], int]
    """How many faults there should have been by now."""
    seen_children: set[int]
    lease_seconds: float

    @property
    def available(self) -> tuple[str, ...]:
        """The faults of stores that can be had here."""
        return tuple(kind for kind in plan.STORE_FAULTS if kind not in self.around.without)

    async def processes(self, faults: Iterator[FaultPlan]) -> None:
        """One after the other until the run nears its end."""
        async with asyncio.TaskGroup() as waking:
            for fault in faults:
                if not await self._wait(fault):
                    return
                await self.operator.up.wait()
                await self._half_request()
                if (pid := await self._victim(fault.choice)) is not None:
                    self._strike(fault, pid, waking)

    async def large(self, faults: Iterator[FaultPlan]) -> None:
        """Stores and server: never two at once, so that what is missing afterwards has one cause."""
        for fault in faults:
            if not await self._wait(fault, hurry=False):
                return
            self.record.fault(fault.kind)
            since = self.record.now
            least, most = _OUTAGE_SECONDS
            length = least + (most - least) * fault.choice
            match fault.kind:
                case "restart database":
                    await self.around.restart_database(length)
                case "restart redis":
                    await self.around.restart_redis(length)
                case "blob store away":
                    await self.around.take_blobs_away(length)
                case "disk full":
                    await self.around.fill_disk(self._one(fault.choice).number, length)
                case "pause server":
                    await self._pause(self._one(fault.choice), length)
                case "kill all servers":
                    await self._restart(self.fleet.replicas, fault.kind, 0.0)
                case _:
                    await self._restart([self._one(fault.choice)], fault.kind, length)
            self.record.outages.append((since, self.record.now, fault.kind))

    async def _wait(self, fault: FaultPlan, *, hurry: bool = True) -> bool:
        behind = hurry and self.record.fault_count < self.expected()
        await asyncio.sleep(fault.after * (_HURRY if behind else 1.0))
        return self.record.now < self.seconds * _SETTLED

    async def _half_request(self) -> None:
        """A client that hangs up in the middle of its own question. It costs nearly nothing, on slow machines too."""
        where = urlsplit(self.fleet.choose().url)
        head = f"POST /v1/messages HTTP/1.1\r\nhost: soak\r\nx-api-key: {self.operator.key}\r\ncontent-length: 9999\r\n\r\n"
        try:
            async with asyncio.timeout(_HALF_SECONDS):
                _, writer = await asyncio.open_connection(where.hostname, where.port)
                writer.write(head.encode() + b'{"model": "claude')
                await writer.drain()
                writer.transport.abort()
        except (OSError, TimeoutError):
            return  # the server is being restarted: nothing was broken
        self.record.fault(plan.HALF_REQUEST)

    # Processes ----------------------------------------------------------------------------------------------------------

    async def _victim(self, choice: float) -> int | None:
        """The Claude process of one of the victim's slots; those that work are struck first."""
        reply = await self.operator.ask("GET", "/v1/pool/stats", at=self.fleet.choose())
        if not reply.ok:
            return None
        users = [user for user in reply.body["active_users"] if user["user_id"] == self.victim and user["pid"]]
        working = [user for user in users if user["idle_time"] == 0]
        pids = sorted(int(user["pid"]) for user in working or users)
        if not pids:
            return None
        leader = pids[int(choice * len(pids))]
        return next((pid for pid in sorted({leader, *descendants(leader)}) if _command(pid) == "claude"), None)

    def _strike(self, fault: FaultPlan, pid: int, waking: asyncio.TaskGroup) -> None:
        with contextlib.suppress(ProcessLookupError):
            match fault.kind:
                case "kill process":
                    os.kill(pid, signal.SIGKILL)
                case "stop process":
                    os.kill(pid, signal.SIGSTOP)
                case "pause process":
                    os.kill(pid, signal.SIGSTOP)
                    waking.create_task(_wake(pid))
                case _:
                    flood = _FLOODS[int(fault.choice * 1_000) % len(_FLOODS)]
                    if not _write_to(pid, flood):
                        return
            self.record.fault(fault.kind)

    # The server ---------------------------------------------------------------------------------------------------------

    def _one(self, choice: float) -> Served:
        return self.fleet.replicas[int(choice * 1_000) % len(self.fleet.replicas)]

    async def _restart(self, replicas: Sequence[Served], kind: str, away: float) -> None:
        """Kill or end them; those that are not the only ones stay away a while, so that others take their sessions."""
        since = time.monotonic()
        for one in replicas:
            self.seen_children |= descendants(one.pid)
            if kind != "end server":
                self.record.kills.append(since)
            one.signal(signal.SIGTERM if kind == "end server" else signal.SIGKILL)
        for one in replicas:
            await one.ended(_END_SECONDS)
            await one.close()
        if len(replicas) < len(self.fleet.replicas):
            await asyncio.sleep(away * self.lease_seconds / 2)
        await start_all(replicas)
        self.record.downs += [Down(one.number, since, time.monotonic(), kind) for one in replicas]

    async def _pause(self, replica: Served, more: float) -> None:
        """Stop it for longer than its lease: others take its sessions, and what it writes afterwards comes too late."""
        since = time.monotonic()
        replica.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(self.lease_seconds + more)
        finally:
            replica.signal(signal.SIGCONT)
            self.record.pauses.append(Down(replica.number, since, time.monotonic(), "pause server"))


async def _wake(pid: int) -> None:
    await asyncio.sleep(_PAUSE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def _write_to(pid: int, flood: bytes) -> bool:
    """Fill the process's standard output from outside, as far as its pipe takes it; whether it could be opened."""
    try:
        pipe = os.open(f"/proc/{pid}/fd/1", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        for _ in range(16):
            os.write(pipe, flood)
    except BlockingIOError:
        pass  # full: that is what was wanted
    except OSError:
        return False
    finally:
        os.close(pipe)
    return True


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
