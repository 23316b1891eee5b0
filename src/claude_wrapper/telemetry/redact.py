r"""Takes secrets out of what is about to be written somewhere: log lines, error messages, span attributes.

Three nets, because each has holes of its own:
* by name: what stands under a key such as `authorization` or `refresh_token` is never written, whatever it looks like;
* by shape: API keys, OAuth tokens, bearer headers, JWTs, webhook secrets, cloud keys, passwords in URLs, PEM keys;
* by value: literal secrets that were registered because this process holds them.

No I/O, no clock. Cost is bounded: text beyond a limit is cut, nesting beyond `MAX_DEPTH` and collections beyond
`MAX_ITEMS` are summarised. Masking an encoded JSON text leaves it valid JSON: no pattern takes a quote, and a backslash
only together with the letter that it escapes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

MASK: Final = "[redacted]"
MAX_TEXT: Final = 16_384
"""Characters of one text that are kept; a log line is for facts, not for documents."""
MAX_DEPTH: Final = 8
MAX_ITEMS: Final = 200
MIN_LITERAL: Final = 8
"""Shorter literals would mask ordinary words; a secret of fewer characters is none."""
MAX_LITERAL: Final = 4_096
MAX_LITERALS: Final = 1_000
"""Each costs about 50 ns per log line."""

_SAFE_NAMES: Final = frozenset(
    {
        "secret_name",
        "secrets_found",
        "token_type",
        "token_count",
        "token_kind",
        "token_endpoint",
        "token_endpoint_auth",
        "first_token_seconds",
        "first_token_ms",
        "credential_id",
        "credential_kind",
        "credentials_count",
        "authorization_url",
    }
)
"""Names that look like a secret's and are not."""

_SECRET_NAME: Final = re.compile(
    r"passw|passphrase|secret|token|api[_-]?key(?!_id|s?_count)|authorization|auth[_-]?header|cookie|credential|"
    r"(?:private|access|master|signing|session|encryption|admin|environment)[_-]?key(?!_id)|pepper|bearer|^pwd$|^jwt$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a kind of secret looks like. A pattern is only tried when one of `needles` is in the lower-case text."""

    name: str
    needles: tuple[str, ...]
    pattern: re.Pattern[str]
    replacement: str = MASK
    guard: re.Pattern[str] | None = None
    """Found in the lower-case text wherever `pattern` could match. Cheap, for needles that ordinary lines have too."""


def _shape(name: str, needles: str, pattern: str, replacement: str = MASK, *, guard: str | None = None) -> Shape:
    # The guard minds the case: ten times cheaper than the same pattern without.
    found = re.compile(guard) if guard else None
    return Shape(name, tuple(needles.split()), re.compile(pattern, re.IGNORECASE), replacement, found)


_GAP: Final = r"(?:\s|%20|\\[nrt])"
_NAMED: Final = (
    r"passw(?:or)?d|passphrase|secret|token|api[_-]?key|(?:access|private)[_-]?key|authorization|cookie|pepper"
)

# Every repetition is bounded or over one class of characters, so that no pattern backtracks far.
SHAPES: Final = (
    _shape(
        "private key",
        "-----begin",
        r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?:[A-Z0-9+/=\s]|\\[nrt])*(?:-----END [A-Z ]{0,30}-----)?",
    ),
    _shape("our keys and Anthropic's", "sk-ant- sk-cw- sk-env-", r"sk-(?:ant|cw|env)-[\w\-]*"),
    _shape("keys of the same form", "sk-", r"(?<![A-Z0-9])sk-[\w\-]{16,}"),
    _shape("webhook secret", "whsec_", r"whsec_[\w+/=\-]*"),
    _shape("JSON in base 64, signed or not", "eyj", r"eyJ[\w+/=.\-]{8,}"),
    _shape("AWS key", "akia asia", r"(?:AKIA|ASIA)[A-Z0-9]{12,}"),
    _shape("Google token", "ya29. aiza 1//0", r"ya29\.[\w\-.]+|AIza[\w\-]{20,}|1//0[\w\-]{20,}"),
    _shape("GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_", r"(?:gh[pousr]|github_pat)_\w{16,}"),
    _shape("Slack token", "xox xapp-", r"xox[abeoprs]-[\w\-]+|xapp-[\w\-]+"),
    _shape("bearer token", "bearer", rf"(bearer{_GAP}+)[\w.~+/=\-]{{6,}}", rf"\1{MASK}"),
    _shape("basic authorization", "basic", rf"(authorization[^\w]{{1,8}}basic{_GAP}+)[\w+/=\-]{{4,}}", rf"\1{MASK}"),
    _shape("password in a URL", "://", r"(://[^\s/:@\"'\\]{0,200}):[^\s/@\"'\\]{1,500}@", rf"\1:{MASK}@"),
    _shape(
        "named in the text",
        "passw passphrase secret token key authorization cookie pepper",
        rf"((?:{_NAMED})(?:\\*[\"'])?\s{{0,4}}[:=]\s{{0,4}}(?:\\*[\"'])?)(?!null\b|true\b|false\b)"
        r"[^\s\"'\\,;&<>(){}\[\]]{6,}",
        rf"\1{MASK}",
        # Most lines have `input_tokens` or `"key":` in them, and no value under the word itself.
        guard=rf"(?:{_NAMED})[\\\"'\s:=]",
    ),
)


class Redactor:
    """Takes secrets out of texts and structures. Literal secrets may be registered and forgotten at any time."""

    def __init__(self, literals: Iterable[str] = ()) -> None:
        self._literals: tuple[str, ...] = ()
        for one in literals:
            self.register(one)

    def __repr__(self) -> str:
        return f"Redactor({len(self._literals)} literals)"

    def register(self, secret: str) -> None:
        """From now on mask this very string.

        Raises ValueError when it is shorter than `MIN_LITERAL`, longer than `MAX_LITERAL`, or one too many.
        """
        if not MIN_LITERAL <= len(secret) <= MAX_LITERAL:
            raise ValueError(f"a literal secret has {MIN_LITERAL} to {MAX_LITERAL} characters")
        together = {*self._literals, *_forms(secret)}
        if len(together) > MAX_LITERALS:
            raise ValueError(f"more than {MAX_LITERALS} literal secrets; forget those that are no longer held")
        # The longest first: a secret that begins with another one must not leave its rest behind.
        self._literals = tuple(sorted(together, key=len, reverse=True))

    def forget(self, secret: str) -> None:
        """No longer mask this string; one that was never registered is ignored."""
        gone = _forms(secret)
        self._literals = tuple(one for one in self._literals if one not in gone)

    def text(self, text: str, *, limit: int = MAX_TEXT) -> str:
        """`text` without secrets, cut when it is longer than `limit` characters (plus `MAX_LITERAL`)."""
        beyond = len(text) - limit - MAX_LITERAL
        if beyond <= 0:
            return self._masked(text)
        # A secret that the cut halves is in the last MAX_LITERAL characters of what is searched: these go as well.
        return self._masked(text[: limit + MAX_LITERAL])[:-MAX_LITERAL] + f"… [{beyond + MAX_LITERAL} characters more]"

    def structure(self, value: Any, *, depth: int = 0, by_shape: bool = True) -> Any:
        """A JSON-like copy of `value` without secrets; a type that is not JSON is shown by its name alone.

        `by_shape=False` only masks by name: for callers that will give the encoded text to `text`.
        """
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            return self.text(value) if by_shape else value[: MAX_TEXT + MAX_LITERAL]
        if isinstance(value, bytes | bytearray | memoryview):
            return f"[{len(value)} bytes]"
        if depth >= MAX_DEPTH:
            return f"[{type(value).__name__}, nested too deep]"
        if isinstance(value, Mapping):
            pairs = islice(value.items(), MAX_ITEMS)
            return {
                (self.text(str(name)) if by_shape else str(name)): self.named(
                    str(name), one, depth=depth + 1, by_shape=by_shape
                )
                for name, one in pairs
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [self.structure(one, depth=depth + 1, by_shape=by_shape) for one in islice(value, MAX_ITEMS)]
        return f"[{type(value).__name__}]"

    def named(self, name: str, value: Any, *, depth: int = 0, by_shape: bool = True) -> Any:
        """What may be written of `value` under this key."""
        name = name[: MIN_LITERAL * 16]
        if value is None or isinstance(value, bool) or not secret_name(name):
            if value.__class__ is float or value.__class__ is int:
                return value  # most of what is logged
            return self.structure(value, depth=depth, by_shape=by_shape)
        if isinstance(value, int | float) and "tokens" in name:
            return value  # a count
        return MASK

    def _masked(self, text: str) -> str:
        for literal in self._literals:
            if literal in text:
                text = text.replace(literal, MASK)
        lowered = text.lower()
        for shape in SHAPES:
            for needle in shape.needles:
                if needle in lowered:
                    if shape.guard is None or shape.guard.search(lowered):
                        text = shape.pattern.sub(shape.replacement, text)
                    break
        return text


@functools.lru_cache(maxsize=4096)  # names repeat in every line, and the pattern is the dearest part of a line
def secret_name(name: str) -> bool:
    """Whether what stands under this key is a secret by its name."""
    return bool(_SECRET_NAME.search(name)) and name not in _SAFE_NAMES


def _forms(secret: str) -> set[str]:
    """The secret as it is, and as it stands in JSON with and without escapes for what is not ASCII."""
    return {secret, json.dumps(secret, ensure_ascii=False)[1:-1], json.dumps(secret)[1:-1]}
