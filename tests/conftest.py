"""Fixtures that every test may use."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ("databases",)


@pytest.fixture
def anyio_backend() -> str:
    """The server runs on asyncio; so do its tests."""
    return "asyncio"


@pytest.fixture(scope="session")
def real_cli() -> Path:
    """The Claude CLI binary that the `claude-agent-sdk` wheel brings."""
    located = importlib.metadata.distribution("claude-agent-sdk").locate_file("claude_agent_sdk/_bundled/claude")
    return Path(str(located))


@pytest.fixture
def reachable_tmp_path() -> Iterator[Path]:
    """A temporary directory that processes with their own uid can pass through (pytest's own is closed to them)."""
    with tempfile.TemporaryDirectory(prefix="cw-test-") as name:
        path = Path(name)
        path.chmod(0o711)
        yield path
