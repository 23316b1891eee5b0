"""Repositories of a session: cloned from a real git server, used by the agent's own git, with no token inside."""

from __future__ import annotations

from collections.abc import AsyncIterator
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from anthropic import AsyncAnthropic, BadRequestError

from claude_wrapper.errors import InvalidRequest, PermissionDenied, SandboxUnavailable
from claude_wrapper.sandbox.choose import choose
from claude_wrapper.sandbox.probe import probe
from claude_wrapper.sessions.content import repositories
from claude_wrapper.sessions.content.gitgateway import Source, gateway
from claude_wrapper.sessions.content.manifest import Manifest
from claude_wrapper.sessions.content.repositories import CloneLimits, Cloning, check_name
from claude_wrapper.testing.clock import ManualClock
from content.git_server import TOKEN, GitServer, git_server, make_repository
from managed.driving import message, turn
from managed.workspaces import errors, ran, session_of
from running_server import KEY, running

pytestmark = [pytest.mark.anyio]


needs_git = pytest.mark.skipif(not Path("/usr/bin/git").exists(), reason="git is not installed here")


@pytest.fixture
async def git(reachable_tmp_path: Path) -> AsyncIterator[GitServer]:
    root = reachable_tmp_path / "repositories"
    root.mkdir()
    async with git_server(root) as one:
        yield one


async def test_slow_repositories_hold_a_turn_and_its_process_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, tried = ManualClock(), []

    async def slow(acting: object, cloning: Cloning, one: dict[str, str], workdir: object, path: str) -> None:
        tried.append(cloning.limits.seconds)
        await clock.advance(cloning.limits.seconds)
        raise repositories.RepositoryFailed(repositories.CLONE, "took too long")

    monkeypatch.setattr(repositories, "_put", slow)
    wanted = [
        {"id": f"r{at}", "url": f"https://slow.example/{at}", "mount_path": f"/workspace/{at}"} for at in range(5)
    ]
    acting: Any = SimpleNamespace(scribe=SimpleNamespace(clock=clock))
    cloning = Cloning(tmp_path, limits=CloneLimits(seconds=250, together=600))
    told = await repositories.put_repositories(acting, cloning, wanted, Any, Manifest())  # type: ignore[arg-type]
    assert tried == [250, 250, 100]
    assert ["next turn" in one.message for one in told] == [False, False, False, True, True]


@needs_git
@pytest.mark.real_cli
async def test_repositories_are_cloned_with_a_token_that_is_nowhere_inside(
    reachable_tmp_path: Path, git: GitServer
) -> None:
    try:
        choose("bwrap", None, probe())
    except SandboxUnavailable as error:
        pytest.skip(error.message)
    first = make_repository(git.root, "private")
    make_repository(git.root, "public")

    def repository(name: str, **fields: object) -> dict[str, object]:
        return {"type": "github_repository", "url": f"{git.url}/{name}", **fields}

    async with (
        running(
            reachable_tmp_path, sandbox="bwrap", security_level="permissive", private_networks=("127.0.0.0/8",)
        ) as server,
        AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0) as client,
    ):
        note = await client.beta.files.upload(file=("note.txt", b"a note", "text/plain"))
        with_token = {"authorization_token": TOKEN}
        session = await session_of(
            client,
            resources=[
                repository("private.git", **with_token, checkout={"type": "branch", "name": "side"}),
                repository(
                    "private.git",
                    **with_token,
                    mount_path="/workspace/old/one",
                    checkout={"type": "commit", "sha": first},
                ),
                repository("public.git"),
                {"type": "file", "file_id": note.id, "mount_path": "/workspace/public/NOTE"},
            ],
        )
        assert TOKEN not in session.model_dump_json()
        assert [one.mount_path for one in session.resources] == [
            *("/workspace/private", "/workspace/old/one", "/workspace/public", "/workspace/public/NOTE"),
        ]
        look = "cd /workspace; cat private/side.txt old/one/README public/README public/NOTE; git -C private remote -v | head -1; "
        look += "git -C private status --short --branch; git -C public log --oneline | wc -l"
        said = await ran(client, session.id, look)
        assert said.split("\n")[:3] == ["on the side", "first", "second"]
        assert "a note" in said
        assert f"{git.url}/private.git" in said
        assert "## side...origin/side" in said
        pattern = TOKEN.replace("-", "[-]")  # the transcript of this very command is in the home
        nowhere = f"grep -rl {pattern} /workspace /home/agent /mnt /tmp 2>/dev/null; env | grep {pattern}; echo done"
        assert await ran(client, session.id, nowhere) == "done"
        assert list((server.server.data_dir / "clones").iterdir()) == []

        for wrong, field in [
            (repository("x.git", mount_path="/etc/x"), "mount_path"),
            (repository("x.git", checkout={"type": "branch", "name": "--upload-pack=x"}), "checkout.name"),
            (repository("x.git", checkout={"type": "commit", "sha": "HEAD"}), "checkout.sha"),
            ({"type": "github_repository", "url": f"https://u:{TOKEN}@example.com/x"}, "url"),
            (repository("x.git", authorization_token="a b"), "authorization_token"),
        ]:
            with pytest.raises(BadRequestError, match=rf"resources\[0\]\.{field}") as refused:
                await session_of(client, resources=[wrong])
            assert TOKEN not in str(refused.value)
        with pytest.raises(BadRequestError, match=r"resources\[1\]\.mount_path"):
            await session_of(client, resources=[repository("x.git"), repository("x.git")])

        broken = await session_of(
            client,
            resources=[
                repository("private.git"),
                repository("missing.git", mount_path="/workspace/missing"),
                repository("forbidden.git", mount_path="/workspace/forbidden"),
                repository("moved.git", mount_path="/workspace/moved", **with_token),
                repository("public.git", checkout={"type": "branch", "name": "nowhere"}),
            ],
        )
        events = await turn(client, broken.id, message("hello"))
        assert [kind for kind, _ in errors(events)] == [
            *("repository_authentication_error", "repository_not_found_error", "repository_forbidden_error"),
            *("repository_clone_error", "repository_checkout_error"),
        ]
        assert events[-1].stop_reason.type == "end_turn"
        assert not any("127.0.0.1:1/" in path or "elsewhere" in path for _, path, _ in git.asked)
        await client.beta.sessions.resources.update(
            broken.resources[0].id, session_id=broken.id, authorization_token=TOKEN
        )
        again = await turn(client, broken.id, message("hello again"))
        assert "repository_authentication_error" not in [kind for kind, _ in errors(again)]


@needs_git
async def test_the_gateway_reads_and_does_nothing_else(git: GitServer) -> None:
    make_repository(git.root, "public")
    permitted = (ip_network("127.0.0.0/8"),)
    source = Source(f"{git.url}/public.git")
    async with gateway(source, permitted=permitted, most=10_000) as passage, aiohttp.ClientSession() as http:
        for method, path, status in [
            ("GET", f"{passage.url}/info/refs?service=git-upload-pack", 200),
            ("GET", f"{passage.url}/info/refs?service=git-receive-pack", 403),
            ("POST", f"{passage.url}/git-receive-pack", 403),
            ("GET", f"{passage.url}/HEAD", 403),
            ("GET", f"{passage.url}/../../private.git/info/refs?service=git-upload-pack", 404),
            ("GET", passage.url.replace("/public", "x/public") + "/info/refs?service=git-upload-pack", 404),
        ]:
            async with http.request(method, path) as answer:
                assert answer.status == status, path
    assert {path for _, path, _ in git.asked} == {"/public.git/info/refs?service=git-upload-pack"}
    async with gateway(source, permitted=permitted, most=10) as passage, aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientError):
            async with http.get(f"{passage.url}/info/refs?service=git-upload-pack") as answer:
                await answer.read()
        assert "more than 10 bytes" in str(passage.problem)


@pytest.mark.parametrize("url", ["http://127.0.0.1/x", "https://127.0.0.1/x", "https://[::1]/x", "https://u:p@h.org/x"])
async def test_private_addresses_and_credentials_in_urls_are_refused(url: str) -> None:
    with pytest.raises(PermissionDenied):
        async with gateway(Source(url), permitted=(), most=10):
            pass


@pytest.mark.parametrize("name", ["-x", "a..b", "a b", "a~1", "x.lock", "/a", "a/", "@", "a@{1}", "a\nb", "a//b"])
def test_what_is_no_branch_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="checkout"):
        check_name(name, "checkout.name")
