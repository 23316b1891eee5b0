"""The machine that was measured, said with every result."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.processes import PATH
from claude_wrapper import __version__
from claude_wrapper.agent.launch import locate_cli


def machine() -> dict[str, Any]:
    """Everything that changes numbers."""
    return {
        "cpu": _value("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(int((_value("/proc/meminfo", "MemTotal") or "0").split()[0]) / 2**20, 1),
        "system": _value("/etc/os-release", "PRETTY_NAME", "=").strip('"'),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cli": _cli_version(),
        "claude_wrapper": __version__,
    }


def moment() -> dict[str, Any]:
    """When, and how busy it was."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load": [round(one, 2) for one in os.getloadavg()],
    }


def _cli_version() -> str:
    answer = subprocess.run(
        [str(locate_cli(None)), "--version"],
        env={"PATH": PATH, "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return answer.stdout.strip() or "unknown"


def _value(path: str, name: str, separator: str = ":") -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(separator)[2].strip() for line in lines if line.startswith(name)), "")
