"""The size and inode limit of a slot."""

from __future__ import annotations

import os
from pathlib import Path
from shutil import which

import pytest

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import SlotDirs, disk
from claude_wrapper.sandbox.bwrap import BwrapHost, BwrapSandbox
from claude_wrapper.sandbox.commands import SYSTEM_PATH, find_tools
from claude_wrapper.sandbox.disk import Usage
from claude_wrapper.sandbox.none import NoSandbox
from sandbox.doubles import limits, run, why_no_bwrap

TENANT = 300_007


@pytest.fixture
def dirs(tmp_path: Path) -> SlotDirs:
    return NoSandbox().create_dirs(tmp_path / "slot", None)


def test_usage_counts_what_files_take_once_and_follows_no_link(dirs: SlotDirs) -> None:
    (dirs.work / "sub").mkdir()
    (dirs.work / "sub" / "f").write_bytes(bytes(100_000))
    (dirs.work / "again").hardlink_to(dirs.work / "sub" / "f")
    (dirs.work / "root").symlink_to("/")
    with (dirs.home / "sparse").open("wb") as file:
        file.truncate(1 << 30)

    found = disk.usage(dirs)

    assert found.inodes == 4
    assert 100_000 <= found.disk_bytes < 200_000
    assert disk.usage(dirs, stop_after=2).inodes == 3


def test_over_quota_is_said_in_words() -> None:
    bounded = limits(disk_bytes=100, disk_inodes=10)

    assert Usage(100, 10).over(bounded) is None
    assert "may take 100" in str(Usage(101, 1).over(bounded))
    assert "may hold 10" in str(Usage(1, 11).over(bounded))
    assert Usage(10**12, 10**9).over(limits(disk_bytes=None, disk_inodes=None)) is None


@pytest.mark.process
@pytest.mark.anyio
async def test_a_file_system_of_its_own_bounds_size_and_inodes(open_tmp: Path) -> None:
    if os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK) or which("mkfs.ext4", path=SYSTEM_PATH) is None:
        pytest.skip("no loop devices, no root or no e2fsprogs on this host")
    if why_no_bwrap():
        pytest.skip(str(why_no_bwrap()))
    sandbox = BwrapSandbox(BwrapHost(find_tools(SYSTEM_PATH), cgroups=None, uids=True, disable_userns=True))
    dirs = sandbox.create_dirs(open_tmp / "slots" / "slot_disk", TENANT)
    bounded = limits(disk_bytes=24 << 20, disk_inodes=500, file_bytes=64 << 20)
    try:
        made = disk.create(dirs, bounded, TENANT)
    except SandboxUnavailable as error:
        if "loop" in str(error):
            pytest.skip(f"loop devices are listed but cannot be used: {error}")
        raise
    try:
        script = (
            "head -c 60000000 /dev/zero > /work/f; stat -c %s /work/f; rm /work/f; cd ~; touch $(seq 1000); ls | wc -l"
        )
        _, out, err = await run(sandbox, dirs, script, uid=TENANT)
        size, files = map(int, out.split())
        assert 8 << 20 < size < 24 << 20
        assert 300 < files < 520
        assert "No space left" in err
    finally:
        disk.release(dirs, made)
    assert not made.image.exists()
    assert not os.path.ismount(dirs.work)
    sandbox.remove_dirs(dirs)


def test_what_cannot_be_made_leaves_the_slot_as_it_was(dirs: SlotDirs) -> None:
    with pytest.raises(SandboxUnavailable, match="no file system of its own"):
        disk.create(dirs, limits(disk_bytes=1000), None)  # too small for ext4

    assert sorted(path.name for path in dirs.root.iterdir()) == ["home", "run", "work"]
