"""What a session's agent finds in its workspace, seen with the real CLI's own Bash and Read through the official SDK."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from anthropic import AsyncAnthropic

from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox.choose import choose
from claude_wrapper.sandbox.probe import probe
from managed.driving import message, texts, turn
from managed.workspaces import TOOLS, bash, errors, ran, session_of, system_prompt
from running_server import KEY, Running, running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

SKILL = b"---\nname: greeting\ndescription: How to greet people here.\n---\nSay hello in Latin.\n"


@pytest.fixture(params=["bwrap", "none"])
async def server(request: pytest.FixtureRequest, reachable_tmp_path: Path) -> AsyncIterator[Running]:
    """A server whose agents are contained as the parameter says; paths differ between the two."""
    try:
        choose(request.param, None, probe())
    except SandboxUnavailable as error:
        pytest.skip(error.message)
    async with running(reachable_tmp_path, sandbox=request.param, security_level="permissive") as one:
        yield one


@pytest.fixture
async def client(server: Running) -> AsyncIterator[AsyncAnthropic]:
    """The official SDK, pointed at it."""
    async with AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0) as one:
        yield one


def told_path(prompt: str, ending: str) -> str:
    """The path in the system prompt that ends so."""
    return next(word for word in prompt.split() if word.rstrip(":").endswith(ending)).rstrip(":")


async def test_files_skills_and_memory_are_there_and_what_the_agent_makes_of_them_is_kept(
    client: AsyncAnthropic,
) -> None:
    api = client.beta
    early = await api.files.upload(file=("early.txt", b"an early pear", "text/plain"))
    late = await api.files.upload(file=("late.txt", b"a late plum", "text/plain"))
    skill = await api.skills.create(display_name="greet", files=[("greeting/SKILL.md", SKILL, "text/markdown")])
    store = await api.memory_stores.create(name="Team Notes", description="What we know.")
    await api.memory_stores.memories.create(store.id, path="/old.md", content="old wisdom")
    fixed = await api.memory_stores.create(name="Rules")
    await api.memory_stores.memories.create(fixed.id, path="/rules/first.md", content="be kind")
    session = await session_of(
        client,
        skills=[{"type": "custom", "skill_id": skill.id}],
        resources=[
            {"type": "file", "file_id": early.id},
            {"type": "file", "file_id": early.id, "mount_path": "/workspace/data/pear.txt"},
            {"type": "memory_store", "memory_store_id": store.id, "instructions": "Write down names."},
            {"type": "memory_store", "memory_store_id": fixed.id, "access": "read_only"},
        ],
    )
    assert [one.mount_path for one in session.resources][2:] == ["/mnt/memory/team-notes", "/mnt/memory/rules"]

    prompt = await system_prompt(client, session.id)
    upload, notes, rules = (told_path(prompt, end) for end in (early.id, "memory/team-notes", "memory/rules"))
    assert "Write down names." in prompt
    assert "How to greet people here." in prompt
    read = await turn(client, session.id, message(f'[[tool Read {{"file_path":"{upload}"}}]] [[then]]'))
    assert "an early pear" in texts(read)[-1]
    manifest = told_path(prompt, "greeting/SKILL.md")
    assert await ran(client, session.id, f"cat data/pear.txt {manifest}") == f"an early pear{SKILL.decode().strip()}"

    added = await api.sessions.resources.add(session.id, type="file", file_id=late.id)
    outputs = told_path(prompt, "/outputs")
    late_path = upload.replace(early.id, late.id)
    shown = await ran(
        client,
        session.id,
        f"cat {late_path}; ls {notes} {rules}/rules; mkdir -p {outputs}/a; echo made > {outputs}/a/b.txt",
    )
    assert shown.startswith("a late plum")
    [output] = [one async for one in api.files.list(scope_id=session.id)]
    assert (output.filename, output.scope.id if output.scope else None) == ("a_b.txt", session.id)
    assert await (await api.files.download(output.id)).read() == b"made\n"

    await api.sessions.resources.delete(added.id, session_id=session.id)
    changed = await turn(
        client,
        session.id,
        bash(f"ls {late_path}; echo new > {notes}/people.md; rm {notes}/old.md; echo evil > {rules}/rules/first.md"),
    )
    assert "No such file" in str([event for event in changed if event.type == "agent.tool_result"])
    assert [(kind, "read-only" in said) for kind, said in errors(changed)] == [("memory_sync_error", True)]
    kept = {one.path: one.content async for one in api.memory_stores.memories.list(store.id, view="full")}
    assert kept == {"/people.md": "new\n"}
    [version] = [
        one
        async for one in api.memory_stores.memory_versions.list(store.id, memory_id=None)
        if one.path == "/people.md"
    ]
    assert version.created_by.type == "session_actor"
    assert version.created_by.session_id == session.id
    assert await ran(client, session.id, f"cat {rules}/rules/first.md") == "be kind"


async def test_memory_that_two_changed_is_kept_twice_and_the_session_is_told(client: AsyncAnthropic) -> None:
    api = client.beta
    store = await api.memory_stores.create(name="Shared")
    memory = await api.memory_stores.memories.create(store.id, path="/plan.md", content="first")
    asked = {**TOOLS, "configs": [{"name": "read", "permission_policy": {"type": "always_ask"}}]}
    mounted = {"type": "memory_store", "memory_store_id": store.id}
    session = await session_of(client, tools=[asked], resources=[mounted])
    plan = told_path(await system_prompt(client, session.id), "memory/shared") + "/plan.md"
    steps = [("Bash", {"command": f"echo agent > {plan}; echo x > {plan}.bin; printf '\\377' > {plan}.bin"})]
    steps += [("Read", {"file_path": plan})]
    prompt = " [[then]] ".join(f"[[tool {name} {json.dumps(given)}]]" for name, given in steps)
    waiting = await turn(client, session.id, message(f"{prompt} [[then]]"))
    assert waiting[-1].stop_reason.type == "requires_action"
    await api.memory_stores.memories.update(memory.id, memory_store_id=store.id, content="somebody else")
    [call] = waiting[-1].stop_reason.event_ids
    done = await turn(client, session.id, {"type": "user.tool_confirmation", "tool_use_id": call, "result": "allow"})
    told = [said for kind, said in errors(done) if kind == "memory_sync_error"]
    assert len(told) == 2
    assert "UTF-8" in told[0]
    kept = {one.path: one.content async for one in api.memory_stores.memories.list(store.id, view="full")}
    beside = f"/plan.conflict-{session.id[-8:]}.md"
    assert kept == {"/plan.md": "somebody else", beside: "agent\n"}
    assert beside in told[1]
