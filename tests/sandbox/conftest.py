"""Directories that another uid may pass through, which pytest's own tmp_path (0700) is not."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from claude_wrapper.sandbox import directories


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="cw-sandbox-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="session")
def open_cli(real_cli: Path) -> Path:
    closed = directories.unreachable(real_cli, 300_001)
    if closed is not None:
        pytest.skip(f"{closed} is closed to other users, so the CLI cannot be shown to a tenant's uid")
    return real_cli
