"""A CLI that was taken over, and a server that is killed: nothing reaches another tenant, nothing is left."""

from __future__ import annotations

import pytest

from claude_wrapper.sandbox import probe
from claude_wrapper.testing.attack.served import served_checks

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


async def test_forged_output_and_a_killed_server_harm_nobody_else() -> None:
    checks = await served_checks(probe(), ("usage", "permission", "deep", "line", "log"))

    assert len(checks) == 7
    assert [check for check in checks if not check.held] == []
