"""The figures of a soak, as text and as JSON; `page` shows them with plots."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from claude_wrapper.testing.soak import plan
from claude_wrapper.testing.soak.run import Finished


def summary(done: Finished, logs: Sequence[str] = ()) -> dict[str, Any]:
    """The figures. `logs`: files beside the report that hold what the servers wrote."""
    record = done.record
    answered = [one for one in record.outcomes if one.how == "answered"]
    by_process: dict[str, list[float]] = defaultdict(list)
    for one in answered:
        by_process[one.process or "no process"].append(one.seconds)
    brought = Counter(one.kind for one in record.outcomes if one.kind in plan.FAULTY)
    return {
        "passed": done.passed,
        "seconds": round(done.seconds, 1),
        "load_seconds": done.settings.seconds,
        "seed": done.settings.seed,
        "surroundings": done.surroundings,
        "replicas": len(done.log_files),
        "not_done_here": record.skipped,
        "callers_at_most": done.settings.callers,
        "conversations": record.conversations.total(),
        "conversations_by_door": dict(record.conversations),
        "streams_followed": len(record.followed),
        "requests": len(record.outcomes),
        "faults": record.fault_count,
        "faults_by_kind": dict((Counter(kind for _, kind in record.faults) + brought).most_common()),
        "outcomes": dict(Counter(one.how for one in record.outcomes).most_common()),
        "refusals": dict(
            Counter(f"{one.status} {one.detail}" for one in record.outcomes if one.how == "refused").most_common()
        ),
        "broken": dict(Counter(one.detail for one in record.outcomes if one.how == "broken").most_common()),
        "seconds_by_process": {
            kind: {"count": len(values), **_both(values)} for kind, values in sorted(by_process.items())
        },
        "most_resident_mb": round(max((one["resident_bytes"] for one in record.samples), default=0) / 2**20),
        "server_starts": len(record.downs) + len(done.log_files),
        "asked_of_a_second_replica": sum(one.attempts > 1 for one in record.outcomes),
        "connections_broken": len(record.losses),
        "answers_per_second": round(len(answered) / max(1.0, done.settings.seconds), 1),
        "untouched_tenant_seconds": _both(one.seconds for one in answered if one.calm),
        "struck_tenant_seconds": _both(one.seconds for one in answered if not one.calm),
        "server_logs": list(logs),
        "log": dict(done.log.counts.most_common()),
        "log_errors": done.log.errors,
        "invariants": [{"name": one.name, "holds": one.holds, "detail": one.detail} for one in done.invariants],
    }


def to_json(done: Finished, logs: Sequence[str] = ()) -> bytes:
    """For programs."""
    return msgspec.json.format(msgspec.json.encode(summary(done, logs)), indent=1)


def to_text(done: Finished) -> str:
    """For a terminal."""
    figures = summary(done)
    lines = [f"{'✓' if one.holds else '✗'} {one.name}: {one.detail}" for one in done.invariants]
    shown = ("conversations", "requests", "faults", "faults_by_kind", "outcomes", "refusals", "server_starts", "log")
    lines += [f"  {name}: {figures[name]}" for name in shown]
    lines.append("passed" if done.passed else "FAILED")
    return "\n".join(lines) + "\n"


def _both(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": _percentile(ordered, 0.5), "p99": _percentile(ordered, 0.99)}


def _percentile(ordered: Sequence[float], share: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 3) if ordered else 0.0
