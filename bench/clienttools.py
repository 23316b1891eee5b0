"""A round trip of the caller's own tool, against a plain turn: two requests and one park against one request."""

from __future__ import annotations

import json
import time
from typing import Any

from bench.client import Connection, WrongAnswer, wait_for_spares
from bench.engine import Scene
from bench.figures import Compare, Figure, Findings, ms
from bench.processes import MODEL

_TOOL = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
_CALL = '[[tool mcp__client__get_weather {"city":"Rome"}]] [[then]]'


async def measure(at: Scene) -> Findings:
    """Both kinds in changing order, on one warm conversation each."""
    rounds = 10 if at.quick else 40
    async with at.server("tools", spares=2) as running, Connection(running) as connection:
        await wait_for_spares(connection, 2)
        plain, tools = _Named(connection, "plain"), _Named(connection, "tools")
        for warm_up in (plain.turn, tools.round_trip) * 2:
            await warm_up()
        times: dict[str, list[float]] = {"plain": [], "tool": []}
        for number in range(rounds):
            both = [("plain", plain.turn), ("tool", tools.round_trip)]
            for kind, one in both if number % 2 else reversed(both):
                began = time.perf_counter()
                await one()
                times[kind].append(time.perf_counter() - began)
    name = "a turn with one call of the caller's tool (floor: a plain turn)"
    return Findings([Figure(name, "ms", ms(times["tool"]), ms(times["plain"]), Compare.RATIO)])


class _Named:
    """A conversation that the server holds."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._name = name

    async def turn(self) -> None:
        await self._ask("hello")

    async def round_trip(self) -> None:
        answer = await self._ask(_CALL)
        call = next(block for block in answer["content"] if block["type"] == "tool_use")
        await self._ask([{"type": "tool_result", "tool_use_id": call["id"], "content": "sunny"}])

    async def _ask(self, content: Any) -> dict[str, Any]:
        body = {"model": MODEL, "max_tokens": 1024, "session_id": self._name, "tools": [_TOOL]}
        reply = await self._connection.message({**body, "messages": [{"role": "user", "content": content}]})
        if reply.status != 200:
            raise WrongAnswer(f"{reply.status}: {reply.body[-300:]!r}")
        return dict(json.loads(reply.body))
