"""The soak itself: callers, faults, and a look at everything at the end. Thin: what to do is `plan`, what must hold is
`outcomes`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from claude_wrapper.testing.soak import outcomes, plan
from claude_wrapper.testing.soak.outcomes import Invariant, Outcome, UpstreamRequest
from claude_wrapper.testing.soak.plan import ConversationPlan, FaultPlan, TurnPlan
from claude_wrapper.testing.soak.served import ADMIN_KEY, Served, alive, descendants, descriptors, resident_bytes
from claude_wrapper.testing.upstream import ScriptedUpstream
from claude_wrapper.wire.sse import SSEDecoder

_ANSWER_SECONDS: Final = 90.0
_TURN_SECONDS: Final = "45"
_MODEL: Final = "claude-sonnet-5-5"
_TOOL: Final = {"name": "look", "description": "Looks.", "input_schema": {"type": "object"}}


@dataclass(frozen=True, slots=True)
class SoakSettings:
    """How long, how hard, and what must hold."""

    seconds: float = 600.0
    seed: int = 1
    callers: int = 10
    max_processes: int = 16
    process_fault_every: float = 3.0
    server_fault_every: float = 120.0
    calm_p99_seconds: float = 20.0
    most_resident_bytes: float = 700 * 2**20
    most_descriptors: float = 500.0
    server_settings: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Record:
    """Everything that was seen. Times are seconds since the start."""

    began: float
    outcomes: list[Outcome] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    """Monotonic moments at which the server was killed or told to end."""
    conversations: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The result."""

    settings: SoakSettings
    record: Record
    invariants: tuple[Invariant, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(one.holds for one in self.invariants)


async def soak(settings: SoakSettings, directory: Path) -> Finished:
    """Run it. `directory` must be passable for processes with their own uid."""
    async with ScriptedUpstream(keep=500_000) as upstream:
        server = Served(directory / "data", upstream.url, _server_settings(settings))
        run = _Run(settings, server, upstream)
        try:
            await run.load()
            invariants = await run.look()
        finally:
            await server.close()
        return Finished(settings, run.record, invariants, time.monotonic() - run.record.began)


def _server_settings(settings: SoakSettings) -> dict[str, str]:
    return {
        "log_level": "warning",
        "max_processes": str(settings.max_processes),
        "max_processes_per_org": str(settings.max_processes),
        "max_processes_per_principal": str(settings.max_processes),
        "spares": "2",
        "agent_spares": "0",
        "idle_seconds": "20",
        "sweep_seconds": "5",
        "session_seconds": "60",
        "queue_seconds": "60",
        "drain_seconds": "5",
        "breaker_failures": "50",  # the faults are spread over all callers of one credential
        "breaker_seconds": "2",
        "upstream_attempts": "2",
        **settings.server_settings,
    }


class _Run:
    def __init__(self, settings: SoakSettings, server: Served, upstream: ScriptedUpstream) -> None:
        self.settings = settings
        self.server = server
        self.upstream = upstream
        self.record = Record(time.monotonic())
        self._plans: Iterator[ConversationPlan] = plan.conversations(settings.seed)
        self._up = asyncio.Event()
        self._seen_children: set[int] = set()

    async def load(self) -> None:
        """Callers and faults, side by side, until the time is over."""
        await self.server.start()
        self.server.settings = {**self.server.settings, "port": self.server.url.rsplit(":", 1)[1]}
        self._up.set()
        self.record.began = time.monotonic()
        planned = plan.faults(
            self.settings.seed,
            self.settings.seconds,
            process_every=self.settings.process_fault_every,
            server_every=self.settings.server_fault_every,
        )
        sampling = asyncio.ensure_future(self._sample())
        async with asyncio.TaskGroup() as group:
            group.create_task(self._break(planned))
            for _ in range(self.settings.callers):
                group.create_task(self._call())
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)

    @property
    def _now(self) -> float:
        return time.monotonic() - self.record.began

    # Callers -------------------------------------------------------------------------------------------------------------

    async def _call(self) -> None:
        async with aiohttp.ClientSession(headers={"x-api-key": ADMIN_KEY, "cw-turn-seconds": _TURN_SECONDS}) as http:
            while self._now < self.settings.seconds:
                self.record.conversations += 1
                await self._converse(http, next(self._plans))

    async def _converse(self, http: aiohttp.ClientSession, conversation: ConversationPlan) -> None:
        history: list[dict[str, Any]] = []
        for turn in conversation.turns:
            if self._now >= self.settings.seconds:
                return
            await self._up.wait()
            message: dict[str, Any] = {"role": "user", "content": turn.prompt}
            body = self._body(conversation, turn, [*history, message])
            outcome, content = await self._ask(http, body, conversation, turn)
            if turn.kind == "tools" and content and content[-1].get("type") == "tool_use":
                self.record.outcomes.append(outcome)
                answered = {"role": "assistant", "content": content}
                result = {"type": "tool_result", "tool_use_id": content[-1]["id"], "content": turn.nonce}
                history = [*history, message, answered]
                message = {"role": "user", "content": [result]}
                body = self._body(conversation, turn, [*history, message])
                outcome, content = await self._ask(http, body, conversation, turn)
                if outcome.how != "answered":
                    self.record.outcomes.append(outcome)
                    return  # a history that ends with a call cannot be continued with a question
            self.record.outcomes.append(outcome)
            if outcome.how == "answered":
                history = [*history, message, {"role": "assistant", "content": content}]
            await asyncio.sleep(turn.pause)

    @staticmethod
    def _body(conversation: ConversationPlan, turn: TurnPlan, messages: list[dict[str, Any]]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": _MODEL, "max_tokens": 1024, "stream": turn.streamed}
        if turn.kind == "tools":
            body["tools"] = [_TOOL]
        if conversation.name is not None:
            return body | {"session_id": conversation.name, "messages": messages[-1:]}
        return body | {"messages": messages}

    async def _ask(
        self, http: aiohttp.ClientSession, body: dict[str, Any], conversation: ConversationPlan, turn: TurnPlan
    ) -> tuple[Outcome, list[dict[str, Any]]]:
        began = time.monotonic()
        how, status, text, detail, process = "unclear", 0, "", "", ""
        content: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                async with http.post(f"{self.server.url}/v1/messages", json=body) as response:
                    status, process = response.status, response.headers.get("cw-process", "")
                    if status == 200 and body["stream"]:
                        how, text, detail = await _read_stream(response, hang_up=turn.kind == "hang up")
                        content = [{"type": "text", "text": text}]
                    else:
                        answer = await response.json()
                        how, text, detail, content = _read(status, answer)
        except TimeoutError:
            detail = f"no answer within {_ANSWER_SECONDS:g} s"
        except (aiohttp.ClientError, ConnectionError) as error:
            how, detail = "lost", type(error).__name__
        except (ValueError, KeyError, TypeError) as error:
            detail = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - began
        outcome = Outcome(
            conversation.number,
            turn.kind,
            conversation.calm,
            turn.nonce,
            began,
            seconds,
            how,
            status,
            text,
            detail,
            process,
        )
        return outcome, content

    # Faults --------------------------------------------------------------------------------------------------------------

    async def _break(self, planned: list[FaultPlan]) -> None:
        for fault in planned:
            await asyncio.sleep(max(0.0, fault.at - self._now))
            self.record.faults.append((self._now, fault.kind))
            if fault.kind in plan.SERVER_FAULTS:
                await self._restart(fault.kind)
            else:
                self._strike(fault)

    def _strike(self, fault: FaultPlan) -> None:
        victims = sorted(pid for pid in descendants(self.server.pid) if _command(pid) == "claude")
        if victims:
            victim = victims[int(fault.choice * len(victims))]
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL if fault.kind == "kill process" else signal.SIGSTOP)

    async def _restart(self, kind: str) -> None:
        children = descendants(self.server.pid)
        self._seen_children |= children
        self._up.clear()
        self.record.kills.append(time.monotonic())
        self.server.signal(signal.SIGKILL if kind == "kill server" else signal.SIGTERM)
        await self.server.ended(40)
        self.record.kills.append(time.monotonic())
        await self.server.close()
        await self.server.start()
        self._up.set()

    async def _sample(self) -> None:
        while True:
            pid = self.server.pid
            sample = {"at": self._now, "resident_bytes": resident_bytes(pid), "descriptors": descriptors(pid)}
            children = descendants(pid)
            self._seen_children |= children
            self.record.samples.append({**sample, "processes": float(len(children))})
            await asyncio.sleep(1.0)

    # The end -------------------------------------------------------------------------------------------------------------

    async def look(self) -> tuple[Invariant, ...]:
        """End the server and see what is left, in its books and on the machine."""
        self._seen_children |= descendants(self.server.pid)
        self.server.signal(signal.SIGTERM)
        code = await self.server.ended(60)
        left = await asyncio.to_thread(self._left)
        ledger, sequences = await asyncio.to_thread(_books, self.server.data_dir / "claude-wrapper.db")
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
            outcomes.answered_once(record.outcomes, record.kills),
            outcomes.not_crossed(record.outcomes),
            outcomes.ledger_is_upstreams(seen, ledger, record.kills),
            outcomes.gapless(sequences),
            outcomes.calm_latency(record.outcomes, settings.calm_p99_seconds),
            outcomes.bounded(
                record.samples, bytes_most=settings.most_resident_bytes, descriptors_most=settings.most_descriptors
            ),
            outcomes.nothing_left(left),
        )

    def _left(self) -> dict[str, list[Any]]:
        deadline = time.monotonic() + 10
        while (living := [pid for pid in self._seen_children if alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        data = self.server.data_dir
        return {
            "processes": living,
            "slots": [path.name for path in (data / "slots").iterdir()],
            "spilled rows": [path.name for path in (data / "ledger-spill").glob("*") if path.stat().st_size],
        }


def _read(status: int, answer: dict[str, Any]) -> tuple[str, str, str, list[dict[str, Any]]]:
    if status == 200:
        content: list[dict[str, Any]] = answer["content"]
        complete = bool(answer["stop_reason"])
        return ("answered" if complete else "unclear"), msgspec.json.encode(content).decode(), "", content
    error = answer["error"]
    clear = status in outcomes.CLEAR and error["type"] and error["message"] and answer["request_id"]
    return ("refused" if clear else "unclear"), "", str(error.get("code")), []


async def _read_stream(response: aiohttp.ClientResponse, *, hang_up: bool) -> tuple[str, str, str]:
    decoder, parts, how, detail = SSEDecoder(), list[str](), "lost", ""
    async for chunk in response.content.iter_any():
        for event in decoder.feed(chunk):
            if event.event == "content_block_delta":
                parts.append(msgspec.json.decode(event.data)["delta"].get("text", ""))
            elif event.event == "message_stop":
                how = "answered"
            elif event.event == "error":
                how, detail = "broken", str(msgspec.json.decode(event.data)["error"].get("code"))
        if hang_up and len(parts) > 10:
            response.close()
            return "hung up", "".join(parts), ""
    return how, "".join(parts), detail


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _books(path: Path) -> tuple[list[dict[str, Any]], list[tuple[str, int, int, int]]]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        ledger = [dict(row) for row in database.execute("SELECT * FROM usage_calls")]
        query = "SELECT session_id, count(*), min(seq), max(seq) FROM session_events GROUP BY session_id"
        return ledger, [tuple(row) for row in database.execute(query)]
