"""The Admin API's tests: one server per module, without processes until one is asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from admin_world import Admin

from running_server import running


@pytest.fixture
async def admin(reachable_tmp_path: Path) -> AsyncIterator[Admin]:
    """A server without spares, two organisations with an owner's key each, and the operator."""
    async with running(reachable_tmp_path, spares=0, upstream_private=True) as server:
        yield await Admin.made(server)
