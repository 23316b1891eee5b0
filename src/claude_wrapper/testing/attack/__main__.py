"""`python -m claude_wrapper.testing.attack`: the table of attacks × levels; exit status 1 if a promise is broken."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import platform
import sys
from pathlib import Path

from claude_wrapper.sandbox import HostReport, probe
from claude_wrapper.testing.attack.catalogue import ATTACKS, Attack
from claude_wrapper.testing.attack.catalogue_broker import BROKER_ATTACKS
from claude_wrapper.testing.attack.real import Latency, run_column_with_cli
from claude_wrapper.testing.attack.runner import Outcome, broken, columns, run_column, table
from claude_wrapper.testing.attack.served import ServedCheck, served_checks


def main(arguments: list[str]) -> int:
    """Run everything; print the table, the declared breaches and what is broken."""
    asked = _parse(arguments)
    report = probe()
    sys.stdout.write(report.text() + "\n\n")
    sys.stdout.flush()
    attacks = tuple(one for one in (*ATTACKS, *BROKER_ATTACKS) if asked.only is None or asked.only in one.name)
    outcomes: list[Outcome] = []
    latencies: list[Latency] = []
    for column in columns(report):  # one after the other: each has the server's control groups for itself
        if asked.level not in {None, column.sandbox.level.value}:
            column.sandbox.close()
            continue
        met = tuple(one for one in attacks if column.meets(one))
        if not met or (asked.direct and column.disks):  # disks belong to the slots of real processes
            column.sandbox.close()
            continue
        if asked.direct:
            outcomes += asyncio.run(run_column(column, tuple(one for one in met if not one.needs_cli)))
        else:
            some, felt = asyncio.run(run_column_with_cli(column, met, _tell))
            outcomes, latencies = outcomes + some, latencies + felt
    checks = [] if asked.direct or asked.only else asyncio.run(served_checks(report))
    text = _page(report, attacks, outcomes, latencies, checks, direct=asked.direct)
    sys.stdout.write("\n" + text)
    if asked.write:
        Path(asked.write).write_text(text, encoding="utf-8")
    failures = broken(outcomes)
    for outcome in failures:
        sys.stdout.write(f"FAILED {outcome.column} · {outcome.attack}: {outcome.detail}\n")
    wrong = [check for check in checks if not check.held]
    for check in wrong:
        sys.stdout.write(f"FAILED server · {check.name}: {check.detail}\n")
    return 1 if failures or wrong else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m claude_wrapper.testing.attack", description=__doc__)
    parser.add_argument(
        "--direct", action="store_true", help="a shell in the place of the CLI: quicker, without broker"
    )
    parser.add_argument("--level", help="only this sandbox level")
    parser.add_argument("--only", help="only attacks whose name contains this")
    parser.add_argument("--write", metavar="FILE", help="write the page to this file too (docs/attacks.md)")
    return parser.parse_args(arguments)


def _tell(outcome: Outcome) -> None:
    verdict = (
        "?" if outcome.failed else "held" if outcome.held else "breach" if outcome.promised else "breach, declared"
    )
    sys.stderr.write(f"{outcome.column:26} {verdict:16} {outcome.attack}  {outcome.detail[:120]}\n")


def _page(
    report: HostReport,
    attacks: tuple[Attack, ...],
    outcomes: list[Outcome],
    latencies: list[Latency],
    checks: list[ServedCheck],
    *,
    direct: bool,
) -> str:
    today = datetime.datetime.now(tz=datetime.UTC).date()
    how = "a shell in the place of the CLI" if direct else "the agent's own Bash tool, real CLI, scripted model"
    groups = ", ".join(found.name for found in report.findings if found.present and found.name.startswith("cgroup"))
    lines = [
        "# Attacks from inside",
        "",
        f"<!-- Written by `make attack` (`--write docs/attacks.md`) on {today}. -->",
        "",
        f"Run on {today}, {platform.system()} {platform.release()} {platform.machine()}, through {how}.",
        f"Strongest level: `{report.best}`; own uids: {'yes' if report.uids else 'no'}.",
        f"Control groups: {groups or 'none'}; Landlock ABI {report.landlock_abi}.",
        "",
        "H held · B breached, as declared · B! breached against the promise · ? not carried out",
        "",
        table(outcomes, attacks),
        "",
        "`own disk` is `CLAUDE_WRAPPER_SANDBOX_DISK=loop`; only the attacks on the disk differ there. Elsewhere such an attack",
        "counts as held when the agent was stopped in the midst of it. On two cores that others use too, `take every processor`",
        "shows little.",
        "",
        "What a level does not promise, and why:",
        "",
        *(f"* {attack.name}: {attack.why_not}." for attack in attacks if attack.why_not),
    ]
    if latencies:
        lines += ["", "## What a neighbour feels", ""]
        lines += ["Turns of another tenant on the same machine, against a scripted model, while the attack runs.", ""]
        lines += ["| attack | level | before, ms | meanwhile, ms (median) | worst, ms | ratio | turns |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [
            f"| {one.attack} | {one.column} | {one.before * 1e3:.0f} | {one.meanwhile * 1e3:.0f} | "
            f"{one.worst * 1e3:.0f} | {one.ratio:.1f} | {one.turns} |"
            for one in latencies
        ]
    if checks:
        lines += ["", "## Against the whole server", "", "| attack | outcome | seen |", "|---|---|---|"]
        lines += [f"| {check.name} | {'H' if check.held else '**B!**'} | {check.detail} |" for check in checks]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
