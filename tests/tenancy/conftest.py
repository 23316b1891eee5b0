"""The tenancy tests' world."""

from __future__ import annotations

from tenants import hand_clock, world

__all__ = ["hand_clock", "world"]
