"""Small things that tests of outcomes share: a definition whose scripted grader says what it is told to, and what came of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from running_server import Running


def verdict(result: str, explanation: str, *criteria: dict[str, Any]) -> str:
    """What the rubric has the scripted grader say."""
    said = {"result": result, "explanation": explanation, "criteria": list(criteria)}
    return f"[[say {json.dumps(said)}]]"


def outcome(description: str, *answers: str, **fields: Any) -> dict[str, Any]:
    """A definition whose grader answers so, one evaluation after the other."""
    rubric = {"type": "text", "content": "The rubric. " + " [[again]] ".join(answers)}
    return {"type": "user.define_outcome", "description": description, "rubric": rubric, **fields}


def ends(events: list[Any]) -> list[tuple[int, str, str]]:
    return [(one.iteration, one.result, one.explanation) for one in events if one.type == "span.outcome_evaluation_end"]


def spans(events: list[Any]) -> list[str]:
    return [one.type.removeprefix("span.outcome_evaluation_") for one in events if "outcome_eval" in one.type]


def asked_of_grader(server: Running) -> list[dict[str, Any]]:
    """The bodies of the requests to the grader."""
    return [one.body for one in server.upstream.calls if "criteria" in json.dumps(one.body.get("output_config") or {})]


def shown_to(body: dict[str, Any]) -> str:
    return "\n---\n".join(block["text"] for block in body["messages"][0]["content"])


async def asked_call_cut(server: Running) -> None:
    [request] = [one for one in server.upstream.calls if one.body.get("output_config", {}).get("format")]
    async with asyncio.timeout(10):
        await request.wait_done()
    assert request.cancelled
