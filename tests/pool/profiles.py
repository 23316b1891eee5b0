"""Launch profiles for tests: to the pool they are hashable values with a name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedProfile:
    name: str


CHAT = NamedProfile("chat")
AGENT = NamedProfile("agent")
