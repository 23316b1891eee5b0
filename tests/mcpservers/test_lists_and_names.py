"""What becomes of names and lists that servers send: pure."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions.agentspec import ALLOW, ASK, DENY, policy_of
from claude_wrapper.sessions.mcpservers import (
    MAX_LIST_BYTES,
    MAX_TOOLS,
    ToolRules,
    cli_names,
    cli_tool,
    offered,
    servers_of,
)
from claude_wrapper.sessions.requestedmcp import requested
from claude_wrapper.wire.extensions import RESERVED_MCP_NAMES, McpServer, parse_mcp_servers

SCHEMA = {"type": "object", "properties": {}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=12,
)
TOOLS = st.lists(
    JSON
    | st.fixed_dictionaries(
        {"name": st.text(max_size=90) | st.sampled_from(["a.b", "a_b", "Bash"]), "inputSchema": st.just(SCHEMA) | JSON},
        optional={"description": JSON, "annotations": JSON, "_meta": JSON},
    ),
    max_size=8,
)


@given(st.lists(st.text(min_size=1, max_size=80) | st.sampled_from([*RESERVED_MCP_NAMES, "a__b", "_a", "a_", "plain"])))
def test_a_servers_name_can_be_taken_out_of_the_name_of_its_tool(names: list[str]) -> None:
    told = cli_names(names)
    assert set(told) == set(names)
    assert len(set(told.values())) == len(set(names))
    for name in told.values():
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,48}", name)
        assert name not in RESERVED_MCP_NAMES
        for tool in ("x", "_x", "x__y"):
            assert f"mcp__{name}__{tool}".removeprefix("mcp__").partition("__") == (name, "__", tool)
    assert cli_names(["plain-name_1"]) == {"plain-name_1": "plain-name_1"}


@given(TOOLS)
def test_what_is_offered_can_be_given_to_a_model(tools: list[Any]) -> None:
    found = offered(tools, ToolRules())
    names = [cli_tool(tool["name"]) for tool in found.tools]
    assert len(names) == len(set(names))
    assert len(found.tools) + sum(found.dropped.values()) == len(tools)
    for tool in found.tools:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,72}", cli_tool(tool["name"]))
        assert tool["inputSchema"]["type"] == "object"
        assert tool.keys() <= {"name", "inputSchema", "title", "description", "annotations"}


def test_lists_that_lie_are_cut_and_the_reasons_counted() -> None:
    deep: Any = {"type": "object"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"x": deep}}
    tools = [
        {"name": "good", "inputSchema": SCHEMA, "description": "d" * 100_000},
        {"name": "good", "inputSchema": SCHEMA},
        {"name": "bad name", "inputSchema": SCHEMA},
        {"name": "deep", "inputSchema": deep},
        {"name": "string", "inputSchema": "object"},
        {"name": "required", "inputSchema": {"type": "object", "required": "x"}},
        {"name": "huge", "inputSchema": {"type": "object", "title": "x" * 100_000}},
        "nothing",
    ]
    found = offered(tools, ToolRules())
    assert [tool["name"] for tool in found.tools] == ["good"]
    assert len(found.tools[0]["description"]) < 10_000
    assert found.dropped == {"name_twice": 1, "bad_name": 1, "bad_schema": 3, "too_large": 1, "not_an_object": 1}
    many = offered([{"name": f"t{n}", "inputSchema": SCHEMA} for n in range(5_000)], ToolRules())
    assert (len(many.tools), many.dropped) == (MAX_TOOLS, {"too_many": 5_000 - MAX_TOOLS})
    wide = {"type": "object", "title": "x" * 60_000}
    large = offered([{"name": f"t{n}", "inputSchema": wide} for n in range(100)], ToolRules())
    assert len(json.dumps(large.tools)) < MAX_LIST_BYTES * 1.1
    assert offered({"tools": 1}, ToolRules()).tools == ()


def test_an_agents_policies_hold_under_the_names_that_the_cli_uses() -> None:
    configs = [
        {"name": "a.b", "enabled": True, "permission_policy": {"type": "always_allow"}, "cache_ttl_seconds": 60},
        {"name": "off", "enabled": False, "permission_policy": {"type": "always_allow"}},
    ]
    default = {"enabled": True, "permission_policy": {"type": "always_ask"}}
    agent = {
        "id": "agent_1",
        "mcp_servers": [{"type": "url", "name": "client", "url": "https://example.com/mcp"}],
        "tools": [{"type": "mcp_toolset", "mcp_server_name": "client", "default_config": default, "configs": configs}],
    }
    ((cli, spec),) = servers_of(agent, ["vlt_1"]).items()
    assert cli.startswith("client-"), "the server of the client's own tools is not taken"
    assert (spec.name, spec.vault_ids, dict(spec.rules.kept_seconds)) == ("client", ("vlt_1",), {"a.b": 60.0})
    assert [spec.rules.allows(tool) for tool in ("a.b", "a_b", "off", "new")] == [True, True, False, True]
    environments: list[tuple[dict[str, Any], bool]] = [
        ({"type": "cloud", "networking": {"type": "unrestricted"}}, False),
        ({"networking": {"type": "limited", "allowed_hosts": ["other.com"]}}, True),
        ({"networking": {"type": "limited", "allowed_hosts": ["example.com"]}}, False),
        ({"networking": {"type": "limited", "allowed_hosts": [], "allow_mcp_servers": True}}, False),
        ({"type": "self_hosted"}, False),
    ]
    for environment, barred in environments:
        assert servers_of(agent, [], environment)[cli].barred == barred
    decide = policy_of(agent)
    assert [decide(f"mcp__{cli}__{tool}", None) for tool in ("a_b", "off", "new")] == [ALLOW, DENY, ASK]
    assert decide("mcp__other__x", None) == DENY


def test_a_requests_servers_and_toolsets_say_which_tools_are_offered() -> None:
    servers = parse_mcp_servers(
        [
            {"type": "url", "name": "web", "url": "https://e.com/mcp", "authorization_token": "t"},
            {
                "type": "url",
                "name": "few",
                "url": "https://f.com/mcp",
                "tool_configuration": {"allowed_tools": ["a", "b"], "cache_ttl_seconds": {"a": 5}},
            },
            {"type": "url", "name": "off", "url": "https://o.com/mcp", "tool_configuration": {"enabled": False}},
            {"type": "stdio", "name": "here", "command": "x", "tool_configuration": {"allowed_tools": ["a"]}},
        ]
    )
    tools = [
        {
            "type": "mcp_toolset",
            "mcp_server_name": "web",
            "default_config": {"enabled": False},
            "configs": {"x": {"enabled": True, "cache_ttl_seconds": 9}},
        },
        {"type": "mcp_toolset", "mcp_server_name": "few", "configs": {"b": {"enabled": False}}},
    ]
    made = requested(servers, tools)
    assert set(made.remote) == {"web", "few"}
    web, few = made.remote["web"].rules, made.remote["few"].rules
    assert [web.allows(tool) for tool in ("x", "y")] == [True, False]
    assert [few.allows(tool) for tool in ("a", "b", "c")] == [True, False, False]
    assert (dict(web.kept_seconds), dict(few.kept_seconds)) == ({"x": 9}, {"a": 5.0})
    assert made.remote["web"].headers == {"Authorization": "Bearer t"}
    assert made.local == {"here": {"type": "stdio", "command": "x", "args": [], "env": {}}}
    assert not made.local_rules["here"].allows("b")


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({"mcp_server_name": "none"}, "tools[0].mcp_server_name"),
        ({"mcp_server_name": "web", "configs": []}, "tools[0].configs"),
        ({"mcp_server_name": "web", "configs": [1]}, "tools[0].configs"),
        ({"mcp_server_name": "web", "default_config": {"enabled": "no"}}, "tools[0].default_config.enabled"),
        ({"mcp_server_name": "web", "configs": {"x": {"cache_ttl_seconds": -1}}}, "tools[0].configs.x.cache_ttl_seconds"),
    ],
)  # fmt: skip
def test_a_bad_toolset_names_its_field(entry: dict[str, Any], field: str) -> None:
    servers = (McpServer("web", "http", url="https://e.com/mcp"),)
    if entry.get("configs") == []:
        assert requested(servers, [{"type": "mcp_toolset", **entry}]).remote  # none: as if it were left out
        return
    with pytest.raises(InvalidRequest) as refused:
        requested(servers, [{"type": "mcp_toolset", **entry}])
    assert refused.value.field == field
