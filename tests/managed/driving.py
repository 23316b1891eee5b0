"""Small things that tests of sessions share: an agent at work, and its events until it waits."""

from __future__ import annotations

import asyncio
from typing import Any

from anthropic import AsyncAnthropic

MODEL = "claude-sonnet-5-5"
BOTH_ASK = {
    "type": "agent_toolset_20260401",
    "default_config": {"enabled": False},
    "configs": [
        {"name": "bash", "enabled": True, "permission_policy": {"type": "always_ask"}},
        {"name": "read", "enabled": True, "permission_policy": {"type": "always_ask"}},
        {"name": "write", "enabled": True, "permission_policy": {"type": "always_allow"}},
    ],
}
WEATHER = {
    "type": "custom",
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


async def new_session(client: AsyncAnthropic, **agent: Any) -> Any:
    """A session of a new agent in a new environment."""
    made = await client.beta.agents.create(model=MODEL, name="tester", **agent)
    environment = await client.beta.environments.create(name="here", config={"type": "cloud"})
    return await client.beta.sessions.create(agent=made.id, environment_id=environment.id)


async def say(client: AsyncAnthropic, session: str, text: str, **fields: Any) -> Any:
    """Send a user message."""
    event = {"type": "user.message", "content": [{"type": "text", "text": text}], **fields}
    return await client.beta.sessions.events.send(session, events=[event])


async def until_idle(stream: Any, seconds: float = 30) -> list[Any]:
    """Events up to and with the next `session.status_idle`."""
    events = []
    async with asyncio.timeout(seconds):
        async for event in stream:
            events.append(event)
            if event.type == "session.status_idle":
                return events
    raise AssertionError(f"the stream ended: {[one.type for one in events]}")


async def turn(client: AsyncAnthropic, session: str, *events: dict[str, Any]) -> list[Any]:
    """Send these events and return everything up to the next idle."""
    async with await client.beta.sessions.events.stream(session) as stream:
        await client.beta.sessions.events.send(session, events=list(events))
        return await until_idle(stream)


def message(text: str, **fields: Any) -> dict[str, Any]:
    """A user message."""
    return {"type": "user.message", "content": [{"type": "text", "text": text}], **fields}


def texts(events: list[Any]) -> list[str]:
    """What the agent said."""
    return [block.text for event in events if event.type == "agent.message" for block in event.content]


async def history(client: AsyncAnthropic, session: str, **query: Any) -> list[Any]:
    """All events of a session."""
    return [event async for event in client.beta.sessions.events.list(session, **query)]
