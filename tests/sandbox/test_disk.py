"""The size and inode limit of a slot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox import Limits, SlotDirs, disk, loopdisk
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


def bounded(**changed: int) -> Limits:
    return limits(**({"disk_bytes": 24 << 20, "disk_inodes": 500, "file_bytes": 64 << 20} | changed))


@pytest.fixture
def loop_dirs(open_tmp: Path) -> SlotDirs:
    if reason := loopdisk.why_not():
        pytest.skip(f"no file system for each slot on this host: {reason}")
    if reason := why_no_bwrap():
        pytest.skip(reason)
    return _bwrap().create_dirs(open_tmp / "slots" / "slot_disk", TENANT)


def _bwrap() -> BwrapSandbox:
    return BwrapSandbox(BwrapHost(find_tools(SYSTEM_PATH), cgroups=None, uids=True, disable_userns=True))


@pytest.mark.process
@pytest.mark.anyio
async def test_a_file_system_of_its_own_bounds_size_and_inodes(loop_dirs: SlotDirs) -> None:
    sandbox, dirs = _bwrap(), loop_dirs
    made = loopdisk.create(dirs, bounded(), TENANT)
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
        made.release()
    assert not made.image.exists()
    assert not os.path.ismount(dirs.work)
    sandbox.remove_dirs(dirs)


@pytest.mark.process
@pytest.mark.anyio
async def test_a_kept_file_system_is_another_slot_s_with_everything_on_it(loop_dirs: SlotDirs, open_tmp: Path) -> None:
    sandbox, first, root = _bwrap(), loop_dirs, open_tmp / "kept"
    kept = SlotDirs(root=root, home=root / "home", work=root / "work", run=root)
    for directory in (root, kept.home, kept.work):
        directory.mkdir()
    loopdisk.create(first, bounded(), TENANT)
    await run(sandbox, first, "echo tea > /work/note; ln -s note /work/link; chmod 640 /work/note", uid=TENANT)
    made = loopdisk.of(first)
    assert made is not None
    held = made.move_to(kept)
    assert loopdisk.of(first) is None
    sandbox.remove_dirs(first)
    assert (kept.work / "note").read_text() == "tea\n"

    second = sandbox.create_dirs(open_tmp / "slots" / "slot_next", TENANT)
    moved = held.move_to(second)
    try:
        _, out, _ = await run(sandbox, second, "cat /work/link; stat -c %a /work/note", uid=TENANT)
        assert out.split() == ["tea", "640"]
        assert sorted(path.name for path in root.iterdir()) == ["home", "work"]
    finally:
        moved.release()
        sandbox.remove_dirs(second)


@pytest.mark.process
def test_a_killed_server_leaves_no_mount_and_a_later_one_undoes_what_is_left(loop_dirs: SlotDirs) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom claude_wrapper.sandbox import SlotDirs, loopdisk\n"
        "from sandbox.doubles import limits\n"
        "root = Path(sys.argv[1])\n"
        "if sys.argv[2] == 'own':\n    loopdisk.private_mounts()\n"
        "dirs = SlotDirs(root, root / 'home', root / 'work', root / 'run')\n"
        "loopdisk.create(dirs, limits(disk_bytes=24 << 20), None)\n"
        "assert os.path.ismount(dirs.work)\nos.kill(os.getpid(), 9)\n"
    )

    def killed(namespace: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", program, str(loop_dirs.root), namespace],
            env={"PYTHONPATH": str(Path(__file__).parents[1])},
            timeout=60,
        )
        assert done.returncode == -9
        return [line for line in Path("/proc/mounts").read_text().splitlines() if str(loop_dirs.root) in line]

    assert killed("own") == []
    (loop_dirs.root / loopdisk.IMAGE).unlink()
    (loop_dirs.root / "disk").rmdir()
    assert len(killed("host's")) == 3
    loopdisk.unmount_below(loop_dirs.root)
    assert str(loop_dirs.root) not in Path("/proc/mounts").read_text()


def test_what_cannot_be_made_leaves_the_slot_as_it_was(
    dirs: SlotDirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loopdisk, "SYSTEM_PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match=r"no file system of its own.*mkfs\.ext4 is not installed"):
        loopdisk.create(dirs, bounded(), None)

    assert sorted(path.name for path in dirs.root.iterdir()) == ["home", "run", "work"]
