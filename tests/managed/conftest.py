"""Fixtures of the tests of sessions: a real server, the official SDK, an agent and an environment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from anthropic import AsyncAnthropic

from running_server import KEY, Running, running


@pytest.fixture
async def server(reachable_tmp_path: Path) -> AsyncIterator[Running]:
    """A server without a sandbox, so that built-in tools run anywhere."""
    async with running(reachable_tmp_path, sandbox="none", security_level="permissive") as one:
        yield one


@pytest.fixture
async def client(server: Running) -> AsyncIterator[AsyncAnthropic]:
    """The official SDK, pointed at it."""
    async with AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0) as one:
        yield one
