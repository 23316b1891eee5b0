"""Who may see and do what: other organisations, workspaces, roles; and what every route refuses alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import pytest
from anthropic import AsyncAnthropic
from resources_world import World

from claude_wrapper.api.managed.openapi_resources import describe_resources
from claude_wrapper.api.managed.resources import RESOURCE_ROUTES
from running_server import KEY, running

pytestmark = pytest.mark.anyio

MODEL = "claude-sonnet-5-5"
SKILL = [("s/SKILL.md", b"---\nname: s\ndescription: d\n---\n")]
WORK = "/v1/environments/{environment_id}/work"
"""The routes of workers take credentials of their own: tests/admin/test_worker_scope.py and test_isolation.py ask them."""
EVERY = sorted((method, route.path) for route in RESOURCE_ROUTES for method in (route.methods or set()) - {"HEAD"})
ROUTES = [(method, path) for method, path in EVERY if not path.startswith(WORK)]


async def one_of_each(client: AsyncAnthropic) -> dict[str, str]:
    """An id for every parameter of the routes."""
    skill = await client.beta.skills.create(files=SKILL)
    store = (await client.beta.memory_stores.create(name="M")).id
    memory = await client.beta.memory_stores.memories.create(store, path="/a", content="x")
    vault = (await client.beta.vaults.create(display_name="V")).id
    auth = {"type": "static_bearer", "token": "t", "mcp_server_url": "https://a.example.com"}
    return {
        "agent_id": (await client.beta.agents.create(model=MODEL, name="A")).id,
        "environment_id": (await client.beta.environments.create(name="E")).id,
        "file_id": (await client.beta.files.upload(file=("f", b"x"))).id,
        "vault_id": vault,
        "credential_id": (await client.beta.vaults.credentials.create(vault, auth=auth)).id,
        "skill_id": skill.id,
        "version": skill.latest_version_id,
        "store_id": store,
        "memory_id": memory.id,
        "version_id": memory.memory_version_id,
    }


BODIES = {
    "/v1/vaults/{vault_id}/credentials": b'{"auth": {"type": "static_bearer", "token": "t", "mcp_server_url": "https://c.d"}}',
    "/v1/memory_stores/{store_id}/memories": b'{"path": "/b", "content": "x"}',
}
UPLOAD = ("POST", "/v1/skills/{skill_id}/versions")  # its body is looked at first, and is not multipart here


async def answers(
    world: World, key: str, ids: dict[str, Any], *, methods: str = "DELETE GET POST"
) -> dict[tuple[str, str], int]:
    """The status of every route with a parameter."""
    statuses = {}
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    async with aiohttp.ClientSession(world.url, headers=headers) as http:
        for method, path in ROUTES:
            if "{" in path and method in methods.split():
                body = BODIES.get(path, b"{}") if method == "POST" else b""
                async with http.request(method, path.format(**ids), data=body) as answer:
                    statuses[method, path] = answer.status
                    await answer.read()
    return statuses


async def test_every_route_answers_404_to_another_organisation_and_a_foreign_workspace(world: World) -> None:
    ids = await one_of_each(world.client("acme"))
    for key in ("rival", "acme-workspace"):
        found = await answers(world, key, ids)
        assert {route: status for route, status in found.items() if status != 404} == {UPLOAD: 400}
    rival = world.client("rival")
    with pytest.raises(anthropic.NotFoundError):
        await rival.beta.skills.versions.create(ids["skill_id"], files=SKILL)
    for page in (rival.beta.agents, rival.beta.environments, rival.beta.files, rival.beta.vaults, rival.beta.skills):
        assert [one.id async for one in page.list()] == []
    assert (await rival.beta.files.list(ids=[ids["file_id"]])).data == []
    # Nothing of it was touched.
    mine = world.client("acme")
    assert (await mine.beta.agents.retrieve(ids["agent_id"])).version == 1
    assert (
        await mine.beta.vaults.credentials.retrieve(ids["credential_id"], vault_id=ids["vault_id"])
    ).archived_at is None
    assert await (await mine.beta.files.download(ids["file_id"])).read() == b"x"


async def test_a_child_is_not_found_under_another_parent(world: World) -> None:
    client = world.client()
    ids, others = await one_of_each(client), await one_of_each(client)
    for name, calls in {
        "credential_id": "/v1/vaults/{vault_id}/credentials/{credential_id}",
        "version": "/v1/skills/{skill_id}/versions/{version}",
        "memory_id": "/v1/memory_stores/{store_id}/memories/{memory_id}",
        "version_id": "/v1/memory_stores/{store_id}/memory_versions/{version_id}",
    }.items():
        with pytest.raises(anthropic.NotFoundError):
            await client.get(calls.format(**(ids | {name: others[name]})), cast_to=object)


async def test_a_workspace_sees_its_own_and_the_organisation_sees_all(world: World) -> None:
    inside, whole = world.client("acme-workspace"), world.client("acme")
    ids = await one_of_each(inside)
    assert set((await answers(world, "acme", ids, methods="GET")).values()) == {200}
    # Made by a key of the organisation in a workspace's vault: it belongs to the workspace.
    vault = await inside.beta.vaults.create(display_name="W")
    auth = {"type": "static_bearer", "token": "t", "mcp_server_url": "https://b.example.com"}
    made = await whole.beta.vaults.credentials.create(vault.id, auth=auth)
    changed = await inside.beta.vaults.credentials.update(
        made.id, vault_id=vault.id, auth={"type": "static_bearer", "token": "u"}
    )
    assert changed.id == made.id
    assert (await whole.beta.vaults.delete(vault.id)).id == vault.id


async def test_roles_are_kept(world: World) -> None:
    ids = await one_of_each(world.client("acme"))
    viewer = await answers(world, "acme-viewer", ids)
    validate = "/v1/vaults/{vault_id}/credentials/{credential_id}/mcp_oauth_validate"
    for (method, path), status in viewer.items():
        assert status == (200 if method == "GET" else 403), (method, path)
    assert viewer["POST", validate] == 403
    assert set((await answers(world, "acme-billing", ids)).values()) == {403}
    assert set((await answers(world, "nobody", ids)).values()) == {401}
    with pytest.raises(anthropic.PermissionDeniedError):
        await world.client("acme-viewer").beta.files.upload(file=("f", b"x"))


async def test_ids_that_cannot_be_ids_are_not_found(world: World) -> None:
    for bad in ("..%2F..%2Fetc", "%00", "x" * 500, "a%20b", "agent_%27%20OR%201=1"):
        names = ("agent_id", "environment_id", "file_id", "vault_id", "credential_id", "skill_id", "version")
        ids = dict.fromkeys((*names, "store_id", "memory_id", "version_id"), bad)
        headers = {"authorization": "Bearer acme", "content-type": "application/json"}
        async with aiohttp.ClientSession(world.url, headers=headers) as http:
            for method, path in ROUTES:
                if "{" in path and not path.endswith("skills/{skill_id}/versions"):
                    from yarl import URL

                    url = URL(world.url + path.format(**ids), encoded=True)
                    async with http.request(method, url, data=b"") as answer:
                        assert answer.status == 404, (method, path, bad, await answer.text())


@pytest.mark.parametrize(
    "body", [b"[]", b"nonsense", b'"text"', b"\xff", b"[" * 50_000, b'{"name": "a\\u0000"}', b"{}x"]
)
async def test_a_body_that_is_no_object_is_refused(world: World, body: bytes) -> None:
    headers = {"authorization": "Bearer acme", "content-type": "application/json"}
    async with aiohttp.ClientSession(world.url, headers=headers) as http:
        for path in ("/v1/agents", "/v1/environments", "/v1/vaults", "/v1/memory_stores"):
            async with http.post(path, data=body) as answer:
                found = await answer.json()
                assert (answer.status, found["error"]["type"]) == (400, "invalid_request_error")


async def test_no_body_is_the_empty_object_and_betas_are_tolerated(world: World) -> None:
    agent = await world.client().beta.agents.create(model=MODEL, name="A", betas=["unheard-of-2099-01-01"])
    async with aiohttp.ClientSession(world.url, headers={"authorization": "Bearer acme"}) as http:
        async with http.post(f"/v1/agents/{agent.id}?beta=true") as answer:
            assert (answer.status, (await answer.json())["version"]) == (200, 1)
        async with http.post("/v1/agents", headers={"content-type": "application/json"}) as answer:
            assert (await answer.json())["error"]["param"] == "name"


def test_every_route_is_described_and_has_its_own_summary() -> None:
    described = describe_resources({"404": {"description": "x"}})
    operations = {(method.upper(), path): one for path, found in described.items() for method, one in found.items()}
    assert sorted(operations) == EVERY
    assert all(one["summary"] and one["responses"]["404"] for one in operations.values())


@pytest.mark.real_cli
async def test_the_whole_server_serves_them(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, spares=0) as server:
        async with AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
            ids = await one_of_each(client)
            assert await (await client.beta.files.download(ids["file_id"])).read() == b"x"
        async with server.http.get("/openapi.json") as answer:
            assert "/v1/agents/{agent_id}" in (await answer.json())["paths"]
        assert [path.name for path in (reachable_tmp_path / "data" / "blobs" / "files").iterdir()]
