"""The server's file access in directories that a tenant controls."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from claude_wrapper.errors import InvalidRequest, NotFound, RequestTooLarge
from claude_wrapper.sandbox import files


@pytest.fixture(params=["openat2", "component by component"], autouse=True)
def resolver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "openat2":
        if not files.has_openat2():
            pytest.skip("this kernel has no openat2")
    else:
        monkeypatch.setattr(files, "has_openat2", lambda: False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    (made / "sub").mkdir(parents=True)
    (made / "sub" / "f").write_bytes(b"content")
    (tmp_path / "secret").write_bytes(b"SECRET")
    return made


def test_a_file_is_read(root: Path) -> None:
    assert files.read_beneath(root, "sub/f", 100) == b"content"
    assert files.read_beneath(root, "./sub//f", 7) == b"content"


@pytest.mark.parametrize(
    "path", ["", "/", "/etc/passwd", "..", "../secret", "sub/../../secret", "a\0b", "x" * 5000, "."]
)
def test_a_path_that_could_leave_is_refused(root: Path, path: str) -> None:
    with pytest.raises(InvalidRequest):
        files.read_beneath(root, path, 100)
    with pytest.raises(InvalidRequest):
        files.write_beneath(root, path, b"x")


LINKS: list[tuple[str, Callable[[Path], None]]] = [
    ("link", lambda root: (root / "link").symlink_to("../secret")),
    ("link", lambda root: (root / "link").symlink_to("/etc/passwd")),
    ("link", lambda root: (root / "link").symlink_to("sub/f")),
    ("link/secret", lambda root: (root / "link").symlink_to("..")),
    ("link", lambda root: (root / "link").symlink_to("/proc/self/environ")),
    ("link/environ", lambda root: (root / "link").symlink_to("/proc/self")),
    ("link", lambda root: (root / "link").symlink_to("link")),
]


@pytest.mark.parametrize(("path", "plant"), LINKS)
def test_no_link_is_followed_for_reading(root: Path, path: str, plant: Callable[[Path], None]) -> None:
    plant(root)
    with pytest.raises(InvalidRequest):
        files.read_beneath(root, path, 1000)


def test_no_link_is_followed_for_writing(root: Path, tmp_path: Path) -> None:
    (root / "out").symlink_to(tmp_path)
    (root / "file").symlink_to(tmp_path / "secret")

    with pytest.raises(InvalidRequest):
        files.write_beneath(root, "out/secret", b"overwritten")
    files.write_beneath(root, "file", b"new")

    assert (tmp_path / "secret").read_bytes() == b"SECRET"
    assert not (root / "file").is_symlink()
    assert (root / "file").read_bytes() == b"new"


def test_a_hard_link_is_replaced_and_its_other_name_keeps_its_content(root: Path) -> None:
    (root / "other").hardlink_to(root / "sub" / "f")
    files.write_beneath(root, "other", b"new")

    assert (root / "sub" / "f").read_bytes() == b"content"


def test_what_is_missing_is_not_found(root: Path) -> None:
    with pytest.raises(NotFound):
        files.read_beneath(root, "sub/none", 10)


def test_a_fifo_a_socket_and_a_directory_are_refused_without_waiting(root: Path) -> None:
    os.mkfifo(root / "fifo")
    for path in ("fifo", "sub"):
        with pytest.raises(InvalidRequest, match="not a regular file"):
            files.read_beneath(root, path, 10)


def test_a_file_larger_than_asked_for_is_refused(root: Path) -> None:
    with pytest.raises(RequestTooLarge, match="6 bytes"):
        files.read_beneath(root, "sub/f", 6)


def test_a_file_is_written_with_its_directories_and_mode_and_no_leftovers(root: Path) -> None:
    files.write_beneath(root, "new/deep/f", b"x", mode=0o640)

    assert (root / "new/deep/f").read_bytes() == b"x"
    assert stat.S_IMODE((root / "new/deep/f").stat().st_mode) == 0o640
    assert stat.S_IMODE((root / "new").stat().st_mode) == 0o700
    with pytest.raises(InvalidRequest):
        files.write_beneath(root, "sub", b"a directory is there")
    assert sorted(path.name for path in root.iterdir()) == ["new", "sub"]


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: cannot make files of other users")
def test_what_is_written_belongs_to_the_owner_of_the_root(root: Path) -> None:
    os.chown(root, 300_005, 300_005)
    files.write_beneath(root, "a/b", b"x")

    assert {(root / name).stat().st_uid for name in ("a", "a/b")} == {300_005}


def test_a_walk_tells_links_and_never_follows_them(root: Path, tmp_path: Path) -> None:
    (root / "away").symlink_to(tmp_path)
    (root / "round").symlink_to(".")
    os.mkfifo(root / "fifo")
    found = {entry.path: entry for entry in files.walk_beneath(root, max_entries=100)}

    assert {path: entry.kind for path, entry in found.items()} == {
        "away": "link",
        "fifo": "other",
        "round": "link",
        "sub": "directory",
        "sub/f": "file",
    }
    assert found["away"].target == str(tmp_path)
    assert found["sub/f"].size == 7


def test_a_walk_is_bounded_in_number_and_depth(root: Path) -> None:
    with pytest.raises(RequestTooLarge, match="more than 1 files"):
        list(files.walk_beneath(root, max_entries=1))
    with pytest.raises(RequestTooLarge, match="deeper than 1"):
        list(files.walk_beneath(root, max_entries=10, max_depth=1))


def test_removal_takes_links_and_leaves_what_they_point_to(root: Path, tmp_path: Path) -> None:
    (root / "away").symlink_to(tmp_path)
    (root / "sub" / "secret").symlink_to(tmp_path / "secret")
    closed = root / "closed"
    closed.mkdir()
    (closed / "f").write_text("x")
    closed.chmod(0)
    files.remove_tree(root)

    assert not root.exists()
    assert (tmp_path / "secret").read_bytes() == b"SECRET"


def test_removal_of_a_link_in_the_place_of_the_root_takes_the_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    files.remove_tree(tmp_path / "link")

    assert (root / "sub" / "f").exists()


def test_directories_nested_without_end_are_removed(root: Path) -> None:
    here = os.open(root, os.O_RDONLY)
    for _ in range(1500):  # deeper than any path name may be long
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    before = len(os.listdir("/proc/self/fd"))
    files.empty_tree(root)

    assert list(root.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before
