"""The table of security levels, and what is left of it without a strong sandbox."""

from __future__ import annotations

import itertools
from dataclasses import astuple
from pathlib import Path

import pytest

from claude_wrapper.sandbox import Level
from claude_wrapper.sandbox.security import (
    FETCH,
    POLICIES,
    SEARCH,
    SHELL,
    STRICTNESS,
    Egress,
    SecurityLevel,
    effective_policy,
    markdown,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "security-levels.md"
_OPENNESS = {Egress.NONE: 0, Egress.ALLOWLIST: 1, Egress.OPEN: 2}


def test_the_document_is_what_the_table_says() -> None:
    assert DOCUMENT.read_text() == markdown(), "run `make docs`"


def test_balanced_without_a_sandbox_has_no_shell_no_network_no_local_commands_and_says_why() -> None:
    policy = effective_policy(SecurityLevel.BALANCED, Level.NONE)

    assert not set(policy.tools) & {*SHELL, *FETCH, *SEARCH}
    assert policy.egress is Egress.NONE
    assert not policy.local_mcp
    assert "bypassPermissions" not in policy.permission_modes
    for subject in ("shell", "network", "local MCP", "bypassed"):
        assert any(subject in reason and "no sandbox" in reason for reason in policy.lowered)


def test_strict_without_a_sandbox_has_no_built_in_tools_at_all() -> None:
    assert effective_policy(SecurityLevel.STRICT, Level.NONE).tools == ()


def test_a_full_sandbox_gives_exactly_the_table() -> None:
    for level in SecurityLevel:
        assert effective_policy(level, Level.BWRAP) == POLICIES[level]


@pytest.mark.parametrize("sandbox", list(Level))
def test_a_stricter_level_never_allows_more(sandbox: Level) -> None:
    for stricter, looser in itertools.pairwise(sorted(SecurityLevel, key=STRICTNESS.__getitem__, reverse=True)):
        one, other = effective_policy(stricter, sandbox), effective_policy(looser, sandbox)
        assert set(one.tools) <= set(other.tools)
        assert set(one.permission_modes) <= set(other.permission_modes)
        assert _OPENNESS[one.egress] <= _OPENNESS[other.egress]
        assert one.local_mcp <= other.local_mcp
        for mine, theirs in zip(astuple(one.limits), astuple(other.limits), strict=True):
            assert theirs is None or (mine is not None and mine <= theirs)


def test_whatever_a_weaker_sandbox_takes_away_is_told() -> None:
    for level, sandbox in itertools.product(SecurityLevel, (Level.RESTRICTED, Level.NONE)):
        policy = effective_policy(level, sandbox)
        same = (policy.tools, policy.egress, policy.local_mcp) == (
            POLICIES[level].tools,
            POLICIES[level].egress,
            POLICIES[level].local_mcp,
        )
        assert same or policy.lowered
