"""What became of each request, and what must hold when all is over. Pure.

Each invariant says in its detail what it looked at, and where it does not hold what was found, so that a reader of the
report can begin to search.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from claude_wrapper.sessions.takeover import UNSURE

NONCE: Final = re.compile(r"n\d{5}x\d{2}x[0-9a-f]{6}")
AROUND_A_KILL: Final = 3.0
"""Seconds before a kill in which a call may have been answered and not yet been written down."""
SHOWN: Final = 12
"""Findings that one invariant names."""
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
    request: str = ""
    """The request's id, or the session's: what the server's log calls it."""


@dataclass(frozen=True, slots=True)
class Followed:
    """What one client got of a session's event stream, over all its connections."""

    session: str
    seen: tuple[tuple[int, str], ...]
    """(number, id) in the order of arrival."""
    connections: int
    to_the_end: bool
    """Whether it waited for the newest event, at the end of its conversation."""
    caught_up: bool = True


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


def answered_once(outcomes: Sequence[Outcome], downs: Sequence[tuple[float, float]]) -> Invariant:
    """Every request was answered, or failed clearly; connections were lost only while the server was killed or ended.

    `downs`: from when to when there was no server.
    """
    bad = [one for one in outcomes if one.how == "unclear" or (one.how == "lost" and not _while_down(one, downs))]
    counts = Counter(one.how for one in outcomes)
    shown = "; ".join(
        f"{one.kind} {one.nonce} {one.request}: {one.how} {one.status} {one.detail}"[:300] for one in bad[:SHOWN]
    )
    return Invariant("every request was answered once or failed clearly", not bad, f"{dict(counts)} {shown}".strip())


def no_bugs(outcomes: Iterable[Outcome]) -> Invariant:
    """No request failed for a reason that the server itself does not know."""
    bad = [one for one in outcomes if one.how in {"refused", "broken"} and one.detail == "internal_error"]
    shown = "; ".join(f"{one.kind} {one.nonce} {one.request}" for one in bad[:SHOWN])
    return Invariant("no request met an error that the server cannot explain", not bad, shown or "0 internal errors")


def no_surprises(unexpected: Sequence[str], unreadable: Sequence[str]) -> Invariant:
    """The server's log has no error that no fault explains, and nothing wrote past it."""
    found = [*unexpected, *unreadable]
    return Invariant("the log has no error that no fault explains", not found, "; ".join(found[:SHOWN]) or "none")


def not_crossed(outcomes: Iterable[Outcome]) -> Invariant:
    """An answer holds the nonces of its own conversation alone."""
    crossed = []
    for one in outcomes:
        foreign = {nonce for nonce in NONCE.findall(one.text) if int(nonce[1:6]) != one.conversation}
        if foreign:
            crossed.append(f"{one.nonce}: {one.text[:100]}")
    detail = "; ".join(crossed[:SHOWN]) or "0 crossed"
    return Invariant("no answer crossed into another conversation", not crossed, detail)


def answered_whole(outcomes: Iterable[Outcome]) -> Invariant:
    """A whole answer holds its own nonce. One excuse: its server was killed while a tool ran, and the answer says so."""
    answered = [one for one in outcomes if one.how == "answered"]
    unsure = [one for one in answered if one.nonce not in one.text and UNSURE[:60] in one.text]
    bad = [one for one in answered if one.nonce not in one.text and one not in unsure]
    shown = "; ".join(f"{one.kind} {one.nonce} {one.request}: {one.text[:100]!r} {one.detail}" for one in bad[:SHOWN])
    said = f"{len(answered)} answers, {len(unsure)} of them say that a tool may have run when the server was killed"
    return Invariant("every answer holds what was asked for", not bad, shown or said)


def ledger_is_upstreams(
    upstream: Sequence[UpstreamRequest], ledger: Sequence[Mapping[str, Any]], kills: Sequence[float]
) -> Invariant:
    """One row with the same tokens for each answer that was sent whole; none for what upstream never saw.

    `kills`: moments of SIGKILL. A call that ended within `AROUND_A_KILL` seconds of one may have no row: the server
    died between the answer and the commit. Nothing else excuses a row, neither an outage of the database nor a full disk.
    """
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
    detail = f"{whole} whole answers, {len(ledger)} rows, {forgiven} lost at a kill; {'; '.join(wrong[:SHOWN])}"
    return Invariant("the ledger is the upstream's own count", not wrong, detail)


def gapless(sequences: Iterable[tuple[str, int, int, int]]) -> Invariant:
    """Event logs have no gaps: (session, rows, least, largest)."""
    sequences = list(sequences)
    broken = [session for session, rows, least, largest in sequences if largest - least + 1 != rows or least > 1]
    return Invariant("event logs have no gaps", not broken, f"{len(sequences)} logs, {len(broken)} with gaps")


def streams_complete(followed: Sequence[Followed], logs: Mapping[str, Sequence[tuple[int, str]]]) -> Invariant:
    """Each client got every event of its session's own stream once and in order, however often it was cut off.

    `logs`: (number, id) of the events of each session's stream, as stored. A client that was still connected at the end
    of the run may lack the newest ones.
    """
    wrong = []
    for one in followed:
        stored = list(logs.get(one.session, ()))
        if not one.caught_up:
            wrong.append(f"{one.session}: never got its newest event ({len(one.seen)} of {len(stored)})")
            continue
        expected = stored if one.to_the_end else stored[: len(one.seen)]
        if list(one.seen) != expected[: len(one.seen)] or (one.to_the_end and len(one.seen) < len(expected)):
            at = next((i for i, (a, b) in enumerate(zip(one.seen, expected, strict=False)) if a != b), len(one.seen))
            wrong.append(f"{one.session}: differs at event {at} of {len(expected)}")
    back = sum(one.connections - 1 for one in followed)
    events = sum(len(one.seen) for one in followed)
    detail = f"{len(followed)} streams, {back} times connected again, {events} events; {'; '.join(wrong[:SHOWN])}"
    return Invariant("streams are complete after they were cut", not wrong, detail)


def files_kept(lost: Sequence[str], count: int) -> Invariant:
    """A file whose upload was answered is read back, byte for byte."""
    detail = f"{count} files; {'; '.join(lost[:SHOWN])}"
    return Invariant("uploaded files are what they were", not lost, detail)


def calm_latency(outcomes: Iterable[Outcome], bound: float) -> Invariant:
    """The 99th percentile of what the tenant without faults of its own waited."""
    waits = sorted(one.seconds for one in outcomes if one.calm and one.how == "answered")
    p99 = waits[min(len(waits) - 1, int(len(waits) * 0.99))] if waits else 0.0
    detail = f"p99 {p99:.2f} s of {len(waits)} answers (bound: {bound:.0f} s)"
    return Invariant("others' faults reach an untouched tenant within a bound", bool(waits) and p99 <= bound, detail)


def bounded(samples: Sequence[Mapping[str, float]], *, bytes_most: float, descriptors_most: float) -> Invariant:
    """The server's memory and descriptors stay under their bounds, whenever looked at."""
    memory = max((one["resident_bytes"] for one in samples), default=0.0)
    descriptors = max((one["descriptors"] for one in samples), default=0.0)
    return Invariant(
        "memory and descriptors are bounded",
        memory <= bytes_most and descriptors <= descriptors_most,
        f"at most {memory / 2**20:.0f} MB of {bytes_most / 2**20:.0f}, {descriptors:.0f} descriptors of {descriptors_most:.0f}",
    )


def no_creep(samples: Sequence[Mapping[str, float]], *, growth_most: float, seconds_least: float = 90.0) -> Invariant:
    """A server that lives for some time does not keep growing: its least memory in the last quarter of its life is
    little more than that in the second one. `life` in a sample numbers the server's starts.
    """
    worst, judged = 0.0, 0
    for life in sorted({one["life"] for one in samples}):
        mine = [one for one in samples if one["life"] == life]
        if mine[-1]["at"] - mine[0]["at"] < seconds_least:
            continue
        judged += 1
        quarter = max(1, len(mine) // 4)
        early, late = mine[quarter : 2 * quarter], mine[-quarter:]
        grown = min(one["resident_bytes"] for one in late) - min(one["resident_bytes"] for one in early)
        worst = max(worst, grown)
    detail = f"{worst / 2**20:.0f} MB of {growth_most / 2**20:.0f} in {judged} lives of at least {seconds_least:g} s"
    return Invariant("memory does not creep", worst <= growth_most, detail)


def at_rest(gauges: Mapping[str, float], failing: Sequence[str]) -> Invariant:
    """When nobody asks any more, nothing is in flight, nothing waits to be written, and all checks are well again."""
    busy = {name: value for name, value in gauges.items() if value}
    detail = f"{len(gauges)} gauges at 0, every health check passes"
    if busy or failing:
        detail = f"still {busy}, checks that fail: {list(failing)}"
    return Invariant("the server comes to rest and recovers", bool(gauges) and not busy and not failing, detail)


def nothing_left(left: Mapping[str, Sequence[Any]]) -> Invariant:
    """No process, slot, lease or file is left."""
    found = {name: list(things)[:SHOWN] for name, things in left.items() if things}
    return Invariant("nothing is left over", not found, str(found or f"none of: {', '.join(left)}"))


def enough(faults: int, least: int) -> Invariant:
    """The run was as hard as it was to be."""
    return Invariant("there were enough faults", faults >= least, f"{faults} faults, at least {least} wanted")


def _while_down(one: Outcome, downs: Sequence[tuple[float, float]]) -> bool:
    ended = one.began + one.seconds
    return any(one.began - AROUND_A_KILL <= until and since <= ended + AROUND_A_KILL for since, until in downs)
