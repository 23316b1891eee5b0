"""`python -m claude_wrapper.testing.soak --seconds 600 --seed 1 --report docs/soak`; exit code 1 if something does not hold."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from claude_wrapper.testing.soak import page, report
from claude_wrapper.testing.soak.run import soak
from claude_wrapper.testing.soak.settings import SoakSettings


def main() -> int:
    """Run a soak and write its report."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replicas", type=int, help="2 where Postgres and Redis can be had, else 1")
    parser.add_argument("--callers", type=int, default=10, help="at most; fewer while answers are slow")
    parser.add_argument("--embedded", action="store_true", help="SQLite and memory, also where Postgres could be had")
    parser.add_argument("--database-url", help="a Postgres to use instead of one of our own; it is not restarted")
    parser.add_argument("--redis-url", help="a Redis to use instead of one of our own; it is not restarted")
    parser.add_argument("--keep-logs", action="store_true", help="server-N.log beside the report, also when it passed")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument(
        "--report", type=Path, default=Path("docs/soak"), help="directory of index.html and result.json"
    )
    asked = parser.parse_args()
    settings = SoakSettings(
        seconds=asked.seconds,
        seed=asked.seed,
        replicas=asked.replicas,
        callers=asked.callers,
        embedded=asked.embedded,
        database_url=asked.database_url,
        redis_url=asked.redis_url,
    )
    with tempfile.TemporaryDirectory(prefix="cw-soak-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o711)
        done = asyncio.run(soak(settings, directory, (lambda _: None) if asked.quiet else _say))
        asked.report.mkdir(parents=True, exist_ok=True)
        logs = _keep_logs(done.log_files, asked.report, wanted=asked.keep_logs or not done.passed)
    (asked.report / "result.json").write_bytes(report.to_json(done, logs))
    (asked.report / "index.html").write_text(page.to_html(done, logs), encoding="utf-8")
    sys.stdout.write(report.to_text(done))
    sys.stdout.write(f"\nReport: {asked.report / 'index.html'}\n")
    for name in logs:
        sys.stdout.write(f"Log of the server: {asked.report / name}\n")
    return 0 if done.passed else 1


def _keep_logs(files: Sequence[Path], directory: Path, *, wanted: bool) -> list[str]:
    """Their names beside the report, so that a finding can be searched; those of an earlier run go."""
    for old in directory.glob("server-*.log"):
        old.unlink()
    kept = [file for file in files if wanted and file.exists()]
    for file in kept:
        shutil.copyfile(file, directory / file.name)
    return [file.name for file in kept]


def _say(text: str) -> None:
    sys.stderr.write(f"soak: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
