"""Fixtures of the resources' tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from anthropic import AsyncAnthropic
from resources_world import World, resources_world

from claude_wrapper.storage import Database


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """A server with the routes of resources, on SQLite and on Postgres."""
    async with resources_world(database, tmp_path) as one:
        yield one


@pytest.fixture
def client(world: World) -> AsyncAnthropic:
    """The official SDK of a developer of the first organisation."""
    return world.client()
