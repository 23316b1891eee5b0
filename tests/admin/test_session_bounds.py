"""What a key may not get by way of a session that it may not get without one."""

from __future__ import annotations

from typing import Any

import pytest
from admin_world import Admin
from anthropic import AsyncAnthropic

pytestmark = pytest.mark.anyio

MODEL = "claude-sonnet-5-5"
SAID = {"type": "user.message", "content": [{"type": "text", "text": "[[say hi]]"}]}


async def _parts(admin: Admin, key: str) -> dict[str, Any]:
    agent = await admin.post("/v1/agents", {"model": MODEL, "name": "x"}, key=key)
    environment = await admin.post("/v1/environments", {"name": "x", "config": {"type": "self_hosted"}}, key=key)
    assert (agent.status, environment.status) == (200, 200), (agent.body, environment.body)
    return {"agent": agent.body["id"], "environment_id": environment.body["id"]}


async def test_a_session_names_no_skill_that_its_maker_does_not_see(admin: Admin) -> None:
    async with AsyncAnthropic(base_url=admin.server.url, api_key=admin.owner, max_retries=0) as client:
        skill = await client.beta.skills.create(
            files=[("secret/SKILL.md", b"---\nname: secret\ndescription: How.\n---\nElsewhere.\n")]
        )
    workspace = (await admin.post("/workspaces", {"name": "confined"})).body["id"]
    confined = await admin.key("developer", workspace_id=workspace)
    parts = await _parts(admin, confined)
    wanted = {"type": "custom", "skill_id": skill.id, "version": str(skill.latest_version_id)}
    named = {"type": "agent_with_overrides", "id": parts["agent"], "skills": [wanted]}
    refused = await admin.post("/v1/sessions", {**parts, "agent": named}, key=confined)
    assert refused.status == 400, refused.body
    assert "agent.skills[0]" in refused.error
    named["id"] = (await _parts(admin, admin.owner))["agent"]
    made = await admin.post("/v1/sessions", {**await _parts(admin, admin.owner), "agent": named})
    assert made.status == 200, made.body


async def test_a_keys_models_hold_for_sessions_too(admin: Admin) -> None:
    parts = await _parts(admin, admin.owner)
    session = (await admin.post("/v1/sessions", parts)).body["id"]
    narrow = await admin.key("developer", allowed_models=["claude-haiku-*"])
    refused = await admin.post("/v1/sessions", parts, key=narrow)
    assert (refused.status, MODEL in refused.error) == (403, True), refused.body
    refused = await admin.post(f"/v1/sessions/{session}/events", {"events": [SAID]}, key=narrow)
    assert (refused.status, MODEL in refused.error) == (403, True), refused.body
    stopped = await admin.post(f"/v1/sessions/{session}/events", {"events": [{"type": "user.interrupt"}]}, key=narrow)
    assert stopped.status == 200, stopped.body


async def test_first_events_of_a_session_and_probes_count_as_requests(admin: Admin) -> None:
    limited = await admin.key("developer", limits={"requests_per_minute": 1})
    parts = await _parts(admin, limited)
    new = {**parts, "initial_events": [SAID]}
    answers = [(await admin.post("/v1/sessions", new, key=limited)).status for _ in range(2)]
    assert answers == [200, 429]
    probed = await admin.post("/v1/mcp/probe", {"url": "https://127.0.0.1/mcp"}, key=limited)
    assert probed.status == 429, probed.body
    assert (await admin.post("/v1/sessions", parts, key=limited)).status == 200
