"""The end of a soak: it comes to rest, the replicas are ended, and everything that is left is looked at."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from claude_wrapper.testing.messages_server import RecordedRequest
from claude_wrapper.testing.soak import outcomes, plan
from claude_wrapper.testing.soak.asking import Asker
from claude_wrapper.testing.soak.books import Books, read_books
from claude_wrapper.testing.soak.canary import Canary
from claude_wrapper.testing.soak.logs import LogSummary, summarize
from claude_wrapper.testing.soak.outcomes import Invariant, UpstreamRequest
from claude_wrapper.testing.soak.reads import Reads, nonce_in
from claude_wrapper.testing.soak.record import Record
from claude_wrapper.testing.soak.served import Served, alive, descendants
from claude_wrapper.testing.soak.settings import SoakSettings
from claude_wrapper.testing.soak.surroundings import Surroundings

_REST_SECONDS: Final = 40.0
_END_SECONDS: Final = 60.0
_RESTING: Final = ("requests_in_flight", "turns_in_flight", "pool_waiting", "ledger_rows_pending")
_JUDGED_SECONDS: Final = 300.0
"""Shorter runs may have too few turns for a judgement of a CLI version."""


@dataclass(eq=False)
class Ending:
    """What is looked at when the load is over."""

    settings: SoakSettings
    replicas: Sequence[Served]
    around: Surroundings
    record: Record
    seen_children: set[int]
    gauges: dict[str, float] = field(default_factory=dict)
    failing: list[str] = field(default_factory=list)

    async def rest(self, operator: Asker) -> None:
        """Wait until nothing is in flight and every check is well, and keep what was found last."""
        deadline = time.monotonic() + _REST_SECONDS
        while True:
            self.gauges, self.failing = dict.fromkeys(_RESTING, 0.0), []
            for one in self.replicas:
                await self._look(operator, one)
            if outcomes.at_rest(self.gauges, self.failing).holds or time.monotonic() > deadline:
                return
            await asyncio.sleep(0.5)

    async def _look(self, operator: Asker, replica: Served) -> None:
        page = await operator.ask("GET", "/metrics", raw=True, at=replica)
        for name, value in _gauges(bytes(page.body or b"").decode() if page.ok else "").items():
            self.gauges[name] += value
        self.gauges["requests_in_flight"] -= 1  # this very one
        health = await operator.ask("GET", "/health", at=replica)
        failing = health.body.get("failing", ["no answer"]) if isinstance(health.body, dict) else ["no answer"]
        self.failing += [f"replica {replica.number}: {one}" for one in failing if one != "upstream"]

    async def look(
        self, sent: Sequence[RecordedRequest], reads: Reads, canary: Canary, *, calm_bound: float
    ) -> tuple[Invariant, ...]:
        """End the replicas and see what is left, in their books and on the machine."""
        for one in self.replicas:
            self.seen_children |= descendants(one.pid)
            one.signal(signal.SIGTERM)
        codes = await asyncio.gather(*(one.ended(_END_SECONDS) for one in self.replicas))
        left = await asyncio.to_thread(self._left)
        first = self.replicas[0]
        url = self.around.settings.get("database_url") or f"sqlite:///{first.data_dir / 'claude-wrapper.db'}"
        books = await read_books(url)
        left["leases"] += books.leases
        ended = Invariant("every replica ended by itself when asked", not any(codes), f"exit codes {codes}")
        return (ended, *self._judged(left, books, sent, calm_bound), *self._judged_beside(books, sent, reads, canary))

    def _judged(
        self, left: dict[str, list[Any]], books: Books, sent: Sequence[RecordedRequest], calm_bound: float
    ) -> tuple[Invariant, ...]:
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
            for one in sent
            if one.path == "/v1/messages"
        ]
        return (
            outcomes.enough(record.fault_count, settings.wanted_faults),
            outcomes.answered_once(record.outcomes, record.downs),
            outcomes.lost_with_the_killed(record.losses, record.downs),
            outcomes.no_bugs(record.outcomes),
            outcomes.not_crossed(record.outcomes),
            outcomes.answered_whole(record.outcomes),
            outcomes.said_once(record.said),
            outcomes.ledger_is_upstreams(seen, books.ledger, record.kills),
            outcomes.gapless(books.sequences),
            outcomes.streams_complete(record.followed, books.streams),
            outcomes.files_kept(record.files_lost, record.files),
            outcomes.calm_latency(record.outcomes, calm_bound, began=record.began),
            outcomes.at_rest(self.gauges, self.failing),
            outcomes.bounded(
                record.samples, bytes_most=settings.most_resident_bytes, descriptors_most=settings.most_descriptors
            ),
            outcomes.no_creep(record.samples, growth_most=settings.most_growth_bytes),
            outcomes.nothing_left(left),
        )

    def _judged_beside(
        self, books: Books, sent: Sequence[RecordedRequest], reads: Reads, canary: Canary
    ) -> tuple[Invariant, ...]:
        record = self.record
        asked: dict[str, list[str]] = defaultdict(list)
        for one in sent:
            if one.path == "/v1/messages/count_tokens":
                asked[nonce_in(one.body)].append(one.request_id)
        mine = [one for one in record.outcomes if one.kind in plan.READS]
        return (
            outcomes.reads_hedged(mine, asked, books.ledger, sum(reads.hedges.values()), record.downs),
            outcomes.canary_taken_back(
                record.canary,
                canary.broken_at,
                replicas=len(self.replicas),
                told="redis_url" in self.around.settings,
                must=self.settings.seconds >= _JUDGED_SECONDS,
            ),
        )

    def _left(self) -> dict[str, list[Any]]:
        deadline = time.monotonic() + 10
        while (living := [pid for pid in self.seen_children if alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        redis, dirs = self.around.redis, self.around.data_dirs
        return {
            "processes": living,
            "slots": [path.name for data in dirs for path in (data / "slots").iterdir()],
            "kept sessions": [path.name for data in dirs for path in (data / "kept").glob("*")],
            "spilled rows": [
                path.name for data in dirs for path in (data / "ledger-spill").glob("*") if path.stat().st_size
            ],
            "temporary files": [path.name for place in self.around.temporaries for path in place.iterdir()],
            "half-written blobs": [path.name for path in self.around.blobs.rglob("*#*")],
            "leases": redis.keys("cw:l:*") if redis is not None else [],
        }


def _gauges(page: str) -> dict[str, float]:
    """The sums of the gauges that must be 0 at rest."""
    found = dict.fromkeys(_RESTING, 0.0)
    for line in page.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in found:
            found[name] += float(line.rsplit(" ", 1)[1])
    return found


def read_logs(paths: Sequence[Path]) -> LogSummary:
    """What all replicas wrote, summed up."""
    lines: list[str] = []
    for path in paths:
        lines += path.read_text(encoding="utf-8", errors="replace").splitlines()
    return summarize(lines)
