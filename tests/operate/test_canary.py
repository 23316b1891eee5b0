"""A new version of the CLI: who gets it, when it is taken back, and what a real broken one does to callers."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.agent.launch import locate_cli
from claude_wrapper.errors import AgentCrashed, Conflict, UpstreamError
from claude_wrapper.sessions.canary import CANARY, MAIN, Rules, Sample, State, chosen, least_rate, objection
from claude_wrapper.sessions.spec import Owner
from claude_wrapper.sessions.versions import Versions
from claude_wrapper.storage.state import MemoryState
from claude_wrapper.testing.clock import ManualClock
from running_server import Running, running

# The decisions --------------------------------------------------------------------------------------------------------

RULES = Rules(share=0.1, min_turns=5, window_seconds=100.0)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=50, unique=True), st.floats(0, 1), st.floats(0, 1))
def test_the_share_is_stable_and_grows_without_moving_anybody_back(names: list[str], one: float, other: float) -> None:
    less, more = sorted((one, other))
    for name in names:
        assert chosen(name, less) <= chosen(name, more)
        assert not chosen(name, 0.0)
        assert chosen(name, 1.0)


def test_the_share_is_about_what_was_asked_for() -> None:
    assert 400 < sum(chosen(f"sesn_{number}", 0.05) for number in range(10_000)) < 600


@given(st.integers(1, 500), st.integers(0, 500))
def test_the_least_rate_is_below_the_seen_one_and_more_turns_make_surer(turns: int, failures: int) -> None:
    failures = min(failures, turns)
    rate = failures / turns
    assert 0 <= least_rate(failures, turns) <= rate + 1e-9
    assert least_rate(failures, turns) <= least_rate(failures * 10, turns * 10) + 1e-9


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.floats(0.01, 10), st.floats(0.01, 10))
def test_a_canary_is_never_taken_back_for_too_few_turns_or_for_being_no_worse(
    turns: int, failures: int, others: int, fast: float, slow: float
) -> None:
    failures = min(failures, turns)
    canary, main = Sample(turns, failures, slow), Sample(others, 0, fast)
    if objection(main, canary, RULES) is not None:
        assert turns >= RULES.min_turns
        assert failures > 0 or slow > RULES.slower * fast
    assert objection(canary, canary, RULES) is None


@pytest.mark.parametrize(
    ("main", "canary", "why"),
    [
        (Sample(100, 0, 1.0), Sample(4, 4, None), None),
        (Sample(100, 0, 1.0), Sample(5, 5, None), "5 of 5 turns failed"),
        (Sample(0, 0, None), Sample(5, 5, None), "5 of 5 turns failed"),
        (Sample(100, 1, 1.0), Sample(100, 2, 1.0), None),
        (Sample(100, 1, 1.0), Sample(100, 20, 1.0), "20 of 100 turns failed"),
        (Sample(100, 90, 1.0), Sample(100, 90, 1.0), None),
        (Sample(100, 0, 1.0), Sample(100, 0, 1.6), "1.6 times"),
        (Sample(100, 0, 1.0), Sample(100, 0, 1.4), None),
        (Sample(3, 0, 1.0), Sample(100, 0, 9.0), None),
    ],
)
def test_what_speaks_against_a_canary(main: Sample, canary: Sample, why: str | None) -> None:
    found = objection(main, canary, RULES)
    assert found is None if why is None else (found is not None and why in found)


# The versions ---------------------------------------------------------------------------------------------------------

OWNER = Owner("org_1", "key_1")


def _versions(clock: ManualClock, state: MemoryState, *, pin: str | None = None, share: float = 1.0) -> Versions:
    async def main() -> str:
        return "1.0.0"

    async def pinned(owner: Owner) -> str | None:
        return pin

    rules = Rules(share=share, min_turns=3, window_seconds=100.0)
    return Versions(main, "2.0.0", rules, clock, pinned=pinned, values=state)


@pytest.mark.anyio
async def test_one_replica_that_has_seen_enough_speaks_for_all_until_the_operator_does() -> None:
    clock = ManualClock()
    state = MemoryState(clock)
    ours, theirs = _versions(clock, state), _versions(clock, state)
    moves: list[State] = []
    theirs.on_change = moves.append
    assert await ours.of("c1", OWNER, before=None) == CANARY
    for _ in range(2):
        ours.ended(CANARY, AgentCrashed("gone"), 1.0)
    ours.ended(CANARY, UpstreamError("not its fault", status=529, error_type="overloaded_error"), 1.0)
    await clock.advance(50)
    assert ours.state is State.RUNNING
    ours.ended(CANARY, AgentCrashed("gone"), 1.0)
    assert ours.state is State.ROLLED_BACK
    assert await ours.of("c1", OWNER, before=CANARY) == MAIN
    await ours.tell()
    await theirs.tell()
    assert (theirs.state, moves) == (State.ROLLED_BACK, [State.ROLLED_BACK])
    await theirs.decide(State.PROMOTED)
    await ours.tell()
    assert await ours.of("new", OWNER, before=None) == CANARY
    assert await ours.of("old", OWNER, before=MAIN) == MAIN  # it keeps its version
    assert (await ours.report())["canary"]["reason"] == "by another replica"


@pytest.mark.anyio
async def test_the_operator_tries_a_canary_again_that_was_taken_back_everywhere() -> None:
    clock = ManualClock()
    state = MemoryState(clock)
    ours, theirs = _versions(clock, state), _versions(clock, state)
    for _ in range(3):
        ours.ended(CANARY, AgentCrashed("gone"), 1.0)
    await ours.tell()
    await theirs.tell()
    await theirs.decide(State.RUNNING)
    await ours.tell()
    await theirs.tell()
    assert (ours.state, theirs.state) == (State.RUNNING, State.RUNNING)
    for _ in range(3):
        theirs.ended(CANARY, AgentCrashed("gone again"), 1.0)
    await theirs.tell()
    await ours.tell()
    assert (ours.state, theirs.state) == (State.ROLLED_BACK, State.ROLLED_BACK)


@pytest.mark.anyio
async def test_a_replica_hears_of_a_roll_back_that_shared_state_had_lost() -> None:
    clock = ManualClock()
    state = MemoryState(clock)
    ours, started_later = _versions(clock, state), _versions(clock, state)
    for _ in range(3):
        ours.ended(CANARY, AgentCrashed("gone"), 1.0)
    await ours.tell()
    await state.delete("canary/1.0.0/2.0.0")
    await ours.tell()
    await started_later.tell()
    assert started_later.state is State.ROLLED_BACK


@pytest.mark.anyio
async def test_turns_outside_of_the_window_do_not_count_and_a_pin_is_kept_or_refused() -> None:
    clock = ManualClock()
    versions = _versions(clock, MemoryState(clock))
    for _ in range(5):
        versions.ended(CANARY, AgentCrashed("gone"), 1.0)
        await clock.advance(60)
    assert versions.state is State.RUNNING
    assert await _versions(clock, MemoryState(clock), pin="1.0.0").of("c", OWNER, before=CANARY) == MAIN
    assert await _versions(clock, MemoryState(clock), pin="2.0.0", share=0.0).of("c", OWNER, before=None) == CANARY
    with pytest.raises(Conflict, match=r"pinned to CLI 3.0.0, and this server has 1.0.0 and 2.0.0"):
        await _versions(clock, MemoryState(clock), pin="3.0.0").of("c", OWNER, before=None)


# Real ones ------------------------------------------------------------------------------------------------------------

_BREAKS = """#!{python}
# The real CLI, until somebody speaks to it in a turn.
import subprocess, sys
if "--version" in sys.argv:
    print("9.9.9 (broken)")
    sys.exit()
cli = subprocess.Popen([{cli!r}, *sys.argv[1:]], stdin=subprocess.PIPE)
for line in sys.stdin.buffer:
    if b"[[say" in line:
        cli.kill()
        cli.wait()
        sys.exit(1)
    cli.stdin.write(line)
    cli.stdin.flush()
cli.stdin.close()
sys.exit(cli.wait())
"""


def _copy(directory: Path) -> Path:
    """A second real CLI, in a place of its own."""
    made, real = directory / "second" / "claude", locate_cli()
    made.parent.mkdir(parents=True)
    made.parent.chmod(0o755)
    with contextlib.suppress(OSError):
        os.link(real, made)
    if not made.exists():
        shutil.copy2(real, made)
    return made


async def _report(server: Running) -> dict[str, Any]:
    async with server.http.get("/v1/cli") as response:
        assert response.status == 200
        return dict(await response.json())


def _runs_copy(pid: int) -> bool:
    """Whether the process is the second CLI (the same file under another name)."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return b"second/claude" in command[0] or os.readlink(f"/proc/{pid}/exe").endswith("second/claude")


@pytest.mark.anyio
@pytest.mark.real_cli
async def test_a_broken_new_version_is_taken_back_by_itself(reachable_tmp_path: Path) -> None:
    broken = reachable_tmp_path / "broken"
    reachable_tmp_path.mkdir(exist_ok=True)
    broken.write_text(_BREAKS.format(python=sys.executable, cli=str(locate_cli())))
    broken.chmod(0o755)
    settings = {"canary_cli": broken, "canary_share": 1.0, "canary_min_turns": 3, "sandbox": "none", "spares": 1}
    async with running(reachable_tmp_path / "server", **settings) as server:
        failed = [(await server.ask(f"[[say {number}]]")).status for number in range(3)]
        assert all(status >= 500 for status in failed)
        report = await _report(server)
        assert (report["canary"]["version"], report["canary"]["state"]) == ("9.9.9", "rolled_back")
        assert "3 of 3 turns failed" in report["canary"]["reason"]
        assert (await server.ask("[[say well again]]")).text == "well again"
        async with server.http.get("/metrics") as response:
            text = await response.text()
        assert 'cli_canary{state="rolled_back"} 1.0' in text
        assert 'cli_turns_total{outcome="error",version="canary"} 3.0' in text


@pytest.mark.anyio
@pytest.mark.real_cli
async def test_a_promoted_version_takes_new_conversations_and_the_others_keep_theirs(reachable_tmp_path: Path) -> None:
    reachable_tmp_path.mkdir(exist_ok=True)
    settings = {"canary_cli": _copy(reachable_tmp_path), "canary_share": 0.0, "sandbox": "none", "spares": 1}
    async with running(reachable_tmp_path / "server", **settings) as server:
        old = await server.ask("[[say old]]", session_id="old")
        assert not _runs_copy(old.pid)
        async with server.http.post("/v1/cli", json={"state": "promoted"}) as response:
            assert (await response.json())["canary"]["state"] == "promoted"
        new = await server.ask("[[say new]]", session_id="new")
        again = await server.ask("[[say old again]]", session_id="old")
        assert (_runs_copy(new.pid), again.pid) == (True, old.pid)
        version = (await _report(server))["main"]["version"]
        assert version.startswith("2.")
        for pin, status in ((version, 200), ("1.0.0", 409)):
            async with server.http.post("/v1/organizations/policies", json={"cli_version": pin}) as response:
                assert response.status == 200
            answer = await server.ask("[[say pinned]]", session_id=f"pinned-to-{pin}")
            assert answer.status == status
            assert status != 200 or not _runs_copy(answer.pid)
