"""The command line and the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from claude_wrapper.agent.launch import (
    AGENT,
    AGENT_OAUTH,
    CHAT,
    CHAT_OAUTH,
    Auth,
    LaunchProfile,
    LaunchSpec,
    command,
    locate_cli,
    transcript_path,
)
from claude_wrapper.errors import ConfigurationError

UUID = "6f4a1c8e-1111-4222-8333-444455556666"
SPEC = LaunchSpec(
    profile=CHAT,
    cli=Path("/opt/claude"),
    base_url="http://broker.invalid",
    socket=PurePosixPath("/run/broker/api.sock"),
    token="sk-ant-dummy-secret",
    home=PurePosixPath("/home/agent"),
    work=PurePosixPath("/work"),
    session_uuid=None,
    resume_uuid=None,
    model="claude-sonnet-5-5",
)


def test_the_environment_holds_what_was_put_there_and_nothing_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the server")
    _argv, env = command(SPEC)
    assert env == {
        "HOME": "/home/agent",
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "ANTHROPIC_BASE_URL": "http://broker.invalid",
        "ANTHROPIC_UNIX_SOCKET": "/run/broker/api.sock",
        "ANTHROPIC_API_KEY": "sk-ant-dummy-secret",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_ERROR_REPORTING": "1",
        "DISABLE_BUG_COMMAND": "1",
        "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
        "CLAUDE_CODE_SUBAGENT_MODEL": "inherit",
        "CLAUDE_CODE_SUBAGENT_MODEL_FORCE": "1",
        "CLAUDE_CODE_DISABLE_LEGACY_MODEL_REMAP": "1",
        "CLAUDE_CODE_MAX_RETRIES": "0",
        "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
        "CLAUDE_CODE_DISABLE_REFUSAL_FALLBACK": "1",
        "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    }


def test_a_process_with_network_knows_its_proxy_and_keeps_the_model_off_it() -> None:
    import dataclasses

    argv, env = command(dataclasses.replace(SPEC, proxy="http://127.0.0.1:3128"))
    assert env["HTTPS_PROXY"] == env["https_proxy"] == env["HTTP_PROXY"] == "http://127.0.0.1:3128"
    assert "broker.invalid" in env["NO_PROXY"].split(",")
    assert argv[argv.index("--settings") + 1] == '{"skipWebFetchPreflight":true}'
    assert "--settings" not in command(SPEC)[0]


@pytest.mark.parametrize(
    ("profile", "bare", "tools", "variable"),
    [
        (CHAT, True, "", "ANTHROPIC_API_KEY"),
        (CHAT_OAUTH, False, "", "CLAUDE_CODE_OAUTH_TOKEN"),
        (AGENT, False, None, "ANTHROPIC_API_KEY"),
        (AGENT_OAUTH, False, None, "CLAUDE_CODE_OAUTH_TOKEN"),
        (LaunchProfile("few", False, ("Read", "Bash"), Auth.API_KEY), False, "Read,Bash", "ANTHROPIC_API_KEY"),
    ],
)
def test_a_profile_decides_tools_and_the_one_credential_variable(
    profile: LaunchProfile, bare: bool, tools: str | None, variable: str
) -> None:
    argv, env = command(replace(SPEC, profile=profile))
    assert ("--bare" in argv) is bare
    assert ("--tools" in argv) is (tools is not None)
    if tools is not None:
        assert argv[argv.index("--tools") + 1] == tools
    credentials = {"ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_AUTH_TOKEN"} & set(env)
    assert credentials == {variable}


def test_a_session_is_named_or_resumed_and_never_both() -> None:
    assert command(replace(SPEC, session_uuid=UUID))[0][-2:] == ("--session-id", UUID)
    assert command(replace(SPEC, resume_uuid=UUID))[0][-2:] == ("--resume", UUID)
    with pytest.raises(ConfigurationError, match="resume_uuid"):
        command(replace(SPEC, session_uuid=UUID, resume_uuid=UUID))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"session_uuid": "--help"}, "session_uuid"),
        ({"resume_uuid": "../../etc"}, "resume_uuid"),
        ({"resume_uuid": "{" + UUID + "}"}, "resume_uuid"),
        ({"model": "--dangerously-skip-permissions"}, "model"),
        ({"model": "a\0b"}, "model"),
        ({"model": ""}, "model"),
        ({"base_url": "https://x"}, "base_url"),
        ({"token": "a\0b"}, "ANTHROPIC_API_KEY"),
        ({"extra_env": {"A=B": "1"}}, "A=B"),
        ({"extra_env": {"ANTHROPIC_BASE_URL": "http://evil"}}, "ANTHROPIC_BASE_URL"),
        ({"extra_env": {"LD_PRELOAD": "x"}}, "LD_PRELOAD"),
        ({"extra_env": {"HOME": "/"}}, "HOME"),
        ({"extra_env": {"https_proxy": "x"}}, "https_proxy"),
        ({"extra_env": {"DISABLE_TELEMETRY": "0"}}, "DISABLE_TELEMETRY"),
        ({"extra_env": {"OK": "a\0"}}, "OK"),
        ({"extra_env": {"OK": "a" * 40_000}}, "OK"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        command(replace(SPEC, **change))
    assert named in caught.value.message


def test_extra_variables_are_added() -> None:
    assert command(replace(SPEC, extra_env={"IS_SANDBOX": "1"}))[1]["IS_SANDBOX"] == "1"


def test_a_profile_that_the_cli_would_get_wrong_cannot_be_made() -> None:
    with pytest.raises(ConfigurationError, match="--bare"):
        LaunchProfile("x", True, (), Auth.OAUTH)
    with pytest.raises(ConfigurationError, match="tool"):
        LaunchProfile("x", False, ("Read,Bash",), Auth.API_KEY)


def test_the_token_is_not_in_the_spec_that_is_printed() -> None:
    assert "secret" not in repr(SPEC)


def test_the_binary_is_found_without_importing_the_sdk(real_cli: Path) -> None:
    script = (
        "import sys; from claude_wrapper.agent.launch import locate_cli; print(locate_cli()); "
        "sys.exit('claude_agent_sdk' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, env=os.environ)
    assert (done.returncode, done.stdout.strip()) == (0, str(real_cli))


def test_a_named_binary_must_be_there_and_executable(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no Claude CLI"):
        locate_cli(str(tmp_path / "none"))
    plain = tmp_path / "plain"
    plain.write_text("")
    with pytest.raises(ConfigurationError, match="not executable"):
        locate_cli(str(plain))
    plain.chmod(0o755)
    assert locate_cli(str(plain)) == plain


def test_a_transcript_is_found_by_its_working_directory_as_the_process_sees_it() -> None:
    path = transcript_path(Path("/srv/slot/home"), PurePosixPath("/work/a.b_c"), UUID)
    assert path == Path(f"/srv/slot/home/.claude/projects/-work-a-b-c/{UUID}.jsonl")
    with pytest.raises(ConfigurationError):
        transcript_path(Path("/srv"), PurePosixPath("/work"), "../../../etc/passwd")
