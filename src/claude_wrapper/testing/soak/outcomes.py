"""What became of each request, and what must hold when all is over. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

NONCE: Final = re.compile(r"n\d{5}x\d{2}x[0-9a-f]{6}")
AROUND_A_KILL: Final = 3.0
"""Seconds before a kill in which a call may have been answered and not yet been written down."""
CLEAR: Final = frozenset({400, 402, 404, 408, 409, 429, 500, 502, 503, 504, 529})


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as its caller saw it. Times are monotonic seconds."""

    conversation: int
    kind: str
    calm: bool
    nonce: str
    began: float
    seconds: float
    how: str
    """answered, refused (a clear error), broken (an error event in the stream), hung up, lost (no connection), unclear."""
    status: int = 0
    text: str = field(default="", repr=False)
    detail: str = ""
    process: str = ""


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """One request as the upstream saw it."""

    id: str
    status: int | None
    whole: bool
    """Whether the answer was sent to its end."""
    finished: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Invariant:
    """Something that must hold."""

    name: str
    holds: bool
    detail: str


def answered_once(outcomes: Sequence[Outcome], kills: Sequence[float]) -> Invariant:
    """Every request was answered, or failed clearly; connections were lost only while the server was killed or ended."""
    bad = [one for one in outcomes if one.how == "unclear" or (one.how == "lost" and not _around(one, kills))]
    counts = Counter(one.how for one in outcomes)
    shown = "; ".join(f"{one.kind} {one.nonce}: {one.how} {one.status} {one.detail}"[:200] for one in bad[:5])
    return Invariant("every request was answered once or failed clearly", not bad, f"{dict(counts)} {shown}".strip())


def not_crossed(outcomes: Iterable[Outcome]) -> Invariant:
    """An answer holds the nonces of its own conversation alone, and a whole one holds its own."""
    crossed = []
    for one in outcomes:
        foreign = {nonce for nonce in NONCE.findall(one.text) if int(nonce[1:6]) != one.conversation}
        if foreign or (one.how == "answered" and one.nonce not in one.text):
            crossed.append(f"{one.nonce}: {one.text[:100]}")
    return Invariant("no answer crossed into another conversation", not crossed, "; ".join(crossed[:5]) or "0 crossed")


def ledger_is_upstreams(
    upstream: Sequence[UpstreamRequest], ledger: Sequence[Mapping[str, Any]], kills: Sequence[float]
) -> Invariant:
    """One row with the same tokens for each answer that was sent whole; none for what upstream never saw."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in ledger:
        if row["upstream_request_id"]:
            rows.setdefault(str(row["upstream_request_id"]), []).append(row)
    known = {one.id for one in upstream}
    wrong, forgiven = [], 0
    for one in upstream:
        found = rows.get(one.id, [])
        if one.status != 200 or not one.whole:
            continue
        if len(found) != 1 and any(kill - AROUND_A_KILL <= one.finished <= kill + AROUND_A_KILL for kill in kills):
            forgiven += 1  # the server was killed before it could write it down
        elif len(found) != 1:
            wrong.append(f"{one.id}: {len(found)} rows")
        elif (found[0]["input_tokens"], found[0]["output_tokens"]) != (one.input_tokens, one.output_tokens):
            wrong.append(f"{one.id}: other tokens")
    wrong += [f"{unknown}: never sent" for unknown in rows.keys() - known]
    whole = sum(one.status == 200 and one.whole for one in upstream)
    detail = f"{whole} whole answers, {len(ledger)} rows, {forgiven} lost at a kill; {'; '.join(wrong[:5])}"
    return Invariant("the ledger is the upstream's own count", not wrong, detail)


def gapless(sequences: Iterable[tuple[str, int, int, int]]) -> Invariant:
    """Event logs have no gaps: (session, rows, least, largest)."""
    sequences = list(sequences)
    broken = [session for session, rows, least, largest in sequences if largest - least + 1 != rows or least > 1]
    return Invariant("event logs have no gaps", not broken, f"{len(sequences)} logs, {len(broken)} with gaps")


def calm_latency(outcomes: Iterable[Outcome], bound: float) -> Invariant:
    """The 99th percentile of what conversations without faults of their own waited."""
    waits = sorted(one.seconds for one in outcomes if one.calm and one.how == "answered")
    p99 = waits[min(len(waits) - 1, int(len(waits) * 0.99))] if waits else 0.0
    detail = f"p99 {p99:.2f} s of {len(waits)} answers (bound: {bound:g} s)"
    return Invariant("others' faults reach untouched callers within a bound", bool(waits) and p99 <= bound, detail)


def bounded(samples: Sequence[Mapping[str, float]], *, bytes_most: float, descriptors_most: float) -> Invariant:
    """The server's memory and descriptors stay under their bounds, whenever looked at."""
    memory = max((one["resident_bytes"] for one in samples), default=0.0)
    descriptors = max((one["descriptors"] for one in samples), default=0.0)
    return Invariant(
        "memory and descriptors are bounded",
        memory <= bytes_most and descriptors <= descriptors_most,
        f"at most {memory / 2**20:.0f} MB of {bytes_most / 2**20:.0f}, {descriptors:.0f} descriptors of {descriptors_most:.0f}",
    )


def nothing_left(left: Mapping[str, Sequence[Any]]) -> Invariant:
    """No process, slot or file is left."""
    found = {name: list(things)[:5] for name, things in left.items() if things}
    return Invariant("nothing is left over", not found, str(found or "no process, no slot, no temporary file"))


def _around(one: Outcome, kills: Sequence[float]) -> bool:
    return any(one.began - AROUND_A_KILL <= kill <= one.began + one.seconds + AROUND_A_KILL for kill in kills) or any(
        0 <= one.began - kill <= 30 for kill in kills
    )
