"""`python -m claude_wrapper.testing.attack`: the table of attacks × levels; exit status 1 if a promise is broken."""

from __future__ import annotations

import asyncio
import sys

from claude_wrapper.sandbox import probe
from claude_wrapper.testing.attack.catalogue import ATTACKS
from claude_wrapper.testing.attack.runner import broken, columns, run_column, table


def main() -> int:
    """Run everything; print the table, the declared breaches and what is broken."""
    report = probe()
    sys.stdout.write(report.text() + "\n\n")
    outcomes = [outcome for column in columns(report) for outcome in asyncio.run(run_column(column))]
    sys.stdout.write(
        table(outcomes) + "\n\nH held · B breached, as declared · B! breached against the promise · ? not carried out\n"
    )
    for attack in ATTACKS:
        if attack.why_not:
            sys.stdout.write(f"  {attack.name}: {attack.why_not}\n")
    failures = broken(outcomes)
    for outcome in failures:
        sys.stdout.write(f"FAILED {outcome.column} · {outcome.attack}: {outcome.detail}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
