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
ANSWER: Final = re.compile(rf"({NONCE.pattern}) is the answer")
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
    replica: int = -1
    """Which one was asked last."""
    attempts: int = 1
    """Replicas that were asked, one after the other."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A connection that broke before its answer was over. Times are monotonic seconds."""

    replica: int
    began: float
    ended: float
    what: str


@dataclass(frozen=True, slots=True)
class Down:
    """From when to when a replica was away. Times are monotonic seconds."""

    replica: int
    since: float
    until: float
    kind: str = "kill server"


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
class CanaryLook:
    """What a replica said of the new version of the CLI. `at`: monotonic seconds."""

    at: float
    replica: int
    state: str
    reason: str
    turns: int
    failures: int
    worse: bool
    """Whether the figures of that moment speak clearly against it."""


@dataclass(frozen=True, slots=True)
class Invariant:
    """Something that must hold."""

    name: str
    holds: bool
    detail: str


def answered_once(outcomes: Sequence[Outcome], downs: Sequence[Down]) -> Invariant:
    """Every request was answered, or failed clearly; it was lost only with the replica that it was last sent to.

    A request that can be repeated is asked again of another replica that is ready, so with one beside the killed one
    only what cannot be repeated is lost: a stream that had begun. `downs`: when which replica was killed or ended.
    """
    bad = [
        one
        for one in outcomes
        if one.how == "unclear"
        or (one.how == "lost" and not _while_down(one.replica, one.began, one.began + one.seconds, downs))
    ]
    counts = Counter(one.how for one in outcomes)
    again = sum(one.attempts > 1 for one in outcomes)
    shown = "; ".join(
        f"{one.kind} {one.nonce} {one.request}: {one.how} {one.status} {one.detail}"[:300] for one in bad[:SHOWN]
    )
    detail = f"{dict(counts)}, {again} asked of a second replica {shown}".strip()
    return Invariant("every request was answered once or failed clearly", not bad, detail)


def lost_with_the_killed(losses: Sequence[Loss], downs: Sequence[Down]) -> Invariant:
    """A connection broke only because the replica at its other end was killed or ended, not with one that went on."""
    bad = [one for one in losses if not _while_down(one.replica, one.began, one.ended, downs)]
    shown = "; ".join(f"to replica {one.replica}: {one.what}" for one in bad[:SHOWN])
    return Invariant("connections broke only to replicas that went away", not bad, shown or f"{len(losses)} broke")


def said_once(said: Mapping[str, int]) -> Invariant:
    """No turn of a session was answered twice, whoever took it over, and whoever woke up after its lease."""
    twice = [f"{nonce}: {count} times" for nonce, count in said.items() if count > 1]
    return Invariant(
        "no turn was answered twice", not twice, "; ".join(twice[:SHOWN]) or f"{len(said)} turns, each once"
    )


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


def reads_hedged(
    reads: Sequence[Outcome],
    sent: Mapping[str, Sequence[str]],
    ledger: Sequence[Mapping[str, Any]],
    counted: float,
    downs: Sequence[Down],
) -> Invariant:
    """A token count is asked of the upstream twice at most, both are counted, and its answer is in the ledger once at most.

    `sent`: the ids of the upstream's requests by the nonce of the read, "" for those of nobody. `counted`: the sum of the
    replicas' counters, as they were seen last; what a replica counted in its last seconds went with it.
    """
    rows = Counter(str(row["upstream_request_id"]) for row in ledger)
    wrong, sure, maybe, gone = [], 0, len(sent.get("", ())), 0
    for one in reads:
        mine = sent.get(one.nonce, ())
        twice = max(0, len(mine) - 1)
        if len(mine) > 2 * one.attempts:
            wrong.append(f"{one.nonce}: {len(mine)} requests")
        if sum(rows[request] for request in mine) > 1:
            wrong.append(f"{one.nonce}: {sum(rows[request] for request in mine)} ledger rows")
        if one.attempts > 1 or one.how != "answered":
            maybe += twice
        elif _while_down(one.replica, one.began, one.began + one.seconds, downs):
            gone += twice
        else:
            sure += twice
    if not sure <= counted <= sure + gone + maybe:
        wrong.append(f"{counted:.0f} were counted")
    detail = f"{len(reads)} token counts, {sure + gone + maybe} asked twice, {counted:.0f} of them counted {'; '.join(wrong[:SHOWN])}"
    return Invariant("slow reads are asked twice, counted, and booked once at most", not wrong, detail)


def canary_taken_back(
    looks: Sequence[CanaryLook], broken_at: float | None, *, replicas: int, told: bool, must: bool
) -> Invariant:
    """A new version of the CLI that breaks is taken back by itself, as soon as it is credibly worse.

    `broken_at`: when it began to break; `told`: replicas tell each other, so that at the end all of them have taken it
    back, also those that were started since. Without that one that sees it taken back is enough. `must`: the run is long
    enough for it to have become credibly worse.
    """
    name = "a CLI version that breaks is taken back by itself"
    before = max((one.turns for one in looks if broken_at is None or one.at < broken_at), default=0)
    since = [one for one in looks if broken_at is not None and one.at >= broken_at]
    # A replica that had taken it back before, and has not heard of the operator's word yet, says nothing of the bad one.
    tried = {one.replica: one.state == "running" for one in looks if broken_at is None or one.at < broken_at}
    back: list[CanaryLook] = []
    for one in since:
        tried[one.replica] = tried.get(one.replica, False) or one.state == "running"
        if tried[one.replica] and one.state == "rolled_back" and one.reason != "by the operator":
            back.append(one)
    if broken_at is None or not back:
        most = max(since, key=lambda one: one.failures, default=None)
        seen = f"{most.failures} of {most.turns} turns failed at most" if most else "it did not begin to break"
        detail = f"not taken back: {seen}, which is too little to tell; before, it had {before} turns at a time"
        return Invariant(name, not must and not any(one.worse for one in since), detail)
    last = {one.replica: one.state for one in looks}
    everywhere = len(last) == replicas and set(last.values()) == {"rolled_back"}
    reasons = [one.reason for one in back if one.reason != "by another replica"]
    detail = f"taken back {back[0].at - broken_at:.1f} s after it began to break ({reasons[0] if reasons else 'no replica says why'}); at the end {last}"
    return Invariant(name, bool(reasons) and (everywhere or not told), detail)


def files_kept(lost: Sequence[str], count: int) -> Invariant:
    """A file whose upload was answered is read back, byte for byte."""
    detail = f"{count} files; {'; '.join(lost[:SHOWN])}"
    return Invariant("uploaded files are what they were", not lost, detail)


def calm_latency(outcomes: Iterable[Outcome], bound: float, *, began: float = 0.0) -> Invariant:
    """The 99th percentile of what the tenant without faults of its own waited. `began`: when the run did."""
    calm = sorted((one for one in outcomes if one.calm and one.how == "answered"), key=lambda one: one.seconds)
    p99 = calm[min(len(calm) - 1, int(len(calm) * 0.99))].seconds if calm else 0.0
    slowest = "; ".join(
        f"{one.seconds:.1f} s at {one.began - began:.0f} s: {one.kind} {one.nonce} {one.process} {one.request}"
        for one in reversed(calm[-3:])
    )
    detail = f"p99 {p99:.2f} s of {len(calm)} answers (bound: {bound:.0f} s); the slowest: {slowest}"
    return Invariant("others' faults reach an untouched tenant within a bound", bool(calm) and p99 <= bound, detail)


def bounded(samples: Sequence[Mapping[str, float]], *, bytes_most: float, descriptors_most: float) -> Invariant:
    """Each replica's memory and descriptors stay under their bounds, whenever looked at."""
    memory = max((one["resident_bytes"] for one in samples), default=0.0)
    descriptors = max((one["descriptors"] for one in samples), default=0.0)
    return Invariant(
        "memory and descriptors are bounded",
        memory <= bytes_most and descriptors <= descriptors_most,
        f"at most {memory / 2**20:.0f} MB of {bytes_most / 2**20:.0f}, {descriptors:.0f} descriptors of {descriptors_most:.0f}",
    )


def no_creep(samples: Sequence[Mapping[str, float]], *, growth_most: float, seconds_least: float = 90.0) -> Invariant:
    """A server that lives for some time does not keep growing: its least memory in the last quarter of its life is
    little more than that in the second one. `life` in a sample numbers the starts of its `replica`.
    """
    worst, judged = 0.0, 0
    for life in sorted({(one["replica"], one["life"]) for one in samples}):
        mine = [one for one in samples if (one["replica"], one["life"]) == life]
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


def _while_down(replica: int, began: float, ended: float, downs: Sequence[Down]) -> bool:
    return any(
        one.replica == replica and began - AROUND_A_KILL <= one.until and one.since <= ended + AROUND_A_KILL
        for one in downs
    )
