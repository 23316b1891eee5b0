"""Small things that tests of workspaces share: a session of an agent with tools, and what a command of it says."""

from __future__ import annotations

import json
from typing import Any

from anthropic import AsyncAnthropic

from managed.driving import MODEL, message, texts, turn

TOOLS = {"type": "agent_toolset_20260401"}


async def session_of(
    client: AsyncAnthropic, *, config: Any = None, skills: Any = (), tools: Any = None, **fields: Any
) -> Any:
    """A session of an agent with all tools."""
    agent = await client.beta.agents.create(model=MODEL, name="reader", tools=tools or [TOOLS], skills=list(skills))
    environment = await client.beta.environments.create(name="here", config=config or {"type": "cloud"})
    return await client.beta.sessions.create(agent=agent.id, environment_id=environment.id, **fields)


def bash(command: str) -> dict[str, Any]:
    """A message whose turn runs one command."""
    return message(f"[[tool Bash {json.dumps({'command': command})}]] [[then]]")


def errors(events: list[Any]) -> list[tuple[str, str]]:
    """What went wrong."""
    return [(event.error.type, event.error.message) for event in events if event.type == "session.error"]


async def ran(client: AsyncAnthropic, session: str, command: str) -> str:
    """The output of a command that the agent runs in its workspace; no error may be told meanwhile."""
    events = await turn(client, session, bash(command))
    assert errors(events) == []
    return texts(events)[-1].removeprefix("Tool said: ")


async def system_prompt(client: AsyncAnthropic, session: str) -> str:
    """What the model is told."""
    return texts(await turn(client, session, message("[[system]]")))[0]
