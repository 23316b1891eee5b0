"""Skills through the official SDK, and what an upload may not hold."""

from __future__ import annotations

import io
import stat
import zipfile

import anthropic
import pytest
from anthropic import AsyncAnthropic
from hypothesis import given
from hypothesis import strategies as st
from resources_world import World

from claude_wrapper.errors import InvalidRequest, RequestTooLarge
from claude_wrapper.sessions.resources import skillfiles
from claude_wrapper.sessions.resources.skillfiles import front_matter, read_skill

pytestmark = pytest.mark.anyio

MANIFEST = b"---\nname: pdf-tools\ndescription: Fills forms.\n---\n# How\n"


def upload(manifest: bytes = MANIFEST, **more: bytes) -> list[tuple[str, bytes]]:
    others = [(f"pdf-tools/{name}", content) for name, content in more.items()]
    return [("pdf-tools/SKILL.md", manifest), *others]


def zipped(files: dict[str, bytes], mode: int = stat.S_IFREG | 0o644) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, mode << 16
            packed.writestr(info, content, zipfile.ZIP_DEFLATED)
    return out.getvalue()


async def test_a_skill_lives_through_versions(world: World, client: AsyncAnthropic) -> None:
    skill = await client.beta.skills.create(files=upload(**{"run.py": b"print(1)"}))
    assert (skill.display_name, skill.source.type, skill.type) == ("pdf-tools", "custom", "skill")
    second = await client.beta.skills.versions.create(skill.id, files=upload(MANIFEST.replace(b"Fills", b"Reads")))
    assert (second.name, second.description, second.skill_id) == ("pdf-tools", "Reads forms.", skill.id)
    now = await client.beta.skills.retrieve(skill.id)
    assert now.latest_version_id == second.id
    assert [one.id async for one in client.beta.skills.versions.list(skill.id, limit=1)] == [
        second.id,
        skill.latest_version_id,
    ]
    first = await client.beta.skills.versions.retrieve(skill.latest_version_id, skill_id=skill.id)
    assert first.description == "Fills forms."
    answer = await client.beta.skills.versions.download(first.id, skill_id=skill.id)
    content = await answer.read()
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        assert packed.namelist() == ["pdf-tools/SKILL.md", "pdf-tools/run.py"]
        assert packed.read("pdf-tools/run.py") == b"print(1)"
    assert all(b"Fills" not in path.read_bytes() for path in world.stored())
    gone = await client.beta.skills.versions.delete(second.id, skill_id=skill.id)
    assert (gone.id, gone.type) == (second.id, "skill_version_deleted")
    assert (await client.beta.skills.retrieve(skill.id)).latest_version_id == first.id
    with pytest.raises(anthropic.ConflictError):
        await client.beta.skills.versions.delete(first.id, skill_id=skill.id)
    assert (await client.beta.skills.delete(skill.id)).type == "skill_deleted"
    assert world.stored() == []
    assert [one.id async for one in client.beta.skills.list()] == []


async def test_an_agent_pins_the_version_that_is_the_newest_now(client: AsyncAnthropic) -> None:
    skill = await client.beta.skills.create(files=upload(), display_name="PDF tools")
    assert skill.display_name == "PDF tools"
    wanted = {"type": "custom", "skill_id": skill.id}
    agent = await client.beta.agents.create(model="claude-sonnet-5-5", name="A", skills=[wanted])
    assert agent.skills[0].version == skill.latest_version_id
    newer = await client.beta.skills.versions.create(skill.id, files=upload())
    assert (await client.beta.agents.retrieve(agent.id)).skills[0].version == skill.latest_version_id
    changed = await client.beta.agents.update(agent.id, skills=[wanted])
    assert changed.skills[0].version == newer.id


async def test_a_zip_is_taken_too(client: AsyncAnthropic) -> None:
    archive = zipped({"pdf-tools/SKILL.md": MANIFEST, "pdf-tools/a/b.txt": b"x"})
    skill = await client.beta.skills.create(files=[("pdf-tools.zip", archive)])
    assert skill.display_name == "pdf-tools"


async def test_bad_uploads_are_refused_and_leave_nothing(world: World, client: AsyncAnthropic) -> None:
    skill = await client.beta.skills.create(files=upload())
    kept = world.stored()
    with pytest.raises(anthropic.BadRequestError, match="cannot be changed"):
        await client.beta.skills.versions.create(
            skill.id, files=[("x/SKILL.md", MANIFEST.replace(b"pdf-tools", b"other"))]
        )
    with pytest.raises(anthropic.BadRequestError, match=r"SKILL\.md"):
        await client.beta.skills.create(files=[("pdf-tools/README.md", b"x")])
    with pytest.raises(anthropic.BadRequestError, match="relative path"):
        await client.beta.skills.create(files=[*upload(), ("pdf-tools/../../x", b"x")])
    link = zipped({"pdf-tools/SKILL.md": MANIFEST, "pdf-tools/x": b"/etc/passwd"}, stat.S_IFLNK | 0o777)
    with pytest.raises(anthropic.BadRequestError, match="link"):
        await client.beta.skills.create(files=[("a.zip", link)])
    assert world.stored() == kept
    assert [one.id async for one in client.beta.skills.list()] == [skill.id]


@pytest.mark.parametrize(
    "path",
    [
        "/abs/x",
        "pdf-tools/../x",
        "pdf-tools//x",
        "./pdf-tools/x",
        "pdf-tools/a\\b",
        "other/x",
        "x",
        "pdf-tools/a\x00b",
        "pdf-tools/" + "d/" * 20 + "x",
        "pdf-tools/" + "x" * 300,
        "pdf-tools/skill.md",
        "pdf-tools/SKILL.md/x",
        "C:/x",
    ],
)
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(InvalidRequest):
        read_skill([*upload(), (path, b"x")])
    with pytest.raises(InvalidRequest):
        read_skill([("a.zip", zipped({"pdf-tools/SKILL.md": MANIFEST, path.replace("\x00", "\x01"): b"x"}))])


def test_too_many_and_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="at most 500"):
        read_skill(upload(**{f"f{number}": b"" for number in range(500)}))
    monkeypatch.setattr(skillfiles, "MAX_BYTES", 1000)
    with pytest.raises(RequestTooLarge):
        read_skill(upload(big=bytes(1000)))
    bomb = zipped({"pdf-tools/SKILL.md": MANIFEST, "pdf-tools/zeros": bytes(10**6)})
    assert len(bomb) < 3000
    with pytest.raises(RequestTooLarge):
        read_skill([("bomb.zip", bomb)])
    damaged = bytearray(zipped({"pdf-tools/SKILL.md": MANIFEST * 50}))
    damaged[60] ^= 0xFF
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_skill([("damaged.zip", bytes(damaged))])


@pytest.mark.parametrize(
    ("front", "fields"),
    [
        ("name: a\ndescription: b c", {"name": "a", "description": "b c"}),
        ("name: \"a\"\ndescription: 'it''s'", {"name": "a", "description": "it's"}),
        ("description: >\n  one\n  two\nname: a", {"description": "one two", "name": "a"}),
        ("description: |\n  one\n  two\n", {"description": "one\ntwo"}),
        ("description: one\n  two # note\n", {"description": "one two"}),
        ("tools:\n  - a\n  - b\nname: x", {"tools": "- a - b", "name": "x"}),
        ("# note\nname: a: b", {"name": "a: b"}),
    ],
)
def test_front_matter_is_read(front: str, fields: dict[str, str]) -> None:
    assert front_matter(f"---\n{front}\n---\nbody: no".encode()) == fields


@pytest.mark.parametrize("content", [b"", b"name: a", b"---\nname: a", b"\xff\xfe", b"---\nname: a\0\n---\n"])
def test_front_matter_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest):
        front_matter(content)


@pytest.mark.parametrize(
    "manifest",
    [
        b"---\nname: A B\ndescription: x\n---\n",
        b"---\nname: a\n---\n",
        b"---\nname: a\ndescription: ''\n---\n",
        b"---\nname: " + b"a" * 65 + b"\ndescription: x\n---\n",
        b"---\nname: a\ndescription: " + b"x" * 1025 + b"\n---\n",
    ],
)
def test_names_and_descriptions_have_bounds(manifest: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_skill(upload(manifest))


@given(st.binary(max_size=300))
def test_no_bytes_make_the_reader_fail_otherwise(content: bytes) -> None:
    for uploads in ([("a/SKILL.md", content)], [("a.zip", b"PK\x03\x04" + content)]):
        try:
            read_skill(uploads)
        except (InvalidRequest, RequestTooLarge):
            continue


def test_the_same_files_make_the_same_archive() -> None:
    files = upload(a=b"1", b=b"2")
    assert read_skill(files).archive() == read_skill(list(reversed(files))).archive()
