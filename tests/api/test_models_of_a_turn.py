"""Which models a turn's process may ask for: its own alone, whoever asks in it. Real CLI, real sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from claude_wrapper.storage.tables.usage import usage_calls
from claude_wrapper.testing.attack.runner import python_inside
from running_server import Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

MODEL, DEARER, CHEAPER = "claude-sonnet-5-5", "claude-opus-5-5", "claude-haiku-4-5"

_ASK = f"""
import http.client, json, os, socket
class Conn(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX); self.sock.connect(env["ANTHROPIC_UNIX_SOCKET"])
for pid in filter(str.isdigit, os.listdir("/proc")):
    try: env = dict(p.split("=", 1) for p in open(f"/proc/{{pid}}/environ").read().split(chr(0)) if "=" in p)
    except OSError: continue
    if "ANTHROPIC_API_KEY" in env: break
for model in ("{MODEL}", "{DEARER}", "{CHEAPER}"):
    conn = Conn("broker.invalid")
    headers = {{"x-api-key": env["ANTHROPIC_API_KEY"], "anthropic-version": "2023-06-01"}}
    body = {{"model": model, "max_tokens": 9, "messages": [{{"role": "user", "content": "by hand"}}]}}
    conn.request("POST", "/v1/messages", json.dumps(body), headers | {{"content-type": "application/json"}})
    answer = conn.getresponse()
    print(model, answer.status, answer.read().decode()[:90])
"""


def _tool(name: str, **arguments: Any) -> str:
    return f"[[tool {name} {json.dumps(arguments)}]] [[then]]"


def _asked(server: Running) -> set[str]:
    return {str(seen.body["model"]) for seen in server.upstream.requests if seen.path.startswith("/v1/messages")}


async def _ledger(server: Running) -> list[str]:
    tenants = server.server.app.state.deps.tenants
    await tenants.ledger.flush()
    async with tenants.database.read() as tx:
        return list(await tx.scalars(sa.select(usage_calls.c.model).order_by(usage_calls.c.started_ms)))


async def _key(server: Running, *models: str) -> dict[str, str]:
    """A key of the operator's own organisation for these models, as headers."""
    body = {"name": "narrow", "scopes": ["write:messages"], "allowed_models": list(models)}
    async with server.http.post("/v1/organizations/api_keys", json=body) as response:
        assert response.status == 200, await response.text()
        return {"authorization": f"Bearer {(await response.json())['secret']}"}


async def test_the_agents_shell_gets_no_other_model_from_the_endpoint(server: Running) -> None:
    await server.ask(_tool("Write", file_path="/work/ask.py", content=_ASK), session_id="a", agent={"tools": "default"})
    run = _tool("Bash", command=f"{python_inside()} /work/ask.py")
    answer = await server.ask(run, session_id="a", agent={"tools": "default"})
    assert answer.status == 200, answer.body
    for model, status in ((MODEL, 200), (DEARER, 403), (CHEAPER, 403)):
        assert f"{model} {status} " in answer.text
    assert answer.text.count("model_not_allowed: this turn") == 2
    assert _asked(server) == {MODEL}
    assert await _ledger(server) == [MODEL] * 5  # two steps of either turn, and the shell's one
    async with server.http.get("/metrics") as response:
        assert "upstream_models_refused_total 2.0" in await response.text()


async def test_what_the_cli_asks_on_its_own_account_is_asked_of_the_turns_model(server: Running) -> None:
    """A sub-agent that was told another model, a built-in kind of sub-agent, and a search (a request of its own)."""
    for text in (
        _tool("Task", description="d", prompt="[[say sub]]", subagent_type="general-purpose", model="opus"),
        _tool("Task", description="d", prompt="[[say sub]]", subagent_type="Explore"),
        _tool("WebSearch", query="tea"),
    ):
        before = len(server.upstream.requests)
        answer = await server.ask(text, agent={"tools": "default"})
        assert answer.status == 200, answer.body
        assert len(server.upstream.requests) >= before + 3  # the two steps, and what was asked beside them
    assert _asked(server) == {MODEL}
    async with server.http.get("/metrics") as response:
        assert "upstream_models_refused_total 0.0" in await response.text()


async def test_a_model_asked_for_by_its_old_name_is_not_replaced_by_a_new_one(server: Running) -> None:
    answer = await server.ask("hello", model="claude-opus-4-1")
    assert (answer.status, answer.body["error"]["type"]) == (404, "not_found_error")
    assert _asked(server) == {"claude-opus-4-1"}


async def test_a_name_that_only_the_cli_knows_is_refused_and_says_what_it_stood_for(server: Running) -> None:
    answer = await server.ask("hello", model="best")
    assert (answer.status, answer.body["error"]["type"]) == (403, "permission_error")
    assert f"this turn is for 'best' alone, and its process asked for the model '{DEARER}'" in str(answer.body)
    assert _asked(server) == set()


async def test_a_key_for_some_models_is_not_answered_by_another_one(reachable_tmp_path: Path) -> None:
    async with running(reachable_tmp_path, upstream_attempts=1) as server:
        policies = {"fallback_models": {MODEL: [CHEAPER]}}
        async with server.http.post("/v1/organizations/policies", json=policies) as response:
            assert response.status == 200, await response.text()
        only, family = await _key(server, MODEL), await _key(server, "claude-*")
        assert (await server.ask("hello", headers=only, model=CHEAPER)).status == 403
        server.upstream.fail_models[MODEL] = 529
        assert (await server.ask("[[say one]]", headers=only)).status == 529
        answer = await server.ask("[[say two]]", headers=family)
        assert (answer.status, answer.text, answer.body["model"]) == (200, "two", CHEAPER)
