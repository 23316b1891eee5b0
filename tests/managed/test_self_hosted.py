"""Sessions whose tools run at the customer's: the official `EnvironmentWorker`, unmodified, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from anthropic.lib.environments import EnvironmentWorker

from managed.driving import MODEL, WEATHER, message, texts, turn, until_idle
from running_server import Running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

TOOLSET = {
    "type": "agent_toolset_20260401",
    "configs": [{"name": "web_fetch", "enabled": False}, {"name": "web_search", "enabled": False}],
}


async def new_environment(server: Running, client: AsyncAnthropic) -> tuple[str, str]:
    """A self-hosted environment and a key of it."""
    made = await client.beta.environments.create(name="theirs", config={"type": "self_hosted"})
    body = {"environment_id": made.id, "name": "laptop"}
    async with server.http.post("/v1/organizations/environment_keys", json=body) as response:
        key = await response.json()
        assert response.status == 200, key
    assert key["secret"].startswith("sk-env-")
    return made.id, key["secret"]


async def hosted_session(client: AsyncAnthropic, environment: str, **agent: Any) -> Any:
    made = await client.beta.agents.create(model=MODEL, name="tester", **{"tools": [TOOLSET], **agent})
    return await client.beta.sessions.create(agent=made.id, environment_id=environment)


@contextlib.asynccontextmanager
async def serving(server: Running, environment: str, key: str, workdir: Path, **options: Any) -> AsyncIterator[None]:
    """The official worker, at work until the block ends."""
    workdir.mkdir(exist_ok=True)
    async with AsyncAnthropic(base_url=server.url, api_key="not-used", max_retries=0) as client:
        worker = EnvironmentWorker(client, environment_id=environment, environment_key=key, workdir=workdir, **options)
        task = asyncio.ensure_future(worker.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})


async def test_the_official_worker_runs_an_agents_tools(
    server: Running, client: AsyncAnthropic, tmp_path: Path
) -> None:
    environment, key = await new_environment(server, client)
    session = (await hosted_session(client, environment, tools=[TOOLSET, WEATHER])).id
    theirs = tmp_path / "theirs"
    async with serving(server, environment, key, theirs):
        events = await turn(
            client,
            session,
            message(
                '[[tool mcp__sandbox__bash {"command":"pwd"}]] '
                '[[tool mcp__sandbox__write {"file_path":"a.txt","content":"from the model"}]] [[then]]'
            ),
        )
        while events[-1].stop_reason.type == "requires_action":
            async with await client.beta.sessions.events.stream(session) as stream:
                events += await until_idle(stream)
    assert str(theirs) in texts(events)[-1]
    assert (theirs / "a.txt").read_text() == "from the model"
