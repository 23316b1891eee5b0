"""The vault tests' world: two organisations, a master key, and doubles of what is outside."""

from __future__ import annotations

import pytest
from vault_doubles import Vault

from tenants import World, hand_clock, world

__all__ = ["hand_clock", "world"]


@pytest.fixture
async def vault(world: World) -> Vault:
    return Vault(world)
