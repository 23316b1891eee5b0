"""What the credentials of a self-hosted environment's worker open: this and nothing else, each on its own ids alone."""

from __future__ import annotations

from typing import Any

import pytest
from admin_world import Admin
from anthropic import AsyncAnthropic
from routes_table import NEEDS
from test_isolation import ask, code_of, filled, furnished, worked

pytestmark = pytest.mark.anyio

WORK = "/v1/environments/{environment_id}/work"
SESSION = "/v1/sessions/{session_id}"
MEMORIES = "/v1/memory_stores/{store_id}/memories"
SERVING = {("POST", WORK + "/{work_id}/heartbeat"), ("POST", WORK + "/{work_id}/stop")}
SESSIONS = {
    ("GET", SESSION),
    ("GET", SESSION + "/events"),
    ("POST", SESSION + "/events"),
    ("GET", SESSION + "/events/stream"),
}
# Wire reference 2.4. An environment key serves sessions when there is no token, but never skills and memory.
KEY_OPENS = {("GET", WORK), ("GET", WORK + "/poll"), ("POST", WORK + "/{work_id}/ack")} | SERVING | SESSIONS
TOKEN_OPENS = SERVING | SESSIONS | {
    ("GET", "/v1/skills/{skill_id}/versions/{version}"),
    ("GET", "/v1/skills/{skill_id}/versions/{version}/content"),
    ("GET", "/v1/memory_stores/{store_id}"),
    ("GET", MEMORIES),
    ("POST", MEMORIES),
    ("GET", MEMORIES + "/{memory_id}"),
    ("POST", MEMORIES + "/{memory_id}"),
    ("DELETE", MEMORIES + "/{memory_id}"),
}  # fmt: skip
RESULT = {"events": [{"type": "user.tool_result", "tool_use_id": "sevt_none"}]}


async def test_a_workers_credentials_open_what_the_reference_lists_and_nothing_else(admin: Admin) -> None:
    async with AsyncAnthropic(base_url=admin.server.url, api_key=admin.owner, max_retries=0) as client:
        skill = await client.beta.skills.create(
            files=[("greeting/SKILL.md", b"---\nname: greeting\ndescription: How.\n---\nSay hello.\n")]
        )
        other_skill = await client.beta.skills.create(
            files=[("other/SKILL.md", b"---\nname: other\ndescription: How.\n---\nSay hello.\n")]
        )
        stores = [await client.beta.memory_stores.create(name=name) for name in ("mine", "read", "other")]
        memory = await client.beta.memory_stores.memories.create(stores[0].id, path="/a.md", content="x")
    mounted = [
        {"type": "memory_store", "memory_store_id": stores[0].id, "access": "read_write"},
        {"type": "memory_store", "memory_store_id": stores[1].id, "access": "read_only"},
    ]
    wanted = [{"type": "custom", "skill_id": skill.id, "version": "latest"}]
    ours = await worked(admin, admin.owner, agent={"skills": wanted}, resources=mounted)
    elsewhere = await worked(admin, admin.owner)  # another environment of the same organisation
    version = str(skill.latest_version_id)
    ids = {**await furnished(admin), **ours, "skill_id": skill.id, "store_id": stores[0].id, "memory_id": memory.id}
    special = {"version": version, "organization_id": admin.ours}

    def url(path: str, **more: str) -> str:
        for name, value in {**special, **more}.items():
            path = path.replace("{" + name + "}", value)
        return filled(path, {**ids, **more})

    key, token = ours["environment_key"], ours["sessions_token"]
    wrong: list[str] = []
    last = ("POST", WORK + "/{work_id}/stop")
    for method, path in sorted(NEEDS.keys() - {last}, key=lambda one: one[0] == "DELETE"):
        if NEEDS[method, path].needs == "open":
            continue
        for who, opens in ((key, KEY_OPENS), (token, TOKEN_OPENS)):
            row = NEEDS[method, path]
            body = None if method in {"GET", "DELETE"} else (row.body(ids) if row.body else {})
            if path == SESSION + "/events" and method == "POST":
                body = RESULT
            status, answer = await ask(admin, method, url(path) + row.query, body, who)
            good = status not in {401, 403, 404} and status < 500 if (method, path) in opens else status == 403
            if not good:
                wrong.append(f"{who[:8]} {method} {path}: {status} {answer[:140]!r}")
    assert not wrong, "\n" + "\n".join(wrong)

    async def refused(status: int, method: str, path: str, body: Any = None, who: str = token) -> None:
        found, answer = await ask(admin, method, path, body, who)
        assert found == status, (method, path, answer)

    said = {"type": "user.message", "content": [{"type": "text", "text": "x"}]}
    allowed = {"type": "user.tool_confirmation", "tool_use_id": "sevt_none", "result": "allow"}
    for event in (said, allowed, {"type": "user.interrupt"}):
        for who in (key, token):
            await refused(403, "POST", url(SESSION + "/events"), {"events": [event]}, who)
    for who in (key, token):
        await refused(404, "GET", url(SESSION, session_id=elsewhere["session_id"]), who=who)
        await refused(404, "POST", url(last[1], **{n: elsewhere[n] for n in ("environment_id", "work_id")}), {}, who)
    await refused(404, "GET", url("/v1/skills/{skill_id}/versions/{version}", skill_id=other_skill.id))
    await refused(404, "GET", url(MEMORIES, store_id=stores[2].id))
    await refused(403, "POST", url(MEMORIES, store_id=stores[1].id), {"path": "/b.md", "content": "x"})
    assert (await ask(admin, "GET", url(MEMORIES, store_id=stores[1].id), None, token))[0] == 200

    status, _ = await ask(admin, *("POST", url(last[1])), {"force": True}, token)
    assert status == 200
    for method, path in sorted(TOKEN_OPENS - SERVING):
        await refused(401, method, url(path), None if method in {"GET", "DELETE"} else RESULT)
    await refused(409, "POST", url(last[1]), {"force": True})
    beat, answer = await ask(admin, "POST", url(WORK + "/{work_id}/heartbeat"), {}, token)
    assert beat == 200
    assert b'"state":"stopped"' in answer
    gone = await admin.delete(f"/environment_keys/{ours['environment_key_id']}")
    assert gone.body["status"] == "revoked"
    status, answer = await ask(admin, "GET", url(WORK + "/poll"), None, key)
    assert (status, code_of(answer)) == (401, "authentication_failed")
