"""Control groups: what is written where, and what a dead server left behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from claude_wrapper.sandbox import cgroup, processes
from claude_wrapper.sandbox.cgroup import CgroupTree, Hierarchy, hierarchies, open_tree, settings
from sandbox.doubles import host_cgroups, limits

LIMITED = limits(memory_bytes=300 << 20, processes=64, cpu_share=1.5)
SECOND = "30 23 0:26 / {root} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"


def test_version_two_gets_memory_without_swap_processes_and_cpu() -> None:
    hierarchy = Hierarchy(2, frozenset({"memory", "pids", "cpu"}), Path("/x"))

    assert dict(settings(hierarchy, LIMITED)) == {
        "memory.max": "314572800",
        "memory.swap.max": "0",
        "pids.max": "64",
        "cpu.max": "150000 100000",
    }


def test_version_one_gets_the_same_in_its_own_words() -> None:
    found: dict[str, str] = {}
    for name in ("memory", "pids", "cpu"):
        found |= dict(settings(Hierarchy(1, frozenset({name}), Path("/x")), LIMITED))

    assert found == {
        "memory.limit_in_bytes": "314572800",
        "memory.memsw.limit_in_bytes": "314572800",
        "pids.max": "64",
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "150000",
    }


def test_what_is_not_limited_is_not_written() -> None:
    hierarchy = Hierarchy(2, frozenset({"memory", "cpu"}), Path("/x"))

    assert settings(hierarchy, limits(memory_bytes=None, cpu_share=None)) == []


def test_the_servers_own_group_is_found_in_version_two(tmp_path: Path) -> None:
    own = tmp_path / "system.slice" / "claude.service"
    own.mkdir(parents=True)
    (own / "cgroup.controllers").write_text("cpu memory pids io\n")
    found = hierarchies(SECOND.format(root=tmp_path), "0::/system.slice/claude.service\n")

    assert found == [Hierarchy(2, frozenset({"cpu", "memory", "pids", "io"}), own)]


def test_the_servers_own_group_is_found_in_version_one_also_inside_a_container() -> None:
    mounts = (
        "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "36 31 0:33 /docker/abc /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
        "37 31 0:34 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
    )
    own = "8:pids:/docker/abc/child\n4:memory:/docker/abc\n9:name=systemd:/\n"

    assert hierarchies(mounts, own) == [
        Hierarchy(1, frozenset({"memory"}), Path("/sys/fs/cgroup/memory/docker/abc")),
        Hierarchy(1, frozenset({"pids"}), Path("/sys/fs/cgroup/pids/child")),
    ]


def test_a_hierarchy_that_is_mounted_twice_is_used_once(tmp_path: Path) -> None:
    """As beside a second root file system, which has a `/sys` of its own."""
    (tmp_path / "cgroup.controllers").write_text("io\n")
    mounts = (
        f"34 31 0:31 / {tmp_path} rw - cgroup2 cgroup2 rw\n"
        "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        f"60 31 0:31 / {tmp_path / 'again'} rw - cgroup2 cgroup2 rw\n"
        "61 31 0:32 / /other/sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "62 31 0:33 / /other/sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
    )

    assert hierarchies(mounts, "0::/\n4:memory:/\n8:pids:/\n") == [
        Hierarchy(2, frozenset({"io"}), tmp_path),
        Hierarchy(1, frozenset({"memory"}), Path("/sys/fs/cgroup/memory")),
        Hierarchy(1, frozenset({"pids"}), Path("/other/sys/fs/cgroup/pids")),
    ]


def test_controllers_are_delegated_downwards_in_version_two(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("")
    tree = open_tree([Hierarchy(2, frozenset({"memory", "pids", "cpu"}), tmp_path)], "77")

    assert tree.controllers == {"memory", "pids", "cpu"}
    assert tree.missing == ()
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    assert (tmp_path / "claude-wrapper-77" / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


def test_a_group_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    tree = open_tree([Hierarchy(2, frozenset({"memory"}), tmp_path / "not-there")], "77")

    assert tree.controllers == frozenset()
    assert dict(tree.missing)["memory"] == f"{tmp_path}/not-there is not writable (No such file or directory)"
    assert dict(tree.missing)["cpu"] == "no mounted control group hierarchy offers it"
    assert tree.create("slot", LIMITED) == []


@pytest.mark.process
@pytest.mark.anyio
async def test_a_slots_group_is_killed_and_removed_for_real() -> None:
    tree = host_cgroups()
    if not tree.parents:
        pytest.skip(f"no writable control group on this host: {tree.missing}")
    procs = tree.create("slot_test", LIMITED)
    child = await asyncio.create_subprocess_exec("sleep", "300")
    try:
        for file in procs:
            file.write_text(str(child.pid))
        assert tree.pids("slot_test") == [child.pid]
        assert await tree.kill("slot_test", 5) == []
        assert await child.wait() == -9
        tree.remove("slot_test")
        assert not any(group.exists() for group in tree.groups("slot_test"))
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
        tree.close()


@pytest.mark.process
def test_what_a_dead_server_left_is_swept_at_the_next_start() -> None:
    found = hierarchies(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    tree = open_tree(found, dead)
    if not tree.parents:
        pytest.skip(f"no writable control group on this host: {tree.missing}")
    left = subprocess.Popen(["sleep", "300"])
    try:
        for file in tree.create("slot_left", LIMITED):
            file.write_text(str(left.pid))
        alive = open_tree(found, str(os.getpid()))

        removed = cgroup.sweep(found)

        assert left.wait(10) == -9
        assert f"claude-wrapper-{dead}" in {parent.name for parent in removed}
        assert all(parent.exists() for _, parent in alive.parents)
        alive.close()
    finally:
        left.kill()
        left.wait()
        cgroup.sweep(found)
    assert not any(parent.exists() for _, parent in tree.parents)


def test_a_tree_without_hierarchies_limits_nothing_and_harms_nothing() -> None:
    tree = CgroupTree((), (("memory", "none"),))

    assert tree.freeze("slot", frozen=True) is False
    assert tree.memory_bytes("slot") is None
    assert tree.pids("slot") == []
    tree.signal_all("slot")
    assert processes.read_process(os.getpid()) is not None
