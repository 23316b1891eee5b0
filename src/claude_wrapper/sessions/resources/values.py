"""Reading a caller's JSON object: bounds and shapes, with errors that name the field. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlsplit

from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.ids import well_formed

MAX_METADATA: Final = 16
MAX_DEPTH: Final = 64
_BARE_HOST: Final = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*\Z"
)


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object and its place in the request; every reader raises InvalidRequest with the path of the field."""

    data: Mapping[str, Any]
    path: str = ""

    @classmethod
    def of(cls, value: Any, path: str) -> Fields:
        """An object, or the error that says that it is none."""
        if not isinstance(value, dict):
            raise InvalidRequest("must be an object", field=path or "body")
        return cls(value, path)

    def at(self, name: str) -> str:
        """The path of a field of this object."""
        return f"{self.path}.{name}" if self.path else name

    def only(self, *names: str) -> Fields:
        """Itself, if it has no other fields than these."""
        for name in self.data:
            if name not in names:
                raise InvalidRequest(
                    f"is not a field here; known are {', '.join(sorted(names))}", field=self.at(name[:64])
                )
        return self

    def has(self, name: str) -> bool:
        """Whether the field was sent, be it null."""
        return name in self.data

    def given(self, name: str) -> bool:
        """Whether the field was sent and is not null."""
        return self.data.get(name) is not None

    def text(self, name: str, *, most: int, least: int = 1) -> str:
        """A required string."""
        if not self.given(name):
            raise InvalidRequest("is required", field=self.at(name))
        return text_of(self.data[name], self.at(name), most=most, least=least)

    def maybe_text(self, name: str, *, most: int, least: int = 0) -> str | None:
        """A string, or None for null and absence."""
        return self.text(name, most=most, least=least) if self.given(name) else None

    def one_of(self, name: str, *choices: str) -> str:
        """A required string out of a few."""
        value = self.data.get(name)
        if not isinstance(value, str) or value not in choices:
            raise InvalidRequest(f"must be one of {', '.join(choices)}", field=self.at(name))
        return value

    def boolean(self, name: str, *, default: bool) -> bool:
        """True or false; null and absence give the default."""
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InvalidRequest("must be true or false", field=self.at(name))
        return value

    def integer(self, name: str, *, least: int, most: int) -> int | None:
        """A whole number, or None for null and absence."""
        value = self.data.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InvalidRequest(f"must be a whole number from {least} to {most}", field=self.at(name))
        return value

    def object(self, name: str) -> Fields:
        """A required object."""
        if not self.given(name):
            raise InvalidRequest("is required", field=self.at(name))
        return Fields.of(self.data[name], self.at(name))

    def maybe_object(self, name: str) -> Fields | None:
        """An object, or None for null and absence."""
        return self.object(name) if self.given(name) else None

    def items(self, name: str, *, most: int) -> Iterator[tuple[Any, str]]:
        """The members of a list with their paths; null and absence are the empty list."""
        value = self.data.get(name)
        if value is None:
            return
        if not isinstance(value, list):
            raise InvalidRequest("must be a list", field=self.at(name))
        if len(value) > most:
            raise InvalidRequest(f"at most {most}", field=self.at(name))
        for index, member in enumerate(value):
            yield member, f"{self.at(name)}[{index}]"

    def objects(self, name: str, *, most: int) -> Iterator[Fields]:
        """The members of a list of objects."""
        for member, path in self.items(name, most=most):
            yield Fields.of(member, path)

    def texts(self, name: str, *, most: int, longest: int) -> list[str]:
        """A list of strings."""
        return [text_of(member, path, most=longest) for member, path in self.items(name, most=most)]


def text_of(value: Any, path: str, *, most: int, least: int = 1) -> str:
    """A string within its bounds, in characters."""
    if not isinstance(value, str):
        raise InvalidRequest("must be a string", field=path)
    if not least <= len(value) <= most:
        raise InvalidRequest(f"must have {least} to {most} characters; it has {len(value)}", field=path)
    return value


def name_of(value: Any, path: str, *, most: int = 255) -> str:
    """A label on one line: not blank, no control characters."""
    name = text_of(value, path, most=most)
    if not name.strip() or any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise InvalidRequest("must not be blank or have control characters", field=path)
    return name


def metadata_of(fields: Fields) -> dict[str, str]:
    """The `metadata` of a create."""
    given = fields.maybe_object("metadata")
    return merged_metadata({}, given) if given else {}


def merged_metadata(present: Mapping[str, str], patch: Fields, *, empty_deletes: bool = False) -> dict[str, str]:
    """Merge patch: a string sets, null deletes; the result is bounded (16 pairs, keys 64, values 512 characters).

    Environments delete with an empty string, too. Errors carry `error_code: invalid_metadata`.
    """
    merged = dict(present)
    for key, value in patch.data.items():
        if value is None or (empty_deletes and value == ""):
            merged.pop(key, None)
            continue
        if not 1 <= len(key) <= 64:
            raise _bad_metadata("keys have 1 to 64 characters", patch.at(key[:64]))
        if not isinstance(value, str) or len(value) > 512:
            raise _bad_metadata("must be a string of at most 512 characters", patch.at(key))
        merged[key] = value
    if len(merged) > MAX_METADATA:
        raise _bad_metadata(f"at most {MAX_METADATA} pairs", patch.path)
    return merged


def _bad_metadata(message: str, field: str) -> InvalidRequest:
    return InvalidRequest(message, field=field, details={"error_code": "invalid_metadata"})


def url_of(value: Any, path: str) -> str:
    """An http or https URL with a host and without credentials or a fragment."""
    url = text_of(value, path, most=2048)
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and not parts.fragment
        good = good and parts.username is None and parts.port != 0
    except ValueError:
        good = False
    if not good or any(character.isspace() or not character.isprintable() for character in url):
        raise InvalidRequest("must be an http(s) URL without credentials or fragment", field=path)
    return url


def host_of(value: Any, path: str, *, wildcard: bool = True) -> str:
    """A bare host name or IPv4 address, lower-cased; with `wildcard` also `*.example.com`."""
    host = text_of(value, path, most=255).lower()
    bare = host.removeprefix("*.") if wildcard else host
    if not _BARE_HOST.match(bare):
        raise InvalidRequest("must be a host name without scheme, port or path", field=path)
    return host


def time_of(value: Any, path: str) -> datetime:
    """An RFC 3339 time; one without an offset is taken as UTC, as the official client sends it."""
    if isinstance(value, str) and len(value) <= 64:
        try:
            parsed = datetime.fromisoformat(value)
            return (parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed).astimezone(UTC)
        except (ValueError, OverflowError):
            pass
    raise InvalidRequest("must be an RFC 3339 time such as 2026-01-31T12:00:00Z", field=path)


def wire_time(value: datetime | None) -> str | None:
    """RFC 3339 in UTC, as the API writes it."""
    return None if value is None else value.astimezone(UTC).isoformat().replace("+00:00", "Z")


def id_of(value: Any, path: str, prefix: str) -> str:
    """A reference in a request body."""
    if not isinstance(value, str) or not well_formed(value, prefix):
        raise InvalidRequest(f"must be an id that begins with {prefix}_", field=path)
    return value


def missing(what: str, value: str, **details: Any) -> NotFound:
    """The one answer to an id that does not exist and to somebody else's."""
    return NotFound(f"there is no {what} {value[:128]!r}", details=details)


def require_clean(value: Any) -> None:
    """Refuse what a database cannot keep: NUL characters, numbers beyond 64 bits, and nesting without end."""
    stack: list[tuple[Any, str, int]] = [(value, "", 0)]
    while stack:
        one, path, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"is nested more than {MAX_DEPTH} deep", field=path[:200])
        if isinstance(one, str):
            _require_text(one, path)
        elif isinstance(one, dict):
            for key, member in one.items():
                _require_text(key, path)
                stack.append((member, f"{path}.{key}" if path else key, depth + 1))
        elif isinstance(one, list):
            stack.extend((member, f"{path}[{index}]", depth + 1) for index, member in enumerate(one))
        elif isinstance(one, int) and not -(2**63) <= one < 2**63:
            raise InvalidRequest("is a number beyond 64 bits", field=path[:200])


def _require_text(value: str, path: str) -> None:
    if "\x00" in value:
        raise InvalidRequest("must not have NUL characters", field=path[:200].replace("\x00", "\\0") or "body")
