"""Agents through the official SDK: definitions, versions, refusals."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

pytestmark = pytest.mark.anyio

MODEL = "claude-sonnet-5-5"
SERVER = {"type": "url", "name": "docs", "url": "https://mcp.example.com/mcp"}
CUSTOM = {"type": "custom", "name": "lookup", "description": "d", "input_schema": {"type": "object", "properties": {}}}


async def test_a_new_agent_is_written_out_in_full(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(
        model=MODEL,
        name="Helper",
        system="Be kind.",
        tools=[
            {
                "type": "agent_toolset_20260401",
                "configs": [{"name": "bash", "permission_policy": {"type": "always_ask"}}],
            },
            {"type": "mcp_toolset", "mcp_server_name": "docs", "configs": [{"name": "search", "enabled": False}]},
            CUSTOM,
        ],
        mcp_servers=[SERVER],
        metadata={"team": "a"},
    )
    assert agent.id.startswith("agent_")
    assert (agent.version, agent.type, agent.archived_at, agent.description) == (1, "agent", None, None)
    assert agent.model.model_dump(exclude_none=True) == {
        "id": MODEL,
        "effort": {"type": "high"},
        "speed": "standard",
    }
    built_in, mcp, custom = (tool.model_dump() for tool in agent.tools)
    assert built_in["default_config"] == {"enabled": True, "permission_policy": {"type": "always_allow"}}
    assert built_in["configs"][0] | {"name": "bash"} == {
        "type": "bash",
        "name": "bash",
        "enabled": True,
        "permission_policy": {"type": "always_ask"},
    }
    assert mcp["default_config"] == {"enabled": True, "permission_policy": {"type": "always_ask"}}
    assert mcp["configs"] == [{"name": "search", "enabled": False, "permission_policy": {"type": "always_ask"}}]
    assert custom["name"] == "lookup"
    assert agent.execution_identity.type == "service_account"
    assert agent.metadata == {"team": "a"}
    assert (await client.beta.agents.retrieve(agent.id)).model_dump() == agent.model_dump()


async def test_an_update_replaces_what_was_sent_and_makes_a_version(client: AsyncAnthropic) -> None:
    first = await client.beta.agents.create(model=MODEL, name="A", system="s", metadata={"a": "1", "b": "2"})
    second = await client.beta.agents.update(
        first.id, version=1, system=None, description="new", metadata={"a": None, "c": "3"}, tools=[CUSTOM]
    )
    assert (second.version, second.system, second.description, second.name) == (2, None, "new", "A")
    assert second.metadata == {"b": "2", "c": "3"}
    assert second.updated_at > first.updated_at
    assert second.created_at == first.created_at
    old = await client.beta.agents.retrieve(first.id, version=1)
    assert (old.version, old.system, old.metadata, old.tools) == (1, "s", {"a": "1", "b": "2"}, [])
    versions = [one.version async for one in client.beta.agents.versions.list(first.id, limit=1)]
    assert versions == [2, 1]


async def test_an_update_that_changes_nothing_makes_no_version(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(model={"id": MODEL, "effort": "low"}, name="A")
    same = await client.beta.agents.update(agent.id, name="A", model={"id": MODEL, "effort": {"type": "low"}})
    assert same.version == 1


async def test_a_stale_version_is_a_conflict_that_the_sdk_does_not_retry(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(model=MODEL, name="A")
    await client.beta.agents.update(agent.id, name="B")
    with pytest.raises(anthropic.ConflictError) as caught:
        await client.beta.agents.update(agent.id, name="C", version=1)
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert (await client.beta.agents.retrieve(agent.id)).name == "B"


async def test_an_archived_agent_is_hidden_and_cannot_be_changed(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(model=MODEL, name="A")
    archived = await client.beta.agents.archive(agent.id)
    assert archived.archived_at is not None
    assert (await client.beta.agents.archive(agent.id)).archived_at == archived.archived_at
    with pytest.raises(anthropic.ConflictError):
        await client.beta.agents.update(agent.id, name="B")
    assert [one.id async for one in client.beta.agents.list()] == []
    assert [one.id async for one in client.beta.agents.list(include_archived=True)] == [agent.id]


async def test_pages_are_followed_by_the_sdk_newest_first(client: AsyncAnthropic) -> None:
    made = [(await client.beta.agents.create(model=MODEL, name=f"A{number}")) for number in range(5)]
    first = await client.beta.agents.list(limit=2)
    assert first.next_page.startswith("page_")
    assert [one.name async for one in first] == ["A4", "A3", "A2", "A1", "A0"]
    later = client.beta.agents.list(created_at_gte=made[3].created_at)
    assert [one.name async for one in later] == ["A4", "A3"]
    earlier = client.beta.agents.list(created_at_lte=made[1].created_at)
    assert [one.name async for one in earlier] == ["A1", "A0"]


async def test_a_roster_names_the_versions_that_it_means_now(client: AsyncAnthropic) -> None:
    other = await client.beta.agents.create(model=MODEL, name="Other")
    await client.beta.agents.update(other.id, name="Other 2")
    agent = await client.beta.agents.create(
        model=MODEL,
        name="Lead",
        multiagent={
            "type": "coordinator",
            "agents": [
                other.id,
                {"type": "agent", "id": other.id, "version": 1},
                {"type": "self"},
                {"type": "advisor", "model": "claude-opus-5-5"},
            ],
        },
    )
    assert agent.multiagent.model_dump()["agents"] == [
        {"type": "agent", "id": other.id, "version": 2},
        {"type": "agent", "id": other.id, "version": 1},
        {"type": "agent", "id": agent.id, "version": 1},
        {"type": "advisor", "model": "claude-opus-5-5"},
    ]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": None}, "name"),
    ({"name": ""}, "name"),
    ({"name": 5}, "name"),
    ({"name": "a\nb"}, "name"),
    ({"model": None}, "model"),
    ({"model": "no spaces please"}, "model"),
    ({"model": {"id": MODEL, "effort": "huge"}}, "model.effort"),
    ({"model": {"id": MODEL, "temperature": 1}}, "model.temperature"),
    ({"system": "x" * 100_001}, "system"),
    ({"system": "a\0b"}, "system"),
    ({"metadata": {"k": 1}}, "metadata.k"),
    ({"metadata": {f"k{number}": "v" for number in range(17)}}, "metadata"),
    ({"metadata": {"k" * 65: "v"}}, "metadata." + "k" * 64),
    ({"tools": {"type": "custom"}}, "tools"),
    ({"tools": [{"type": "nonsense"}]}, "tools[0].type"),
    ({"tools": [CUSTOM, CUSTOM]}, "tools[1].name"),
    ({"tools": [{"type": "agent_toolset_20260401"}, {**CUSTOM, "name": "bash"}]}, "tools[1].name"),
    ({"tools": [{**CUSTOM, "name": "with space"}]}, "tools[0].name"),
    ({"tools": [{**CUSTOM, "input_schema": {"type": "array"}}]}, "tools[0].input_schema.type"),
    ({"tools": [{**CUSTOM, "name": f"t{number}"} for number in range(257)]}, "tools"),
    (
        {"tools": [{"type": "agent_toolset_20260401"}, *({**CUSTOM, "name": f"t{number}"} for number in range(250))]},
        "tools",
    ),
    ({"tools": [{"type": "agent_toolset_20260401", "configs": [{"name": "rm"}]}]}, "tools[0].configs[0].name"),
    (
        {"tools": [{"type": "agent_toolset_20260401", "default_config": {"permission_policy": {"type": "maybe"}}}]},
        "tools[0].default_config.permission_policy.type",
    ),
    (
        {
            "tools": [
                {
                    "type": "agent_toolset_20260401",
                    "configs": [{"name": "web_fetch", "allowed_domains": ["a.com"], "blocked_domains": ["b.com"]}],
                }
            ]
        },
        "tools[0].configs[0].blocked_domains",
    ),
    (
        {"tools": [{"type": "agent_toolset_20260401", "configs": [{"name": "web_fetch", "allowed_domains": []}]}]},
        "tools[0].configs[0].allowed_domains",
    ),
    ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "nobody"}]}, "tools[0].mcp_server_name"),
    ({"mcp_servers": [SERVER]}, "mcp_servers[0].name"),
    ({"mcp_servers": [{**SERVER, "url": "ftp://x"}]}, "mcp_servers[0].url"),
    ({"mcp_servers": [{**SERVER, "url": "https://user:pass@host/"}]}, "mcp_servers[0].url"),
    ({"mcp_servers": [SERVER, SERVER]}, "mcp_servers[1].name"),
    ({"skills": [{"type": "custom", "skill_id": "skill_nowhere"}]}, "skills[0]"),
    ({"skills": [{"type": "custom", "skill_id": "../x"}]}, "skills[0].skill_id"),
    ({"multiagent": {"type": "coordinator", "agents": []}}, "multiagent.agents"),
    ({"multiagent": {"type": "coordinator", "agents": ["agent_nowhere"]}}, "multiagent.agents[0]"),
    ({"execution_identity": {"type": "aws_role", "role_arn": "arn"}}, "execution_identity.type"),
    ({"surprise": 1}, "surprise"),
]


async def test_bad_fields_are_refused_by_their_path_and_nothing_is_kept(client: AsyncAnthropic) -> None:
    for change, field in BAD:
        with pytest.raises(anthropic.BadRequestError) as caught:
            await client.post("/v1/agents", body={"model": MODEL, "name": "A"} | change, cast_to=object)
        assert caught.value.body["error"]["param"] == field, change
    assert [one.id async for one in client.beta.agents.list(include_archived=True)] == []


async def test_what_must_stay_cannot_be_cleared(client: AsyncAnthropic) -> None:
    agent = await client.beta.agents.create(model=MODEL, name="A")
    for name in ("name", "model"):
        with pytest.raises(anthropic.BadRequestError, match="cannot be cleared"):
            await client.post(f"/v1/agents/{agent.id}", body={name: None}, cast_to=object)
    with pytest.raises(anthropic.BadRequestError, match="version"):
        await client.beta.agents.update(agent.id, version=0)


async def test_removing_a_toolset_without_its_server_is_refused(client: AsyncAnthropic) -> None:
    toolset = {"type": "mcp_toolset", "mcp_server_name": "docs"}
    agent = await client.beta.agents.create(model=MODEL, name="A", mcp_servers=[SERVER], tools=[toolset])
    with pytest.raises(anthropic.BadRequestError, match="no mcp_toolset"):
        await client.beta.agents.update(agent.id, tools=[])
    changed = await client.beta.agents.update(agent.id, tools=None, mcp_servers=None)
    assert (changed.tools, changed.mcp_servers) == ([], [])
