"""What an environment leaves of the network, and the packages that it installs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.broker.egresslists import OPEN, REGISTRIES, REGISTRIES_AND_GIT
from claude_wrapper.broker.hosts import HostRules
from claude_wrapper.errors import SandboxUnavailable
from claude_wrapper.sandbox.choose import choose
from claude_wrapper.sandbox.probe import probe
from claude_wrapper.sessions.content.network import hosts_of
from claude_wrapper.sessions.content.packages import failure, stamp, steps, wanted
from managed.driving import message, turn
from managed.workspaces import bash, errors, ran, session_of
from running_server import KEY, running

pytestmark = [pytest.mark.anyio]

HOSTS = st.lists(st.sampled_from(["a.example", "*.example", "pypi.org", "github.com", "evil.test"]), max_size=4)


def limited(hosts: list[str], *, managers: bool = False) -> dict[str, Any]:
    """An environment with limited networking."""
    networking = {"type": "limited", "allowed_hosts": hosts}
    return {"networking": networking | {"allow_package_managers": managers}}


@given(HOSTS, st.booleans(), st.sampled_from(["a.example", "b.example", "pypi.org", "github.com", "evil.test"]))
def test_an_environment_only_narrows_what_the_server_allows(hosts: list[str], managers: bool, asked: str) -> None:
    for level in (REGISTRIES_AND_GIT, OPEN, ()):
        whole = HostRules.parse(level)
        narrowed = HostRules(whole.allow, hosts_of(limited(hosts, managers=managers)))
        for port in (443, 8443):
            allowed = narrowed.allows(asked, port)
            assert allowed <= whole.allows(asked, port)
            named = asked in hosts or ("*.example" in hosts and asked.endswith(".example"))
            named = named or (managers and asked in REGISTRIES)
            assert allowed == (named and whole.allows(asked, port))


def test_without_limits_an_environment_leaves_everything() -> None:
    assert hosts_of(None) is None
    assert hosts_of({"networking": {"type": "unrestricted"}}) is None


def test_packages_are_quoted_and_what_needs_root_is_refused_by_name() -> None:
    packages = wanted({"packages": {"type": "packages", "apt": ["ffmpeg"], "pip": ["a==1", "b[c]>=2;x"], "npm": []}})
    assert packages == {"apt": ["ffmpeg"], "pip": ["a==1", "b[c]>=2;x"]}
    [step], [refused] = steps(packages)
    assert step.manager == "pip"
    assert "-- a==1 'b[c]>=2;x'" in step.script
    assert "ffmpeg" in refused
    assert "operator" in refused
    assert stamp(packages) != stamp({"pip": ["a==1"]}) != stamp({}) == ""
    assert "is not in the sandbox" in failure(step, 97, "")


def wheel() -> bytes:
    """A package `pear` of one module and one program."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        packed.writestr("pear.py", "def main():\n    print('a pear')\n")
        info = "pear-1.0.dist-info"
        packed.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: pear\nVersion: 1.0\n")
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{info}/entry_points.txt", "[console_scripts]\npear = pear:main\n")
        packed.writestr(f"{info}/RECORD", "")
    return out.getvalue()


@pytest.mark.real_cli
async def test_packages_are_installed_inside_once_and_limited_hosts_are_all_there_is(reachable_tmp_path: Path) -> None:
    try:
        choose("bwrap", None, probe())
    except SandboxUnavailable as error:
        pytest.skip(error.message)
    if not Path("/usr/bin/pip3").exists():
        pytest.skip("the host has no pip that a sandbox could see")
    async with (
        running(reachable_tmp_path, sandbox="bwrap", security_level="permissive") as server,
        AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0) as client,
    ):
        file = await client.beta.files.upload(file=("pear-1.0-py3-none-any.whl", wheel(), "application/zip"))
        path = "/workspace/wheels/pear-1.0-py3-none-any.whl"
        networking = {"type": "limited", "allowed_hosts": ["only.invalid"], "allow_package_managers": True}
        packages = {"pip": [f"pear@file://{path}"], "apt": ["ffmpeg"]}
        session = await session_of(
            client,
            config={"type": "cloud", "networking": networking, "packages": packages},
            resources=[{"type": "file", "file_id": file.id, "mount_path": path}],
        )
        ask = "~/.local/bin/pear; python3 -c 'import pear; pear.main()'; "
        ask += "for host in only unlisted; do curl -sS --max-time 20 https://$host.invalid/ 2>&1; done; true"
        events = await turn(client, session.id, bash(ask))
        assert [(kind, "ffmpeg" in said) for kind, said in errors(events)] == [("package_install_error", True)]
        said = str([event.content for event in events if event.type == "agent.tool_result"])
        assert said.count("a pear") == 2
        assert "502" in said, "the allowed host is let through, and does not exist"
        assert said.count("403") == 1, "the other one is refused"
        assert await ran(client, session.id, "pear 2>/dev/null; ~/.local/bin/pear") == "a pear"

        missing = {"pip": ["pear@file:///workspace/nothing.whl"]}
        broken = await session_of(client, config={"type": "cloud", "packages": missing})
        events = await turn(client, broken.id, message("hello"))
        [(kind, told)] = errors(events)
        assert kind == "package_install_error"
        assert "nothing.whl" in told
        assert events[-1].stop_reason.type == "end_turn"
