"""Fixtures of the API's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from running_server import Running, running


@pytest.fixture
async def server(reachable_tmp_path: Path) -> AsyncIterator[Running]:
    """A server with default settings, for one test."""
    async with running(reachable_tmp_path) as one:
        yield one
