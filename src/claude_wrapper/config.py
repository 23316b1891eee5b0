"""Settings: the only reader of the environment.

Every setting is one field of `Settings`, read from `CLAUDE_WRAPPER_<NAME>` or from the TOML file named by
`CLAUDE_WRAPPER_CONFIG` (or `--config`), in that order. Unknown keys are errors, in both places. The table in
`docs/settings.md` is rendered from these fields and a test compares the two.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from claude_wrapper.errors import ConfigurationError

PREFIX: Final = "CLAUDE_WRAPPER_"
CONFIG_FILE: Final = PREFIX + "CONFIG"

type_names: Final = {
    "str": "text",
    "bool": "true or false",
    "int": "whole number",
    "float": "number",
    "Path": "path",
    "list": "comma-separated list",
}


def _bool(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in {"true", "1", "yes", "on"}:
        return True
    if lowered in {"false", "0", "no", "off"}:
        return False
    raise ValueError("expected true or false")


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _path(text: str) -> Path:
    return Path(text).expanduser()


_PARSERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "str": str,
    "bool": _bool,
    "int": int,
    "float": float,
    "Path": _path,
    "list": _list,
}


def setting(
    default: Any,
    doc: str,
    *,
    kind: str = "str",
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    secret: bool = False,
    env: str | None = None,
    live: bool = False,
) -> Any:
    """One documented setting. `env` names a variable without our prefix that is read when ours is not set.

    `live`: a running server takes a new value over on SIGHUP.
    """
    meta = {
        "doc": doc,
        "kind": kind,
        "choices": choices,
        "minimum": minimum,
        "secret": secret,
        "env": env,
        "live": live,
    }
    return field(default=default, repr=not secret, metadata=meta)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything an operator can decide. Values are validated when they are read; nothing else reads the environment."""

    # Where it listens and keeps things
    data_dir: Path = setting(
        Path("./claude-wrapper-data"),
        "Directory of the database, blobs, keys and running slots. Made with mode 0700.",
        kind="Path",
    )
    host: str = setting("127.0.0.1", "Address to listen on. Set `0.0.0.0` to serve other machines.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one and prints it.", kind="int", minimum=0)
    drain_seconds: float = setting(
        30.0, "On SIGTERM, running turns and open streams get this long to end.", kind="float", minimum=0
    )
    internal_url: str | None = setting(
        None,
        "The URL by which other replicas reach this one, as `http://10.1.2.3:8000`; default: the address it listens on.",
    )
    lease_seconds: float = setting(
        15.0,
        "A replica that the database has not heard of for this long is taken for dead: others take over its sessions.",
        kind="float",
        minimum=1,
    )
    max_body_bytes: int = setting(
        32 * 2**20,
        "Largest request body of the Messages routes, in bytes (the API's own limit is 32 MB).",
        kind="int",
        minimum=1024,
    )
    # Who may call
    admin_key: str | None = setting(
        None,
        "The operator's API key. Without it one is made at the first start, printed once and kept (hashed) in the data directory.",
        secret=True,
    )
    allow_oauth: bool = setting(
        False,
        "Accept a subscription's OAuth tokens (`oauth_credentials`). They are for their owner's own use under the provider's terms.",
        kind="bool",
    )
    oauth_token_url: str = setting(
        "https://console.anthropic.com/v1/oauth/token",
        "Where the access tokens of stored OAuth credentials are refreshed before they end (JSON).",
    )
    oauth_client_id: str | None = setting(
        None,
        "The client that stored OAuth tokens were issued to, where a credential's `config.client_id` says nothing else. Without either they are used until they end.",
    )
    # Upstream
    upstream_url: str = setting(
        "https://api.anthropic.com", "Base URL of the model API (any server that speaks the Messages API)."
    )
    anthropic_api_key: str | None = setting(
        None, "The operator's own upstream key, for the operator's own people.", secret=True, env="ANTHROPIC_API_KEY"
    )
    default_model: str = setting(
        "claude-sonnet-5-5", "Model of callers that name none (only the routes that allow that)."
    )
    upstream_private: bool = setting(
        False,
        "Allow stored credentials to name an upstream by plain http or with a private address.",
        kind="bool",
    )
    private_networks: tuple[str, ...] = setting(
        (),
        "The operator's own networks, as `10.1.0.0/16`, that MCP servers and egress may reach although they are private.",
        kind="list",
    )
    upstream_connect_seconds: float = setting(10.0, "Time to connect to the model API.", kind="float", minimum=0.1)
    upstream_read_seconds: float = setting(
        300.0, "Longest silence of the model API within an answer.", kind="float", minimum=1
    )
    upstream_attempts: int = setting(
        3, "Attempts per upstream call, the first one included; only before the first byte.", kind="int", minimum=1
    )
    upstream_retry_share: float = setting(
        0.2,
        "Retries as a share of calls, in the long run, for each credential and for all credentials of one upstream together.",
        kind="float",
        minimum=0,
    )
    upstream_hedge_seconds: float = setting(
        0.0,
        "Token counts and model lists that take longer are asked a second time and the faster answer counts; 0 never does that.",
        kind="float",
        minimum=0,
    )
    breaker_failures: int = setting(
        5, "Consecutive failures that open the circuit breaker of an upstream and credential.", kind="int", minimum=1
    )
    breaker_seconds: float = setting(
        60.0, "How long an open breaker waits before its one probe.", kind="float", minimum=1
    )
    # The process
    cli: Path | None = setting(
        None, "The Claude CLI to run; default: the one in the claude-agent-sdk wheel.", kind="Path"
    )
    canary_cli: Path | None = setting(
        None, "A new version of the CLI that a share of the new conversations tries; see docs/canary.md.", kind="Path"
    )
    canary_share: float = setting(
        0.05, "Share of the new conversations that try the new version, 0 to 1.", kind="float", minimum=0
    )
    canary_min_turns: int = setting(
        20, "Turns of the new version before anything is concluded from them.", kind="int", minimum=1
    )
    canary_window_seconds: float = setting(3600.0, "Turns older than this are not compared.", kind="float", minimum=1)
    canary_worse_errors: float = setting(
        0.02, "How much higher the new version's error rate may be, 0 to 1.", kind="float", minimum=0
    )
    canary_slower: float = setting(
        1.5, "How many times as long the new version's median turn may take.", kind="float", minimum=1
    )
    sandbox: str = setting(
        "auto",
        "How processes are contained: `auto` takes the strongest level that this host can enforce; a named level that it cannot enforce stops the start.",
        choices=("auto", "none", "restricted", "bwrap"),
    )
    sandbox_require: str | None = setting(
        None, "Weakest sandbox that is acceptable; the start stops below it.", choices=("none", "restricted", "bwrap")
    )
    sandbox_uids: str | None = setting(
        None, "Range of uids for processes, as `first-last`; needs CAP_SETUID. Default when root: 200000-265535."
    )
    sandbox_disk: str = setting(
        "measured",
        "How the disk quota is kept: `measured` every few seconds, then the agent is stopped; `loop`, an ext4 image for each slot, enforced by the kernel. A host that has no loop devices for the server (root needed) stops the start.",
        choices=("measured", "loop"),
    )
    security_level: str = setting(
        "balanced", "What agents may do: see docs/security-levels.md.", choices=("strict", "balanced", "permissive")
    )
    security_loosest: str | None = setting(
        None,
        "The loosest level that an organisation's admin may choose for it; default: the server's own.",
        choices=("strict", "balanced", "permissive"),
    )
    egress_hosts: tuple[str, ...] = setting(
        (),
        "Hosts that sandboxes with an allow-list may reach, beside the built-in package registries and git hosts; `*.example.com` allows subdomains.",
        kind="list",
        live=True,
    )
    # Pool
    spares: int = setting(
        2, "Warm processes kept ready for new conversations of the chat profile.", kind="int", minimum=0
    )
    agent_spares: int = setting(
        1,
        "Warm processes kept ready for new agents: so many with all tools of the security level (`/v1/messages`), and so many with the toolset of `/v1/sessions`.",
        kind="int",
        minimum=0,
    )
    max_processes: int = setting(32, "Processes in all, spares included.", kind="int", minimum=1)
    max_processes_per_org: int = setting(24, "Processes that one organisation may hold.", kind="int", minimum=1)
    max_processes_per_principal: int = setting(24, "Processes that one key or user may hold.", kind="int", minimum=1)
    parallel_spawns: int = setting(2, "Processes that may be starting at once.", kind="int", minimum=1)
    idle_seconds: float = setting(
        300.0, "An idle conversation's process is ended after this; the conversation is kept.", kind="float", minimum=1
    )
    sweep_seconds: float = setting(
        60.0, "How often idle, old and large processes are looked for.", kind="float", minimum=0.1
    )
    freeze_seconds: float = setting(
        10.0, "An idle process is stopped (no CPU) after this; 0 never freezes.", kind="float", minimum=0
    )
    queue_seconds: float = setting(30.0, "Longest wait for a process.", kind="float", minimum=0)
    queue_length: int = setting(
        256, "Most requests waiting for a process; more are refused at once.", kind="int", minimum=0
    )
    max_turns: int = setting(200, "A process is replaced after this many turns.", kind="int", minimum=1)
    max_age_seconds: float = setting(
        6 * 3600.0, "A process is replaced after this long, when idle.", kind="float", minimum=1
    )
    max_resident_bytes: int = setting(
        1024 * 2**20, "A process that is larger than this (resident) is replaced, when idle.", kind="int", minimum=2**20
    )
    # Sessions
    session_seconds: float = setting(
        3600.0,
        "A conversation that nobody continued for this long is forgotten, if it was not named or created as a session.",
        kind="float",
        minimum=1,
    )
    held_session_seconds: float = setting(
        24 * 3600.0,
        "A named conversation or thread that nobody continued for this long is forgotten.",
        kind="float",
        minimum=1,
    )
    kept_seconds: float = setting(
        900.0,
        "A hibernated session whose files are stored is forgotten by this server, local files included, this long after its last turn; its next turn brings it back from the database and its snapshot.",
        kind="float",
        minimum=1,
    )
    max_queued_turns: int = setting(
        16, "Turns that may wait in one conversation; more are refused.", kind="int", minimum=1
    )
    turn_seconds: float | None = setting(
        None, "Longest turn; default: what the security level says.", kind="float", minimum=1
    )
    work_lease_seconds: int = setting(
        120,
        "How long the worker of a self-hosted environment may be silent before its session is given to another one.",
        kind="int",
        minimum=2,
    )
    # Storage
    database_url: str | None = setting(
        None, "SQLAlchemy URL (`postgresql+asyncpg://…`); default: SQLite in the data directory.", secret=True
    )
    redis_url: str | None = setting(
        None, "Redis or Valkey for shared state between replicas; default: this process's memory.", secret=True
    )
    blob_url: str | None = setting(
        None,
        "Where snapshots and files are kept: `s3://`, `gs://`, `az://` or a directory; default: in the data directory.",
    )
    snapshot_max_bytes: int = setting(
        16 << 30,
        "Largest workspace that is stored, in bytes; a larger one is told in its session.",
        kind="int",
        minimum=1,
    )
    snapshot_max_files: int = setting(
        1_000_000, "Most files, directories and links of a workspace that is stored.", kind="int", minimum=1
    )
    snapshot_stop_seconds: float = setting(
        30.0,
        "When the server stops, last snapshots get this long after the processes have ended.",
        kind="float",
        minimum=0,
    )
    snapshot_collect_seconds: float = setting(
        3600.0, "How often stored pieces that no session needs any more are removed.", kind="float", minimum=1
    )
    master_key: str | None = setting(
        None,
        "Master key of the vault (base64 of 32 bytes); default: a file of mode 0600 in the data directory.",
        secret=True,
    )
    kms_client: str | None = setting(
        None,
        "Keep the vault's master key in a KMS: `package.module:function`, which is called without arguments and gives a client (`claude_wrapper.vault.keys.KmsClient`). Needs `KMS_KEYS`, excludes `MASTER_KEY`.",
    )
    kms_keys: tuple[str, ...] = setting(
        (),
        "Names of the KMS's keys (an ARN, a resource name), separated by commas: new data keys are wrapped with the first one, the others can still be read.",
        kind="list",
    )
    key_pepper: str | None = setting(
        None,
        "Secret under which API keys are stored (replicas share it); default: a file of mode 0600 in the data directory.",
        secret=True,
    )
    # Cache
    cache_bytes: int = setting(
        64 * 2**20,
        "Most bytes of token counts, model lists, tool results and answers that are kept to be given again, in this process or in Redis; 0 keeps nothing.",
        kind="int",
        minimum=0,
    )
    cache_entry_bytes: int = setting(
        2 * 2**20, "Largest value that the cache keeps, in bytes.", kind="int", minimum=1024
    )
    cache_count_seconds: float = setting(
        3600.0, "How long a token count is kept; 0 asks each time.", kind="float", minimum=0
    )
    cache_models_seconds: float = setting(
        300.0, "How long a model list is kept; 0 asks each time.", kind="float", minimum=0
    )
    # Limits
    key_limits: str = setting(
        "", "Limits of every API key without its own, as in `requests=100/hour, concurrent_turns=4`.", live=True
    )
    user_limits: str = setting("", "Limits of every user without their own.", live=True)
    workspace_limits: str = setting("", "Limits of every workspace without its own.", live=True)
    org_limits: str = setting("", "Limits of every organisation without its own.", live=True)
    rates_without_store: str = setting(
        "open",
        "Rate limits while shared state is away: let through (`open`) or refuse (`closed`).",
        choices=("open", "closed"),
        live=True,
    )
    budgets_without_store: str = setting(
        "closed",
        "Budgets while shared state is away: let through (`open`) or refuse (`closed`).",
        choices=("open", "closed"),
        live=True,
    )
    price_file: Path | None = setting(None, "Prices to use instead of the packaged list.", kind="Path")
    # Watching it
    log_level: str = setting(
        "info", "Least severe log lines to write.", choices=("debug", "info", "warning", "error"), live=True
    )
    log_format: str = setting(
        "auto", "`json`, `console`, or `auto`: console on a terminal.", choices=("auto", "json", "console")
    )
    log_sample: float = setting(
        1.0,
        "Share of the lines per request and turn to keep, 0 to 1; warnings and errors are always kept.",
        kind="float",
        minimum=0,
        live=True,
    )
    metrics_public: bool = setting(
        False,
        "Serve `/metrics` without a key. They tell of all organisations together: only where nobody else can reach the port.",
        kind="bool",
    )
    metrics_org_label: bool = setting(
        False, "Give metrics a label with the organisation's id (unbounded: small installations only).", kind="bool"
    )

    otel_endpoint: str | None = setting(
        None,
        "OTLP collector for traces and metrics, as `http://collector:4318` (needs the extra `otel`); default: none.",
    )
    otel_sample: float = setting(
        1.0, "Share of new traces to keep, 0 to 1; a caller's own decision is respected.", kind="float", minimum=0
    )
    otel_metrics_seconds: float = setting(
        60.0, "How often the metrics are sent to the OTLP collector; 0: traces only.", kind="float", minimum=0
    )
    # Protecting it
    shed_memory_share: float = setting(
        0.95,
        "New turns are refused (529) while this share of the memory (the cgroup's, else the machine's) is in use.",
        kind="float",
        minimum=0,
        live=True,
    )
    shed_pressure: float = setting(
        20.0,
        "New turns are refused while all work waited for memory in this percentage of the last ten seconds (PSI `full`).",
        kind="float",
        minimum=0,
        live=True,
    )
    shed_lag_seconds: float = setting(
        5.0, "New turns are refused while the event loop wakes this late.", kind="float", minimum=0, live=True
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            _check(one, getattr(self, one.name))


def _check(one: dataclasses.Field[Any], value: Any) -> None:
    name = PREFIX + one.name.upper()
    if value is None:
        return
    choices: tuple[str, ...] = one.metadata["choices"]
    if choices and value not in choices:
        raise ConfigurationError(f"{name}: {value!r} is not one of {', '.join(choices)}")
    minimum = one.metadata["minimum"]
    if minimum is not None and value < minimum:
        raise ConfigurationError(f"{name}: {value} is below the least value {minimum}")


def load(environ: Mapping[str, str], *, file: Path | None = None, **overrides: Any) -> Settings:
    """Settings from the environment, then the TOML file, then the defaults; `overrides` (command line) win.

    Raises ConfigurationError with the name of the offending key.
    """
    known = {one.name: one for one in fields(Settings)}
    if file is None and (named := environ.get(CONFIG_FILE)):
        file = Path(named).expanduser()
    values: dict[str, Any] = dict(_from_file(file, known)) if file else {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable == CONFIG_FILE:
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in known:
            raise ConfigurationError(f"{variable}: there is no such setting; see docs/settings.md")
        values[name] = _parse(variable, known[name], text)
    for name, one in known.items():
        fallback = one.metadata["env"]
        if fallback and name not in values and environ.get(fallback):
            values[name] = _parse(fallback, one, environ[fallback])
    values.update({name: value for name, value in overrides.items() if value is not None})
    return Settings(**values)


def _from_file(file: Path, known: Mapping[str, dataclasses.Field[Any]]) -> Mapping[str, Any]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{file}: cannot be read as TOML: {error}") from error
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in known:
            raise ConfigurationError(f"{file}: there is no setting {name!r}; see docs/settings.md")
        kind = known[name].metadata["kind"]
        text = ",".join(map(str, value)) if isinstance(value, list) and kind == "list" else _toml_text(value)
        values[name] = _parse(f"{file}: {name}", known[name], text)
    return values


def _toml_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse(where: str, one: dataclasses.Field[Any], text: str) -> Any:
    kind: str = one.metadata["kind"]
    if text == "" and one.default is None:
        return None
    try:
        return _PARSERS[kind](text)
    except ValueError as error:
        shown = "" if one.metadata["secret"] else f" {text!r}"
        raise ConfigurationError(f"{where}:{shown} is not a {type_names[kind]}") from error


def changed(before: Settings, after: Settings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(those that a running server can take over, those that need a restart) of the settings that differ, by name."""
    differ = [one for one in fields(Settings) if getattr(before, one.name) != getattr(after, one.name)]
    live = tuple(one.name for one in differ if one.metadata["live"])
    return live, tuple(one.name for one in differ if not one.metadata["live"])


def documentation() -> str:
    """The settings as a Markdown table: the content of `docs/settings.md`."""
    lines = [
        "# Settings",
        "",
        "Read from the environment, else from the TOML file named by `CLAUDE_WRAPPER_CONFIG` (same names in lower case, without the prefix).",
        "An unknown key, in either place, stops the start. What is *live* is taken over by a running server on SIGHUP; the rest needs a",
        "restart. This page is generated (`make docs`).",
        "",
        "| variable | type | default | what it decides |",
        "|---|---|---|---|",
    ]
    for one in fields(Settings):
        meta = one.metadata
        kind = " \\| ".join(f"`{c}`" for c in meta["choices"]) or type_names[meta["kind"]]
        default = (
            ""
            if one.default is None or one.default == ()
            else f"`{str(one.default).lower() if isinstance(one.default, bool) else one.default}`"
        )
        doc = (
            meta["doc"]
            + (f" Also read from `{meta['env']}`." if meta["env"] else "")
            + (" Secret." if meta["secret"] else "")
            + (" *Live.*" if meta["live"] else "")
        )
        lines.append(f"| `{PREFIX}{one.name.upper()}` | {kind} | {default} | {doc} |")
    return "\n".join(lines) + "\n"
