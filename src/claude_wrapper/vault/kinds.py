"""What kinds of upstream credential there are, and what each needs: one table."""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

from claude_wrapper.errors import InvalidRequest


class CredentialKind(enum.StrEnum):
    """How the model API is reached."""

    API_KEY = "api_key"
    OAUTH = "oauth"
    BEDROCK = "bedrock"
    VERTEX = "vertex"
    FOUNDRY = "foundry"
    CUSTOM = "custom"


@dataclass(frozen=True, slots=True)
class KindRules:
    """What a credential of one kind consists of."""

    provider: str
    main: tuple[str, ...]
    """Secret fields of which exactly one must be given; it is the one that is shown by its last characters."""
    secret: tuple[str, ...] = ()
    """Further secret fields, allowed."""
    required: tuple[str, ...] = ()
    """Settings that must be given."""
    optional: tuple[str, ...] = ()
    """Settings that may be given."""
    base_url: str | None = None
    """Where requests go when the credential says nothing else; with `{name}` of settings in it. None: must be given."""
    own_base_url: bool = True
    """Whether the tenant may name a base URL."""


ANTHROPIC_URL: Final = "https://api.anthropic.com"

RULES: Final[Mapping[CredentialKind, KindRules]] = MappingProxyType(
    {
        CredentialKind.API_KEY: KindRules("anthropic", ("api_key",), base_url=ANTHROPIC_URL, own_base_url=False),
        CredentialKind.OAUTH: KindRules(
            "anthropic",
            ("access_token",),
            secret=("refresh_token",),
            optional=("client_id", "scopes", "subscription_type"),
            base_url=ANTHROPIC_URL,
            own_base_url=False,
        ),
        CredentialKind.BEDROCK: KindRules(
            "bedrock",
            ("api_key", "secret_access_key"),
            secret=("access_key_id", "session_token"),
            required=("region",),
            base_url="https://bedrock-runtime.{region}.amazonaws.com",
        ),
        CredentialKind.VERTEX: KindRules(
            "vertex",
            ("service_account_json", "access_token"),
            required=("project", "region"),
            base_url="https://{region}-aiplatform.googleapis.com",
        ),
        CredentialKind.FOUNDRY: KindRules(
            "foundry",
            ("api_key",),
            required=("resource",),
            base_url="https://{resource}.services.ai.azure.com/anthropic",
        ),
        CredentialKind.CUSTOM: KindRules("custom", ("api_key",), optional=("auth",)),
    }
)

MAX_SECRET: Final = 20_000
_SETTING: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:@/\-]{0,511}")
# What goes into a host name: nothing there may begin a path, a port or another host.
_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9\-]{0,61}[a-z0-9])?")
_IN_HOST: Final = frozenset({"region", "resource"})


@dataclass(frozen=True, slots=True)
class UrlPolicy:
    """Which base URLs tenants may name. The broker checks again what the name resolves to."""

    allow_http: bool = False
    allow_private: bool = False
    """Loopback and private addresses: for tests and for operators whose gateway stands in their own network."""


def clean_secret(kind: CredentialKind, given: Mapping[str, Any], *, field: str = "secret") -> dict[str, str]:
    """The secret fields of a credential. Raises InvalidRequest that names a field and never its value."""
    rules = RULES[kind]
    if unknown := sorted(given.keys() - {*rules.main, *rules.secret}):
        raise InvalidRequest(f"is not part of a credential of the kind {kind}", field=f"{field}.{_shown(unknown[0])}")
    for name, value in given.items():
        if not isinstance(value, str) or not 0 < len(value) <= MAX_SECRET or not value.isprintable():
            if name == "service_account_json" and isinstance(value, str) and 0 < len(value) <= MAX_SECRET:
                continue  # the only one that has lines
            raise InvalidRequest(f"must be text of 1 to {MAX_SECRET} printable characters", field=f"{field}.{name}")
    mains = [name for name in rules.main if name in given]
    if len(mains) != 1:
        raise InvalidRequest(f"needs exactly one of {', '.join(rules.main)}", field=field)
    if kind is CredentialKind.BEDROCK and ("access_key_id" in given) != (mains[0] == "secret_access_key"):
        raise InvalidRequest("access_key_id and secret_access_key go together", field=f"{field}.access_key_id")
    return dict(given)


def clean_config(kind: CredentialKind, given: Mapping[str, Any], *, field: str = "config") -> dict[str, str]:
    """The settings of a credential that are not secret. Raises InvalidRequest naming the field."""
    rules = RULES[kind]
    if unknown := sorted(given.keys() - {*rules.required, *rules.optional}):
        raise InvalidRequest(f"is not a setting of the kind {kind}", field=f"{field}.{_shown(unknown[0])}")
    if missing := [name for name in rules.required if name not in given]:
        raise InvalidRequest("is needed", field=f"{field}.{missing[0]}")
    for name, value in given.items():
        pattern = _LABEL if name in _IN_HOST else _SETTING
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise InvalidRequest("has characters that cannot stand there", field=f"{field}.{name}")
    if kind is CredentialKind.CUSTOM and given.get("auth", "x-api-key") not in ("x-api-key", "bearer"):
        raise InvalidRequest("must be x-api-key or bearer", field=f"{field}.auth")
    return dict(given)


def clean_base_url(
    kind: CredentialKind, given: str | None, config: Mapping[str, str], policy: UrlPolicy, *, field: str = "base_url"
) -> str:
    """Where requests of this credential go. Raises InvalidRequest."""
    rules = RULES[kind]
    if given is None:
        if rules.base_url is None:
            raise InvalidRequest("is needed", field=field)
        return rules.base_url.format(**config)
    if not rules.own_base_url and given.rstrip("/") != rules.base_url:
        raise InvalidRequest(f"a credential of the kind {kind} has no base URL of its own; use custom", field=field)
    return _checked_url(given, policy, field)


def _checked_url(given: str, policy: UrlPolicy, field: str) -> str:
    try:
        parts = urlsplit(given)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise InvalidRequest("is not a URL", field=field) from None
    if len(given) > 2048 or not given.isprintable() or " " in given or "\\" in given or not host:
        raise InvalidRequest("is not a URL", field=field)
    if parts.scheme not in (("https", "http") if policy.allow_http else ("https",)):
        raise InvalidRequest("must begin with https://", field=field)
    if parts.username is not None or parts.query or parts.fragment:
        raise InvalidRequest("must not hold a user, a query or a fragment", field=field)
    if not policy.allow_private and _private(host):
        raise InvalidRequest("names a private address", field=field)
    return given.rstrip("/")


def _private(host: str) -> bool:
    if host == "localhost" or host.endswith((".localhost", ".local", ".internal")) or "." not in host.strip("[]"):
        # No dot: a name of the local network, or an address in a spelling such as 2130706433.
        return ":" not in host or _not_global(host)
    return _not_global(host)


def _not_global(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        # Not an address. Numeric labels are other spellings of one (0x7f.1, 127.1).
        return bool(re.fullmatch(r"(?:0x[0-9a-f]+|[0-9]+)(?:\.(?:0x[0-9a-f]+|[0-9]+))*\.?", host))


def _shown(name: object) -> str:
    """An unknown name in an error: it may be anything, a misplaced secret too."""
    text = str(name)
    return text if re.fullmatch(r"[a-z_]{1,32}", text) else "(a name that is not shown)"
