"""Header rewriting between a process and an upstream. Pure; bodies are elsewhere.

To the upstream goes what the process sent, minus everything that belongs to one connection, to a proxy or to a
credential, plus the real credential. To the process goes what the upstream sent, minus what belongs to one connection
or tells of the credential's owner.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterable, Mapping

from claude_wrapper.broker.calls import Credential, CredentialKind

OAUTH_BETA = "oauth-2025-04-20"

Headers = list[tuple[str, str]]

_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "te", "trailer", "trailers", "transfer-encoding", "upgrade", "http2-settings"}
)
_NOT_UPSTREAM = _HOP_BY_HOP | {
    "host",
    "content-length",
    "expect",
    "authorization",
    "x-api-key",
    "cookie",
    "forwarded",
    "via",
    "x-real-ip",
    "accept-encoding",  # the meter reads the answer as it passes: it must not be compressed
}
_NOT_UPSTREAM_PREFIXES = ("proxy-", "x-forwarded-", "sec-")
_NOT_DOWNSTREAM = _HOP_BY_HOP | {"content-length", "set-cookie", "alt-svc", "anthropic-organization-id"}
_NOT_DOWNSTREAM_PREFIXES = ("proxy-",)


def presented_token(headers: Iterable[tuple[str, str]]) -> str | None:
    """The credential that a process presents: `x-api-key`, else the Bearer token."""
    bearer = None
    for name, value in headers:
        lower = name.lower()
        if lower == "x-api-key":
            return value.strip()
        if lower == "authorization":
            scheme, _, rest = value.partition(" ")
            if scheme.lower() == "bearer":
                bearer = rest.strip()
    return bearer


def token_matches(presented: str | None, expected: str) -> bool:
    """Compared in constant time."""
    return presented is not None and hmac.compare_digest(presented.encode(), expected.encode())


def upstream_headers(
    headers: Iterable[tuple[str, str]], credential: Credential, trace: Mapping[str, str] | None = None
) -> Headers:
    """The headers of the upstream request; `headers` are the process's, any case."""
    pairs = list(headers)
    dropped = _named_by_connection(pairs)
    replaced = {name.lower() for name in (*credential.headers, *(trace or {}))}
    out: Headers = []
    betas: list[str] = []
    for name, value in pairs:
        lower = name.lower()
        if lower == "anthropic-beta":
            betas += [beta.strip() for beta in value.split(",") if beta.strip()]
        elif _passes(lower, _NOT_UPSTREAM, _NOT_UPSTREAM_PREFIXES) and lower not in dropped and lower not in replaced:
            out.append((name, value))
    if "anthropic-beta" not in replaced and (betas := _betas(betas, credential.kind)):
        out.append(("anthropic-beta", ",".join(betas)))
    out.append(("accept-encoding", "identity"))
    out.extend((name, value) for name, value in (trace or {}).items())
    out.extend((name, value) for name, value in credential.headers.items())
    out.append(_credential_header(credential))
    return out


def downstream_headers(headers: Iterable[tuple[str, str]], secrets: Iterable[str] = ()) -> Headers:
    """The headers that the process gets. One that repeats a secret (an echoing upstream) is dropped."""
    pairs = list(headers)
    dropped = _named_by_connection(pairs)
    hidden = [form for secret in secrets if secret for form in _forms(secret)]
    return [
        (name, value)
        for name, value in pairs
        if (lower := name.lower()) not in dropped
        and _passes(lower, _NOT_DOWNSTREAM, _NOT_DOWNSTREAM_PREFIXES)
        and not any(form in value for form in hidden)
    ]


def _passes(lower: str, names: frozenset[str], prefixes: tuple[str, ...]) -> bool:
    return lower not in names and not lower.startswith(prefixes)


def _named_by_connection(pairs: Headers) -> set[str]:
    """A `Connection` header may name further headers of this hop."""
    return {item.strip().lower() for name, value in pairs if name.lower() == "connection" for item in value.split(",")}


def _betas(sent: list[str], kind: CredentialKind) -> list[str]:
    betas = list(dict.fromkeys(sent))
    if kind is CredentialKind.OAUTH:
        return betas if OAUTH_BETA in betas else [*betas, OAUTH_BETA]
    return [beta for beta in betas if beta != OAUTH_BETA]


def _credential_header(credential: Credential) -> tuple[str, str]:
    if credential.kind is CredentialKind.OAUTH:
        return ("authorization", f"Bearer {credential.secret}")
    return ("x-api-key", credential.secret)


def _forms(secret: str) -> tuple[str, ...]:
    return (secret, base64.b64encode(secret.encode()).decode())
