"""What `/health` and `/v1/security` say."""

from __future__ import annotations

from typing import Any

from claude_wrapper.api.state import Lifecycle
from claude_wrapper.pool.pool import Pool
from claude_wrapper.sandbox.port import Sandbox
from claude_wrapper.sandbox.probe import HostReport
from claude_wrapper.sandbox.security import SecurityPolicy
from claude_wrapper.sessions.process import SlotProcess

_MEMORY_SHARE = 0.9


def security_report(sandbox: Sandbox, policy: SecurityPolicy, host: HostReport) -> dict[str, Any]:
    """Sandbox and security level in force, and every mechanism of this host."""
    return {
        "sandbox": sandbox.level.value,
        "separate_uid": sandbox.separate_uid,
        "security_level": policy.level.value,
        "allowed": {
            "tools": list(policy.tools),
            "permission_modes": list(policy.permission_modes),
            "egress": policy.egress.value,
            "local_mcp": policy.local_mcp,
        },
        "lowered": list(policy.lowered),
        "host": host.to_wire(),
    }


def health_report(pool: Pool[SlotProcess], lifecycle: Lifecycle, version: str) -> dict[str, Any]:
    """Each check with its name and figures; `unhealthy` when one that matters fails, and it is named."""
    stats = pool.stats()
    used = memory_share()
    checks: dict[str, dict[str, Any]] = {
        "pool": {
            "ok": not stats.draining or lifecycle.draining,
            "processes": stats.processes,
            "max_processes": stats.max_processes,
            "spares": stats.spares,
            "waiting": stats.waiting,
        },
        "processes": {
            "ok": all(slot.alive for slot in stats.slots if slot.pid is not None),
            "spawn_failures": stats.spawn_failures,
            "crashes": stats.crashes,
        },
        "memory": {"ok": used is None or used < _MEMORY_SHARE, "used_share": used},
    }
    failing = sorted(name for name, check in checks.items() if not check["ok"])
    return {"status": "unhealthy" if failing else "healthy", "version": version, "failing": failing, "checks": checks}


def memory_share() -> float | None:
    """Share of the machine's memory in use, from /proc/meminfo; None where there is none."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - a kernel file
            sizes = {line.split(":")[0]: int(line.split()[1]) for line in file if ":" in line}
        return round(1 - sizes["MemAvailable"] / sizes["MemTotal"], 3)
    except (OSError, KeyError, ValueError, IndexError):
        return None
