"""Environments through the official SDK."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic
from resources_world import KEYS, World

from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.sessions.resources.environments import environment_for_session

pytestmark = pytest.mark.anyio

NO_PACKAGES = {"type": "packages", **{name: [] for name in ("apt", "cargo", "gem", "go", "npm", "pip")}}


async def test_a_new_environment_is_written_out_in_full(client: AsyncAnthropic) -> None:
    made = await client.beta.environments.create(name="E")
    assert made.config.model_dump() == {
        "type": "cloud",
        "networking": {"type": "unrestricted"},
        "packages": NO_PACKAGES,
    }
    assert (made.type, made.scope, made.description, made.archived_at) == ("environment", "organization", None, None)
    assert (await client.beta.environments.retrieve(made.id)).model_dump() == made.model_dump()


async def test_what_an_update_omits_stays(client: AsyncAnthropic) -> None:
    made = await client.beta.environments.create(
        name="E",
        description="d",
        config={
            "type": "cloud",
            "networking": {"type": "limited", "allowed_hosts": ["API.example.com"], "allow_package_managers": True},
            "packages": {"pip": ["ruff==0.1"]},
        },
        metadata={"a": "1", "b": "2"},
    )
    changed = await client.beta.environments.update(
        made.id,
        config={"type": "cloud", "networking": {"type": "limited", "allow_mcp_servers": True}},
        metadata={"a": ""},
    )
    assert changed.config.networking.model_dump() == {
        "type": "limited",
        "allowed_hosts": ["api.example.com"],
        "allow_mcp_servers": True,
        "allow_package_managers": True,
    }
    assert changed.config.packages.pip == ["ruff==0.1"]
    assert (changed.metadata, changed.description, changed.name) == ({"b": "2"}, "d", "E")
    assert (await client.beta.environments.update(made.id, description=None)).description is None


async def test_the_type_cannot_change(client: AsyncAnthropic) -> None:
    made = await client.beta.environments.create(name="E", config={"type": "self_hosted"})
    assert made.config.model_dump() == {"type": "self_hosted"}
    with pytest.raises(anthropic.BadRequestError) as caught:
        await client.beta.environments.update(made.id, config={"type": "cloud"})
    assert caught.value.body["error"]["details"] == {"error_code": "invalid_config_type_change"}


async def test_an_archived_environment_cannot_be_changed_or_used(world: World, client: AsyncAnthropic) -> None:
    made = await client.beta.environments.create(name="E")
    async with world.means.db.read() as tx:
        assert (await environment_for_session(tx, KEYS["acme"], made.id)).name == "E"
    await client.beta.environments.archive(made.id)
    with pytest.raises(anthropic.BadRequestError) as caught:
        await client.beta.environments.update(made.id, name="F")
    assert caught.value.body["error"]["details"] == {"error_code": "environment_archived"}
    async with world.means.db.read() as tx:
        with pytest.raises(InvalidRequest, match="archived"):
            await environment_for_session(tx, KEYS["acme"], made.id)
        with pytest.raises(NotFound):
            await environment_for_session(tx, KEYS["rival"], made.id)
    assert [one.id async for one in client.beta.environments.list()] == []
    assert [one.id async for one in client.beta.environments.list(include_archived=True)] == [made.id]


async def test_a_deleted_environment_is_gone(client: AsyncAnthropic) -> None:
    made = await client.beta.environments.create(name="E")
    gone = await client.beta.environments.delete(made.id)
    assert (gone.id, gone.type) == (made.id, "environment_deleted")
    for call in (client.beta.environments.retrieve, client.beta.environments.delete, client.beta.environments.archive):
        with pytest.raises(anthropic.NotFoundError) as caught:
            await call(made.id)
        assert caught.value.body["error"]["details"] == {"error_code": "environment_not_found"}


def cloud(**config: Any) -> dict[str, Any]:
    return {"config": {"type": "cloud", **config}}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": " "}, "name"),
    ({"config": {"type": "moon"}}, "config.type"),
    ({"config": {"type": "self_hosted", "packages": {}}}, "config.packages"),
    (cloud(networking={"type": "open"}), "config.networking.type"),
    (cloud(networking={"type": "limited", "allowed_hosts": ["https://a.com"]}), "config.networking.allowed_hosts[0]"),
    (cloud(networking={"type": "limited", "allowed_hosts": ["a.com:80"]}), "config.networking.allowed_hosts[0]"),
    (cloud(networking={"type": "limited", "allowed_hosts": "a.com"}), "config.networking.allowed_hosts"),
    (
        cloud(networking={"type": "limited"}, packages={"pip": ["ruff"]}),
        "config.networking.allow_package_managers",
    ),
    (cloud(packages={"pip": ["--index-url=http://evil"]}), "config.packages.pip[0]"),
    (cloud(packages={"apt": ["a; rm -rf /"]}), "config.packages.apt[0]"),
    (cloud(packages={"apt": ["$(x)"]}), "config.packages.apt[0]"),
    (cloud(packages={"brew": ["x"]}), "config.packages.brew"),
    ({"scope": "account"}, "scope"),
    ({"metadata": {"a": 5}}, "metadata.a"),
]


async def test_bad_fields_are_refused_by_their_path(client: AsyncAnthropic) -> None:
    for change, field in BAD:
        with pytest.raises(anthropic.BadRequestError) as caught:
            await client.post("/v1/environments", body={"name": "E"} | change, cast_to=object)
        assert caught.value.body["error"]["param"] == field, change
