"""A request that names its upstream credential: that one is shown, and no other organisation's can be named. Real CLI."""

from __future__ import annotations

from pathlib import Path

import pytest

from running_server import KEY, Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]


async def keep(server: Running, name: str, *, org: str | None = None, named_only: bool = False) -> str:
    body = {
        "kind": "custom",
        "name": name,
        "secret": {"api_key": f"sk-{name}"},
        "base_url": server.upstream.url,
        "named_only": named_only,
    }
    headers = {"cw-organization": org} if org else {}
    async with server.http.post("/v1/organizations/credentials", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        return str((await response.json())["id"])


async def test_a_named_credential_serves_who_names_it_and_nobody_else(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, upstream_private=True) as server:
        usual, quiet = await keep(server, "usual"), await keep(server, "quiet", named_only=True)
        async with server.http.post("/v1/organizations", json={"name": "Others"}) as response:
            other = str((await response.json())["id"])
        theirs = await keep(server, "theirs", org=other)

        for named, shown in ((None, "sk-usual"), (quiet, "sk-quiet"), (usual, "sk-usual")):
            answer = await server.ask("hello", headers={"cw-credential": named} if named else None)
            assert answer.status == 200, answer.body
            assert server.upstream.requests[-1].headers["x-api-key"] == shown
        for named in (theirs, "cred_0123456789abcdefghjkmnpqrs"):
            answer = await server.ask("hello", headers={"cw-credential": named})
            assert (answer.status, answer.body["error"]["type"]) == (404, "not_found_error")
        async with server.http.get("/v1/models", headers={"cw-credential": quiet}) as response:
            assert response.status == 200
        assert server.upstream.requests[-1].headers["x-api-key"] == "sk-quiet"
    assert KEY not in str(server.upstream.requests)
