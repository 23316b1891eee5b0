"""Memory stores through the official SDK: paths, preconditions, history."""

from __future__ import annotations

import asyncio
import hashlib

import anthropic
import pytest
from anthropic import AsyncAnthropic
from hypothesis import given
from hypothesis import strategies as st
from resources_world import KEYS, World

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions.resources import memory
from claude_wrapper.sessions.resources.memory import clean_path
from claude_wrapper.sessions.resources.memoryversions import Actor
from claude_wrapper.sessions.resources.values import Fields

pytestmark = pytest.mark.anyio


def digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


@pytest.fixture
async def store(client: AsyncAnthropic) -> str:
    return (await client.beta.memory_stores.create(name="Team notes", description="d")).id


async def test_stores_live_and_end(client: AsyncAnthropic) -> None:
    made = await client.beta.memory_stores.create(name="N", metadata={"user": "u"})
    assert (made.type, made.description, made.metadata) == ("memory_store", "", {"user": "u"})
    changed = await client.beta.memory_stores.update(made.id, description="new", metadata={"user": None})
    assert (changed.name, changed.description, changed.metadata) == ("N", "new", {})
    await client.beta.memory_stores.memories.create(made.id, path="/a", content="x")
    assert (await client.beta.memory_stores.archive(made.id)).archived_at is not None
    with pytest.raises(anthropic.ConflictError):
        await client.beta.memory_stores.memories.create(made.id, path="/b", content="x")
    assert [one.path async for one in client.beta.memory_stores.memories.list(made.id)] == ["/a"]
    assert [one.id async for one in client.beta.memory_stores.list()] == []
    assert (await client.beta.memory_stores.delete(made.id)).type == "memory_store_deleted"
    with pytest.raises(anthropic.NotFoundError):
        await client.beta.memory_stores.memories.list(made.id)


async def test_a_memory_and_its_history(client: AsyncAnthropic, store: str) -> None:
    memories, versions = client.beta.memory_stores.memories, client.beta.memory_stores.memory_versions
    made = await memories.create(store, path="/notes/ä.md", content="grüße")
    assert (made.content, made.content_size_bytes, made.content_sha256) == (None, 7, digest("grüße"))
    assert (await memories.retrieve(made.id, memory_store_id=store)).content == "grüße"
    changed = await memories.update(
        made.id,
        memory_store_id=store,
        content="two",
        precondition={"type": "content_sha256", "content_sha256": made.content_sha256},
        view="full",
    )
    assert (changed.content, changed.path, changed.id) == ("two", made.path, made.id)
    moved = await memories.update(made.id, memory_store_id=store, path="/b.md")
    assert (moved.path, moved.content_sha256) == ("/b.md", digest("two"))
    same = await memories.update(made.id, memory_store_id=store, content="two")
    assert same.memory_version_id == moved.memory_version_id
    assert (await memories.delete(made.id, memory_store_id=store)).type == "memory_deleted"
    history = [one async for one in versions.list(store, memory_id=made.id, limit=2)]
    assert [(one.operation, one.path) for one in history] == [
        ("deleted", "/b.md"),
        ("modified", "/b.md"),
        ("modified", "/notes/ä.md"),
        ("created", "/notes/ä.md"),
    ]
    assert {one.created_by.api_key_id for one in history} == {KEYS["acme"].key_id}
    assert [one.id async for one in versions.list(store, operation="created")] == [history[3].id]
    assert (await versions.retrieve(history[3].id, memory_store_id=store)).content == "grüße"
    redacted = await versions.redact(history[3].id, memory_store_id=store)
    assert (redacted.path, redacted.content, redacted.content_sha256) == (None, None, None)
    assert redacted.redacted_at is not None
    assert redacted.redacted_by.type == "api_actor"


async def test_the_present_version_cannot_be_redacted(client: AsyncAnthropic, store: str) -> None:
    made = await client.beta.memory_stores.memories.create(store, path="/a", content="x")
    with pytest.raises(anthropic.ConflictError):
        await client.beta.memory_stores.memory_versions.redact(made.memory_version_id, memory_store_id=store)


async def test_a_wrong_precondition_changes_nothing(client: AsyncAnthropic, store: str) -> None:
    memories = client.beta.memory_stores.memories
    made = await memories.create(store, path="/a", content="x")
    wrong = {"type": "content_sha256", "content_sha256": digest("other")}
    for call in (
        memories.update(made.id, memory_store_id=store, content="y", precondition=wrong),
        memories.delete(made.id, memory_store_id=store, expected_content_sha256=digest("other")),
    ):
        with pytest.raises(anthropic.ConflictError) as caught:
            await call
        assert caught.value.type == "memory_precondition_failed_error"
        assert caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(anthropic.BadRequestError, match="64"):
        await memories.delete(made.id, memory_store_id=store, expected_content_sha256="XYZ")
    assert (await memories.retrieve(made.id, memory_store_id=store)).content == "x"
    await memories.delete(made.id, memory_store_id=store, expected_content_sha256=digest("x"))


async def test_of_many_that_change_the_same_content_one_wins(client: AsyncAnthropic, store: str) -> None:
    memories = client.beta.memory_stores.memories
    made = await memories.create(store, path="/a", content="0")
    seen = {"type": "content_sha256", "content_sha256": digest("0")}
    done = await asyncio.gather(
        *(memories.update(made.id, memory_store_id=store, content=f"n{n}", precondition=seen) for n in range(4)),
        return_exceptions=True,
    )
    assert sorted(isinstance(one, anthropic.ConflictError) for one in done) == [False, True, True, True]


@pytest.mark.parametrize("path", ["/a/b", "/a/b/c", "/a"])
async def test_paths_that_collide_are_refused(client: AsyncAnthropic, store: str, path: str) -> None:
    memories = client.beta.memory_stores.memories
    await memories.create(store, path="/a/b", content="x")
    other = await memories.create(store, path="/A/b", content="paths tell cases apart")
    for call in (
        memories.create(store, path=path, content="y"),
        memories.update(other.id, memory_store_id=store, path=path),
    ):
        with pytest.raises(anthropic.ConflictError) as caught:
            await call
        assert caught.value.type == "memory_path_conflict_error"


async def test_listing_by_directory(client: AsyncAnthropic, store: str) -> None:
    memories = client.beta.memory_stores.memories
    for path in ("/z", "/a/1", "/a/2", "/a/deep/3", "/ab", "/A/x"):
        await memories.create(store, path=path, content=path)
    every = [one.path async for one in memories.list(store, limit=2)]
    assert every == ["/A/x", "/a/1", "/a/2", "/a/deep/3", "/ab", "/z"]
    top = [(one.type, one.path) async for one in memories.list(store, depth=1, limit=2)]
    assert top == [("memory_prefix", "/A/"), ("memory_prefix", "/a/"), ("memory", "/ab"), ("memory", "/z")]
    inside = [(one.type, one.path) async for one in memories.list(store, path_prefix="/a/", depth=1)]
    assert inside == [("memory", "/a/1"), ("memory", "/a/2"), ("memory_prefix", "/a/deep/")]
    full = await memories.list(store, view="full", limit=100)
    assert [one.content for one in full.data] == every
    with pytest.raises(anthropic.BadRequestError, match="path_prefix"):
        await memories.list(store, path_prefix="/a")
    with pytest.raises(anthropic.BadRequestError, match="cursor"):
        await memories.list(store, page="page_\u00e4")


async def test_full_views_have_at_most_twenty_to_a_page(client: AsyncAnthropic, store: str) -> None:
    for number in range(21):
        await client.beta.memory_stores.memories.create(store, path=f"/{number:02}", content="x")
    page = await client.beta.memory_stores.memories.list(store, view="full", limit=100)
    assert (len(page.data), len([one async for one in page])) == (20, 21)


async def test_a_session_writes_under_its_own_name(world: World, client: AsyncAnthropic, store: str) -> None:
    actor = Actor("session_actor", "sesn_1")
    fields = Fields({"path": "/s", "content": "by the agent"})
    async with world.means.db.transaction() as tx:
        await memory.create_memory(tx, KEYS["acme"], world.scribe(), store, fields, actor=actor)
    kept = await client.beta.memory_stores.memories.list(store, view="full")
    assert [one.content async for one in kept] == ["by the agent"]
    found = [one async for one in client.beta.memory_stores.memory_versions.list(store, session_id="sesn_1")]
    assert [one.created_by.session_id for one in found] == ["sesn_1"]


async def test_contents_have_a_bound_in_bytes(client: AsyncAnthropic, store: str) -> None:
    memories = client.beta.memory_stores.memories
    await memories.create(store, path="/most", content="x" * 102_400)
    await memories.create(store, path="/empty", content="")
    for content in ("x" * 102_401, "ä" * 51_201, None, 5, "a\0b"):
        with pytest.raises(anthropic.BadRequestError, match="content"):
            await client.post(
                f"/v1/memory_stores/{store}/memories", body={"path": "/p", "content": content}, cast_to=object
            )


@pytest.mark.parametrize(
    "path",
    [
        "",
        "a",
        "/",
        "//",
        "/a/",
        "/a//b",
        "/.",
        "/a/../b",
        "/" + "/".join("x" * 21),
        "/" + "x" * 1024,
        "/a\nb",
        "/a\u200fb",
        "/a\u2028b",
        "/é",
        "/" + "ä" * 512,
        None,
        5,
    ],
)
def test_bad_paths_are_refused(path: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        clean_path(path, "path")
    assert caught.value.field == "path"


@given(st.text(max_size=40))
def test_a_path_that_passes_is_kept_as_it_is_and_stays_inside(text: str) -> None:
    try:
        path = clean_path("/" + text, "path")
    except InvalidRequest:
        return
    assert path == "/" + text
    assert not {"", ".", ".."} & set(path.split("/")[1:])
    path.encode()
