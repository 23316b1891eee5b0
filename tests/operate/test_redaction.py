"""Secrets planted in every input turn up nowhere: not in logs, errors, metrics or the database.

Every plant holds the word PLANTED and says where it was planted. The CLI's own transcript (under `slots/` and `kept/`)
holds prompts by its nature, and an upstream's error message is the caller's to read: those two places are left out.
"""

from __future__ import annotations

import asyncio
import io
import re
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from running_server import Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

KEPT = re.compile(rb"PLANTED-model|PLANTED-session-name")
MARK = re.compile(rb"[\w.\-]*PLANTED[\w.\-]*")
KEY = "sk-ant-api03-PLANTED-operators-upstream-key"


def body(text: str = "[[say fine]]", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "claude-sonnet-5-5", "max_tokens": 64, "messages": messages, **fields}


OAUTH = {"access_token": "sk-ant-oat01-PLANTED-access", "refresh_token": "sk-ant-ort01-PLANTED-refresh"}
REQUESTS: tuple[tuple[str, dict[str, str], dict[str, Any]], ...] = (
    ("prompt", {}, body("my password is PLANTED-prompt [[say fine]]")),
    ("streamed", {}, body("my password is PLANTED-streamed [[say fine]]", stream=True)),
    ("system", {}, body(system="the secret is PLANTED-system")),
    ("session id", {}, body(session_id="PLANTED-session-name")),
    ("metadata", {}, body(metadata={"user_id": "PLANTED-user-id"})),
    ("bad field", {}, body(temperature="PLANTED-temperature")),
    ("bad role", {}, {"model": "m", "max_tokens": 1, "messages": [{"role": "PLANTED-role", "content": "x"}]}),
    ("model", {}, body(model="claude-sk-ant-PLANTED-model")),
    ("tool", {}, body(tools=[{"name": "look", "description": "PLANTED-tool", "input_schema": {"type": "object"}}])),
    ("failed turn", {}, body("[[error 400]] PLANTED-failed-prompt")),
    ("broken stream", {}, body("[[error-after 2]] PLANTED-broken-prompt", stream=True)),
    ("cookie", {"cookie": "session=PLANTED-cookie"}, body()),
    ("own header", {"x-own-header": "PLANTED-header", "user-agent": "PLANTED-agent"}, body()),
    ("traceparent", {"traceparent": "00-PLANTED-trace", "tracestate": "v=PLANTED-state"}, body()),
    ("wrong key", {"authorization": "Bearer sk-cw-PLANTED-wrong-key"}, body()),
    ("wrong x-api-key", {"authorization": "", "x-api-key": "PLANTED-wrong-x-api-key"}, body()),
    ("oauth", {}, {name: value for name, value in body(oauth_credentials=OAUTH).items() if name != "max_tokens"}),
    ("mcp", {}, body(mcp_servers=[{"type": "url", "name": "far", "url": "http://127.0.0.1:9/PLANTED-mcp-path", "authorization_token": "PLANTED-mcp-token"}])),
)  # fmt: skip


async def _ask_everything(server: Running) -> dict[str, tuple[int, bytes]]:
    answers: dict[str, tuple[int, bytes]] = {}
    for name, headers, content in REQUESTS:
        async with server.http.post("/v1/messages", json=content, headers=headers) as response:
            answers[name] = response.status, await response.read()
    async with server.http.post("/v1/messages", data=b'{"PLANTED-broken-json": ') as response:
        answers["broken json"] = response.status, await response.read()
    async with server.http.get("/v1/nowhere?key=PLANTED-query") as response:
        answers["query"] = response.status, await response.read()
    return answers


def _planted(content: bytes) -> set[bytes]:
    return set(MARK.findall(content))


async def test_secrets_planted_in_every_input_turn_up_nowhere(
    reachable_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = io.StringIO()
    monkeypatch.setattr(sys, "stderr", logs)
    monkeypatch.setenv("PLANTED_VARIABLE", "PLANTED-environment")
    async with running(
        reachable_tmp_path,
        log_level="debug",
        log_format="json",
        allow_oauth=True,
        anthropic_api_key=KEY,
        key_pepper="PLANTED-pepper-of-the-keys",
        upstream_attempts=1,
    ) as server:
        answers = await _ask_everything(server)
        await server.http.close()
        headers = {"authorization": "Bearer sk-cw-test-operator-key"}
        async with aiohttp.ClientSession(server.url, headers=headers) as http:
            pages = {}
            for path in ("/metrics", "/health", "/v1/pool/stats", "/v1/security"):
                async with http.get(path) as response:
                    pages[path] = await response.read()
        assert answers["prompt"][0] == answers["streamed"][0] == answers["oauth"][0] == 200
        assert answers["wrong key"][0] == answers["wrong x-api-key"][0] == 401
        assert answers["bad field"][0] == answers["broken json"][0] == 400
    assert '"event":"turn.completed"' in logs.getvalue()
    assert _planted(logs.getvalue().encode()) == set(), [
        line for line in logs.getvalue().splitlines() if "PLANTED" in line
    ]
    for path, page in pages.items():
        found = _planted(page)
        # Who asks for the pool's state sees the names that were given to it, by the callers themselves.
        assert found <= ({b"PLANTED-session-name"} if path == "/v1/pool/stats" else set()), path
    for name, (status, answer) in answers.items():
        if status >= 400:  # an error may name the field and the value that its caller sent, never a secret of another
            own = {"bad role": {b"PLANTED-role"}, "model": {b"claude-sk-ant-PLANTED-model"}}.get(name, set())
            assert _planted(answer) <= own, name
    assert _in_files(reachable_tmp_path / "data") == {}


def _in_files(data: Path) -> dict[str, set[bytes]]:
    """Plants in the server's files. The names that a caller gave to a session or asked for as a model are kept there."""
    found = {}
    for path in data.rglob("*"):
        inside = path.relative_to(data)
        if (
            path.is_file()
            and inside.parts[0] not in ("slots", "kept")
            and (planted := {one for one in _planted(path.read_bytes()) if not KEPT.search(one)})
        ):
            found[str(inside)] = planted
    return found


async def test_what_an_upstream_says_in_its_errors_is_told_to_the_caller_alone(
    reachable_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = io.StringIO()
    monkeypatch.setattr(sys, "stderr", logs)

    async def refuse(request: web.Request) -> web.Response:
        del request
        error = {"type": "invalid_request_error", "message": f"bad key PLANTED-upstream {KEY}"}
        headers = {"request-id": "req_upstream", "x-secret": "PLANTED-upstream-header"}
        return web.json_response({"type": "error", "error": error}, status=400, headers=headers)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with running(
            reachable_tmp_path,
            log_level="debug",
            log_format="json",
            upstream_url=url,
            anthropic_api_key=KEY,
            upstream_attempts=1,
        ) as server:
            answer = await server.ask("hello")
            async with server.http.get("/metrics") as response:
                metrics = await response.read()
    finally:
        await runner.cleanup()
    assert answer.status == 400
    assert "PLANTED-upstream" in answer.body["error"]["message"]
    assert KEY not in answer.body["error"]["message"]
    assert _planted(logs.getvalue().encode()) == set()
    assert _planted(metrics) == set()
    assert _in_files(reachable_tmp_path / "data") == {}


async def test_secrets_of_sessions_are_in_no_row_and_their_content_in_no_log_trace_or_metric(
    reachable_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a session says is kept in its rows by its nature; a secret is kept nowhere as it is."""
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from claude_wrapper.app import telemetry

    spans, logs = InMemorySpanExporter(), io.StringIO()
    original = telemetry.OTelTracer
    monkeypatch.setattr(telemetry, "OTelTracer", lambda endpoint, **kw: original(endpoint, exporter=spans, **kw))
    monkeypatch.setattr(sys, "stderr", logs)
    settings = {"log_level": "debug", "log_format": "json", "upstream_private": True, "anthropic_api_key": KEY}
    traced = {"otel_endpoint": "http://127.0.0.1:9", "otel_metrics_seconds": 0}
    async with running(reachable_tmp_path, **settings, **traced) as server:

        async def post(path: str, content: dict[str, Any]) -> dict[str, Any]:
            async with server.http.post(path, json=content) as response:
                assert response.status == 200, (path, await response.text())
                return dict(await response.json())

        vault = await post("/v1/vaults", {"display_name": "safe"})
        auth = {"type": "static_bearer", "token": "SECRET-PLANTED-vault", "mcp_server_url": "http://127.0.0.1:9/mcp"}
        await post(f"/v1/vaults/{vault['id']}/credentials", {"display_name": "one", "auth": auth})
        secret = {"api_key": "SECRET-PLANTED-credential"}
        upstream = {"kind": "custom", "name": "own", "base_url": server.upstream.url, "secret": secret}
        await post("/v1/organizations/credentials", upstream)
        key = await post("/v1/organizations/api_keys", {"name": "short"})
        form = aiohttp.FormData()
        form.add_field("file", b"CONTENT-PLANTED-file", filename="note.txt", content_type="text/plain")
        async with server.http.post("/v1/files", data=form) as response:
            assert response.status == 200
        tool = {
            "type": "custom",
            "name": "look",
            "description": "CONTENT-PLANTED-tool",
            "input_schema": {"type": "object"},
        }
        agent = await post(
            "/v1/agents",
            {"name": "a", "model": "claude-sonnet-5-5", "system": "CONTENT-PLANTED-system", "tools": [tool]},
        )
        environment = await post("/v1/environments", {"name": "e", "config": {"type": "cloud"}})
        session = await post(
            "/v1/sessions",
            {
                "agent": agent["id"],
                "environment_id": environment["id"],
                "title": "CONTENT-PLANTED-title",
                "metadata": {"note": "CONTENT-PLANTED-metadata"},
                "vault_ids": [vault["id"]],
            },
        )
        path = f"/v1/sessions/{session['id']}"

        async def said(event: dict[str, Any], until: str) -> dict[str, Any]:
            await post(f"{path}/events", {"events": [event]})
            async with asyncio.timeout(60):
                while True:
                    async with server.http.get(f"{path}/events?order=desc&limit=1") as response:
                        (newest,) = (await response.json())["data"]
                    if (newest.get("stop_reason") or {}).get("type") == until:
                        return dict(newest)
                    await asyncio.sleep(0.05)

        text = 'CONTENT-PLANTED-prompt [[tool mcp__client__look {"what": "CONTENT-PLANTED-input"}]] [[then]]'
        waiting = await said({"type": "user.message", "content": [{"type": "text", "text": text}]}, "requires_action")
        result = {"type": "user.custom_tool_result", "custom_tool_use_id": waiting["stop_reason"]["event_ids"][0]}
        await said(result | {"content": [{"type": "text", "text": "CONTENT-PLANTED-result"}]}, "end_turn")
        async with server.http.get("/metrics") as response:
            metrics = await response.read()
    assert spans.get_finished_spans()
    for where, content in (
        ("logs", logs.getvalue().encode()),
        ("traces", "".join(span.to_json() for span in spans.get_finished_spans()).encode()),
        ("metrics", metrics),
    ):
        assert _planted(content) == set(), where
    kept = _in_files(reachable_tmp_path / "data")
    everything = set().union(*kept.values())
    assert b"CONTENT-PLANTED-prompt" in everything, "the look would have found something"
    assert not [one for one in everything if one.startswith(b"SECRET-")]
    assert b"CONTENT-PLANTED-file" not in everything, "files are encrypted"
    assert {name.split(".")[0] for name in kept} == {"claude-wrapper"}, "only the database holds what was said"
    rows = b"".join(one.read_bytes() for one in (reachable_tmp_path / "data").glob("claude-wrapper.db*"))
    assert key["secret"].encode() not in rows
