"""From a launch spec to the CLI's command line and environment. Pure, but for finding the binary.

What is fixed at spawn is the launch profile (the set of built-in tools, `--bare`, the kind of credential); everything
that belongs to a tenant is bound later over stdin, and the credential by the broker. The prompt is never an argument:
it goes over stdin, so a text that looks like a flag is only a text.
"""

from __future__ import annotations

import enum
import importlib.metadata
import os
import re
import uuid as uuid_module
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from claude_wrapper.errors import ConfigurationError

CLI_DISTRIBUTION = "claude-agent-sdk"
_CLI_IN_DISTRIBUTION = "claude_agent_sdk/_bundled/claude"
# Importing the package would cost 0.8 s and 60 MB for a path.


class Auth(enum.StrEnum):
    """Which credential variable the process gets; its value is a dummy that only the broker understands."""

    API_KEY = "api_key"
    OAUTH = "oauth"


_CREDENTIAL_VARIABLE: Mapping[Auth, str] = {
    Auth.API_KEY: "ANTHROPIC_API_KEY",
    Auth.OAUTH: "CLAUDE_CODE_OAUTH_TOKEN",
}


@dataclass(frozen=True, slots=True)
class LaunchProfile:
    """What is fixed at spawn. Spares are kept per profile."""

    name: str
    bare: bool
    """`--bare`: no hooks, plugins, memory or project files, and a prompt that is ten times smaller. API keys only."""
    tools: tuple[str, ...] | None
    """Built-in tools: None means the CLI's default set, an empty tuple none at all."""
    auth: Auth
    security: str = ""
    """The security level whose limits the process gets; empty: the server's own."""
    cli: str = ""
    """Which of the server's CLIs; empty: the main one."""

    def __post_init__(self) -> None:
        """Raises ConfigurationError for what the CLI would silently get wrong."""
        if self.bare and self.auth is Auth.OAUTH:
            raise ConfigurationError(f"profile {self.name}: --bare never reads an OAuth token; set bare=False")
        for tool in self.tools or ():
            if not _TOOL.fullmatch(tool):
                raise ConfigurationError(f"profile {self.name}: {tool!r} is not a tool's name")


_TOOL = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")

CHAT = LaunchProfile("chat", bare=True, tools=(), auth=Auth.API_KEY)
CHAT_OAUTH = LaunchProfile("chat", bare=False, tools=(), auth=Auth.OAUTH)
AGENT = LaunchProfile("agent", bare=False, tools=None, auth=Auth.API_KEY)
AGENT_OAUTH = LaunchProfile("agent", bare=False, tools=None, auth=Auth.OAUTH)


def agent_profile(tools: tuple[str, ...], auth: Auth = Auth.API_KEY, *, security: str = "") -> LaunchProfile:
    """The profile of agents with these built-in tools at this security level; equal for equal ones, so that spares can
    wait for them."""
    return LaunchProfile("agent", bare=False, tools=tools, auth=auth, security=security)


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One process to be started. Paths are as the process sees them."""

    profile: LaunchProfile
    cli: Path
    """On the host; the sandbox decides where the process sees it."""
    base_url: str
    socket: PurePosixPath | None
    """The broker's unix socket; the base URL must then be an http one (the CLI speaks HTTP over the socket)."""
    token: str = field(repr=False)
    """The dummy credential that the broker knows this slot by."""
    home: PurePosixPath
    work: PurePosixPath
    session_uuid: str | None
    """The CLI's session id for a new conversation; None lets the CLI choose."""
    resume_uuid: str | None
    """Continue the transcript with this id (`transcript_path`); excludes `session_uuid`."""
    model: str
    """Always explicit: the CLI's default differs by credential kind."""
    extra_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    proxy: str | None = None
    """URL of the proxy that is the process's way to the network, where it has one."""


_ALWAYS = (
    "-p",
    "--input-format",
    "stream-json",
    "--output-format",
    "stream-json",
    "--verbose",
    "--include-partial-messages",
    "--permission-prompt-tool",
    "stdio",
    "--setting-sources",
    "",
    "--strict-mcp-config",
)

_FIXED_ENV: Mapping[str, str] = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_BUG_COMMAND": "1",
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",  # memory is per home, and would carry one conversation into the next
    # A refusal is an answer, and a stream that broke off is an error: the CLI would ask again by itself, at the
    # caller's cost, and with another answer than the one that was shown (measured with 2.1.327).
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    # A turn is for its own model: sub-agents are not offered another (the broker would refuse it), and a model that was
    # asked for by its old name is not replaced by a new one.
    "CLAUDE_CODE_SUBAGENT_MODEL": "inherit",
    "CLAUDE_CODE_SUBAGENT_MODEL_FORCE": "1",
    "CLAUDE_CODE_DISABLE_LEGACY_MODEL_REMAP": "1",
    "CLAUDE_CODE_MAX_RETRIES": "0",  # the broker retries; the CLI's ten retries turn a wrong key into minutes
}

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,199}")
_RESERVED_PREFIXES = ("ANTHROPIC_", "CLAUDE_CODE_OAUTH", "CLAUDE_CODE_USE_", "LD_", "BUN_", "NODE_")
_RESERVED_NAMES = frozenset({"HOME", "PATH", "CLAUDE_CONFIG_DIR"}) | frozenset(_FIXED_ENV)
_NOT_THROUGH_PROXY = "localhost,127.0.0.1,::1,broker.invalid"
"""The model API is behind the unix socket; servers that the agent starts are its own."""
_PROXIES = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"})


def command(spec: LaunchSpec) -> tuple[tuple[str, ...], dict[str, str]]:
    """(arguments without argv[0], the whole environment).

    Raises ConfigurationError naming the field that cannot be used.
    """
    return _arguments(spec), _environment(spec)


def _arguments(spec: LaunchSpec) -> tuple[str, ...]:
    if not _MODEL.fullmatch(spec.model):
        raise ConfigurationError(f"model: {spec.model[:80]!r} cannot be a model's name")
    arguments = [*_ALWAYS, "--model", spec.model]
    profile = spec.profile
    if profile.bare:
        arguments.append("--bare")
    if profile.tools is not None:
        arguments += ["--tools", ",".join(profile.tools)]
    if spec.session_uuid is not None and spec.resume_uuid is not None:
        raise ConfigurationError("resume_uuid: a process cannot both resume a session and be given a new one's id")
    if spec.session_uuid is not None:
        arguments += ["--session-id", _checked_uuid(spec.session_uuid, "session_uuid")]
    if spec.resume_uuid is not None:
        arguments += ["--resume", _checked_uuid(spec.resume_uuid, "resume_uuid")]
    if spec.proxy is not None:
        # The CLI would ask api.anthropic.com, past its base URL, whether a host is safe to fetch.
        arguments += ["--settings", '{"skipWebFetchPreflight":true}']
    return tuple(arguments)


def _environment(spec: LaunchSpec) -> dict[str, str]:
    env = dict(_FIXED_ENV)
    env["HOME"] = str(spec.home)
    env["ANTHROPIC_BASE_URL"] = spec.base_url
    if spec.socket is not None:
        if not spec.base_url.startswith("http://"):
            raise ConfigurationError("base_url: must begin with http:// when the broker is reached by a unix socket")
        env["ANTHROPIC_UNIX_SOCKET"] = str(spec.socket)
    env[_CREDENTIAL_VARIABLE[spec.profile.auth]] = spec.token
    if spec.proxy is not None:
        for name in ("HTTPS_PROXY", "HTTP_PROXY"):
            env[name] = env[name.lower()] = spec.proxy
        env["NO_PROXY"] = env["no_proxy"] = _NOT_THROUGH_PROXY
    for name, value in spec.extra_env.items():
        _check_extra(name, value)
        env[name] = value
    for name, value in env.items():
        if "\0" in value:
            raise ConfigurationError(f"environment variable {name}: a value cannot hold a NUL")
    return env


def _check_extra(name: str, value: str) -> None:
    if not _ENV_NAME.fullmatch(name):
        raise ConfigurationError(f"extra_env: {name[:80]!r} is not a variable's name")
    if name in _RESERVED_NAMES or name.startswith(_RESERVED_PREFIXES) or name.upper() in _PROXIES:
        raise ConfigurationError(f"extra_env: {name} is decided by the server and cannot be set")
    if len(value) > 32_768:
        raise ConfigurationError(f"extra_env: the value of {name} is longer than 32768 characters")


def _checked_uuid(value: str, name: str) -> str:
    try:
        canonical = str(uuid_module.UUID(value))
    except ValueError:
        raise ConfigurationError(f"{name}: {value[:80]!r} is not a UUID") from None
    if canonical != value.lower():
        raise ConfigurationError(f"{name}: {value[:80]!r} is not a UUID in its usual form")
    return canonical


def locate_cli(override: str | None = None) -> Path:
    """The CLI binary: `override` when given, else the one inside the wheel of claude-agent-sdk.

    Raises ConfigurationError when it is missing or cannot be executed.
    """
    if override is not None:
        path, remedy = Path(override).expanduser().absolute(), "correct the setting CLI"
    else:
        remedy = f"install {CLI_DISTRIBUTION}, or name a binary with the setting CLI"
        try:
            distribution = importlib.metadata.distribution(CLI_DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigurationError(f"the package {CLI_DISTRIBUTION} is not installed: {remedy}") from None
        path = Path(str(distribution.locate_file(_CLI_IN_DISTRIBUTION)))
    if not path.is_file():
        raise ConfigurationError(f"there is no Claude CLI at {path}: {remedy}")
    if not os.access(path, os.X_OK):
        raise ConfigurationError(f"the Claude CLI at {path} is not executable: {remedy}")
    return path


def transcript_path(home: Path, work_inside: PurePosixPath, uuid: str) -> Path:
    """Where the CLI keeps the transcript of a session, on the host.

    `home` is the host's path of the process's HOME, `work_inside` its working directory as the process sees it.
    """
    project = re.sub(r"[^A-Za-z0-9]", "-", str(work_inside))
    return home / ".claude" / "projects" / project / f"{_checked_uuid(uuid, 'uuid')}.jsonl"
