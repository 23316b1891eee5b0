"""SIGKILL at every step of a save: what was current stays, or what became current is whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from snapshots_world import OURS, Bench, bench, tree, write

from claude_wrapper.storage import Database
from claude_wrapper.storage.blobs import open_blobs

pytestmark = [pytest.mark.anyio, pytest.mark.process]

STEPS = ("scan", "reading", "first pack", "list of files", "before the row", "in the transaction", "after the row")


@pytest.mark.parametrize("step", STEPS)
async def test_a_server_killed_at_any_step_of_a_save_leaves_a_whole_snapshot(
    step: str, sqlite_template: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.db").write_bytes(sqlite_template.read_bytes())
    db = Database(f"sqlite:///{tmp_path / 't.db'}")
    try:
        one: Bench = await bench(db, open_blobs(f"file://{tmp_path / 'blobs'}"), tmp_path)
        write(one.work, "file", b"before" * 1000)
        await one.save()
        before = tree(one.work)
        write(one.work, "file", b"after" * 2000)
        write(one.work, "new", b"x")
        after = tree(one.work)
        script = Path(__file__).with_name("killed_save.py")
        killed = subprocess.run([sys.executable, str(script), str(tmp_path), step], capture_output=True, text=True)
        assert killed.returncode == -9, killed.stderr
        back = await one.restore()
        assert back is not None
        assert not back.fell_back
        assert tree(back.work) == (after if step == "after the row" else before)
        # What the killed save left behind is collected, and the next save is not hindered by it.
        await one.save()
        one.clock.advance(7 * 3600)
        await one.store.collect(OURS)
        again = await one.restore("again")
        assert again is not None
        assert tree(again.work) == after
    finally:
        await db.close(grace=5)
