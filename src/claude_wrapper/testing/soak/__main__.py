"""`python -m claude_wrapper.testing.soak --seconds 600 --seed 1 --report docs/soak`; exit code 1 if something does not hold."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from claude_wrapper.testing.soak import report
from claude_wrapper.testing.soak.run import SoakSettings, soak


def main() -> int:
    """Run a soak and write its report."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--callers", type=int, default=10)
    parser.add_argument(
        "--report", type=Path, default=Path("docs/soak"), help="directory of index.html and result.json"
    )
    asked = parser.parse_args()
    settings = SoakSettings(seconds=asked.seconds, seed=asked.seed, callers=asked.callers)
    with tempfile.TemporaryDirectory(prefix="cw-soak-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o711)
        done = asyncio.run(soak(settings, directory))
    asked.report.mkdir(parents=True, exist_ok=True)
    (asked.report / "result.json").write_bytes(report.to_json(done))
    (asked.report / "index.html").write_text(report.to_html(done), encoding="utf-8")
    sys.stdout.write(report.to_json(done).decode() + "\n")
    return 0 if done.passed else 1


if __name__ == "__main__":
    sys.exit(main())
