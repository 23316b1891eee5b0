"""From settings and what the host offers to a sandbox, or to a refusal that says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from claude_wrapper.errors import ConfigurationError, PoolOverloaded, SandboxUnavailable
from claude_wrapper.sandbox import HostReport, Level, UidAllocator, UidRange, choose, choose_level, probe
from claude_wrapper.sandbox.commands import SYSTEM_PATH, find_tools
from claude_wrapper.sandbox.staging import reachable_cli


def report(**reasons: str) -> HostReport:
    return HostReport(
        findings=(),
        unavailable={Level(name): reason for name, reason in reasons.items()},
        tools=find_tools(SYSTEM_PATH),
        hierarchies=(),
        uids=False,
        disable_userns=False,
        landlock_abi=0,
    )


def test_auto_takes_the_strongest_that_works() -> None:
    assert choose_level("auto", None, report()) is Level.BWRAP
    assert choose_level("auto", None, report(bwrap="no")) is Level.RESTRICTED
    assert choose_level("auto", None, report(bwrap="no", restricted="no")) is Level.NONE


def test_a_named_level_that_cannot_be_enforced_stops_with_the_reason() -> None:
    with pytest.raises(SandboxUnavailable, match="Creating new namespace failed"):
        choose_level("bwrap", None, report(bwrap="Creating new namespace failed"))


def test_a_required_level_stops_what_is_weaker_with_the_reason() -> None:
    with pytest.raises(SandboxUnavailable, match="no user namespaces here"):
        choose_level("auto", Level.BWRAP, report(bwrap="no user namespaces here"))
    with pytest.raises(SandboxUnavailable, match="names `none`"):
        choose_level("none", Level.RESTRICTED, report())
    assert choose_level("auto", Level.RESTRICTED, report(bwrap="no")) is Level.RESTRICTED


def test_an_unknown_name_is_a_mistake_in_the_configuration() -> None:
    with pytest.raises(ConfigurationError, match="docker"):
        choose_level("docker", None, report())


def test_none_needs_nothing_from_the_host() -> None:
    assert choose("none", None, report(bwrap="no", restricted="no")).level is Level.NONE


@pytest.mark.process
def test_the_probe_tries_for_real_and_says_what_is_lost_and_how_to_get_it(tmp_path: Path) -> None:
    found = probe()
    blind = probe(path=str(tmp_path))  # a host without any of the programs

    assert found.best in Level
    assert {"bwrap", "uids", "landlock", "restricted", "cgroup_memory", "openat2", "loop_disk"} <= {
        finding.name for finding in found.findings
    }
    assert not blind.finding("bwrap").present
    assert "apt-get install bubblewrap" in blind.finding("bwrap").fix
    assert Level.BWRAP in blind.unavailable
    text = blind.text()
    for finding in blind.findings:
        assert finding.title in text
        assert finding.present or (finding.lost in text and finding.fix in text)
    wire = blind.to_wire()
    assert wire["best_level"] == blind.best.value
    assert [row["level"] for row in wire["levels"]] == ["bwrap", "restricted", "none"]
    assert next(row for row in wire["mechanisms"] if row["name"] == "bwrap")["fix"]


@pytest.mark.process
def test_the_chosen_sandbox_is_the_level_that_the_report_names() -> None:
    found = probe()
    sandbox = choose("auto", None, found)
    try:
        assert sandbox.level is found.best
        assert sandbox.separate_uid is (found.uids and found.best is not Level.NONE)
    finally:
        sandbox.close()


def test_own_uids_can_be_switched_off() -> None:
    offered = replace(report(), uids=True, landlock_abi=7)

    assert choose("restricted", None, offered, use_uids=False).separate_uid is False


def test_no_two_live_slots_have_one_uid_and_the_range_is_a_bound() -> None:
    allocator = UidAllocator(UidRange(2000, 2003), in_use=lambda uid: uid == 2001)

    taken = [allocator.acquire() for _ in range(3)]
    assert taken == [2000, 2002, 2003]
    with pytest.raises(PoolOverloaded, match="SANDBOX_UIDS"):
        allocator.acquire()
    allocator.release(2002)
    assert allocator.acquire() == 2002
    assert allocator.live == {2000, 2002, 2003}
    with pytest.raises(KeyError):
        allocator.release(2001)


def test_a_uid_that_was_given_back_waits_as_long_as_possible() -> None:
    allocator = UidAllocator(UidRange(2000, 2002), in_use=lambda _: False)
    first = allocator.acquire()
    allocator.release(first)

    assert [allocator.acquire() for _ in range(3)] == [2001, 2002, 2000]


@pytest.mark.parametrize("text", ["", "5", "a-b", "3000-2000", "0-100", "2000-99999999999", "-5-6"])
def test_a_range_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="uids"):
        UidRange.parse(text)


def test_a_range_is_read() -> None:
    assert UidRange.parse("200000-265535") == UidRange(200_000, 265_535)


def test_a_cli_in_a_closed_place_is_shown_by_a_hard_link(open_tmp: Path) -> None:
    closed = open_tmp / "closed"
    closed.mkdir(mode=0o700)
    cli = closed / "claude"
    cli.write_bytes(b"#!/bin/sh\n")
    cli.chmod(0o755)

    shown = reachable_cli(cli, open_tmp / "cli", 300_001)
    assert shown.stat().st_ino == cli.stat().st_ino
    assert reachable_cli(cli, open_tmp / "cli", 300_001) == shown
    assert reachable_cli(cli, open_tmp / "cli", None) == cli
    cli.unlink()
    cli.write_bytes(b"#!/bin/sh\nexit 1\n")
    assert reachable_cli(cli, open_tmp / "cli", 300_001).read_bytes() == cli.read_bytes()
