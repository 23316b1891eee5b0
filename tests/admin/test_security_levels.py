"""An organisation's own security level: set by its admin within the operator's bound, and felt by its agents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from admin_world import Admin, Reply
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import ConfigurationError, InvalidRequest
from claude_wrapper.sandbox.port import Level
from claude_wrapper.sandbox.security import STRICTNESS, SecurityLevel, SecurityLevels
from running_server import running

levels = st.sampled_from(SecurityLevel)


@given(default=levels, loosest=levels, asked=st.one_of(st.none(), levels.map(str), st.text(), st.integers()))
def test_no_organisation_is_ever_looser_than_the_bound(
    default: SecurityLevel, loosest: SecurityLevel, asked: object
) -> None:
    if STRICTNESS[loosest] > STRICTNESS[default]:
        with pytest.raises(ConfigurationError, match="SECURITY_LOOSEST"):
            SecurityLevels(Level.BWRAP, default, loosest)
        return
    bounds = SecurityLevels(Level.BWRAP, default, loosest)
    found = bounds.level_of(asked)
    assert STRICTNESS[found] >= STRICTNESS[loosest]
    if asked is None:
        assert found is default
    elif asked in list(SecurityLevel):
        assert STRICTNESS[found] == max(STRICTNESS[SecurityLevel(str(asked))], STRICTNESS[loosest])
    else:
        assert found is SecurityLevel.STRICT, "what is no level must not open anything"
    if isinstance(asked, str):
        if asked in bounds.allowed:
            assert bounds.require(asked) is found
        else:
            with pytest.raises(InvalidRequest, match="security_level"):
                bounds.require(asked)


async def turn(admin: Admin, key: str, tool: str, **arguments: Any) -> Reply:
    text = f"[[tool {tool} {json.dumps(arguments)}]] [[then]]"
    message = {"role": "user", "content": text}
    body = {"model": "claude-sonnet-5-5", "max_tokens": 1000, "messages": [message], "agent": {"tools": [tool]}}
    return await admin.call("POST", "/v1/messages", body, key=key)


@pytest.mark.anyio
async def test_a_level_beyond_the_bound_and_a_wrong_list_of_hosts_are_refused_by_name(admin: Admin) -> None:
    us = f"/{admin.ours}"
    for level in ("permissive", "loose", ""):
        refused = await admin.post(us, {"settings": {"security_level": level}})
        assert (refused.status, refused.error) == (
            400, "security_level: must be one of strict, balanced (the operator's bound)",
        )  # fmt: skip
    refused = await admin.post(us, {"settings": {"egress_hosts": ["a.example", "https://b.example/"]}})
    assert refused.status == 400
    assert refused.error.startswith("egress_hosts[1]: ")
    assert (await admin.post(us, {"settings": {"egress_hosts": "a.example"}})).status == 400
    assert (await admin.get(us)).body["settings"] == {}, "nothing half done"
    viewer = await admin.key("viewer")
    assert (await admin.post(us, {"settings": {"security_level": "strict"}}, key=viewer)).status == 403


@pytest.mark.anyio
@pytest.mark.real_cli
async def test_each_organisation_s_agents_live_at_its_own_level(reachable_tmp_path: Path) -> None:
    settings = {"spares": 0, "agent_spares": 0, "security_loosest": "permissive"}
    async with running(reachable_tmp_path, upstream_private=True, **settings) as server:
        if server.server.sandbox_level == "none":
            pytest.skip("without a sandbox the balanced level has no shell")
        admin = await Admin.made(server)
        assert (await admin.post(f"/{admin.ours}", {"settings": {"security_level": "strict"}})).status == 200
        loose = {"settings": {"security_level": "permissive"}}
        assert (await admin.post(f"/{admin.theirs}", loose, key=admin.their_owner)).status == 200
        for key in (admin.owner, admin.their_owner):
            body = {"name": "own", "kind": "custom", "secret": {"api_key": "sk-ant-own-0123456789abcdef"}}
            made = await admin.post("/credentials", body | {"base_url": server.upstream.url}, key=key)
            assert made.status == 200, made.body

        refused = await turn(admin, admin.owner, "Bash", command="true")
        assert (refused.status, refused.body["error"]["type"]) == (403, "permission_error")
        assert "strict" in refused.error
        wrote = await turn(admin, admin.owner, "Write", file_path="/work/a.txt", content="a")
        assert wrote.status == 200, wrote.body
        theirs = await turn(admin, admin.their_owner, "Bash", command="ulimit -f")
        assert theirs.status == 200, theirs.body
        assert str(2**30 // 1024) in theirs.body["content"][0]["text"], "the level's own largest file, not the server's"

        mine = await admin.call("GET", "/v1/security", key=admin.owner)
        assert mine.body["security_level"] == "strict"
        assert mine.body["server_security_level"] == "balanced"
        assert mine.body["security_levels"] == ["strict", "balanced", "permissive"]
        assert mine.body["allowed"]["egress"] == "none"
