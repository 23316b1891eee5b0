"""What an organisation wants when its upstream fails, what may be answered from the cache, which CLI it runs.

Kept among the organisation's settings (`organizations.settings["policies"]`). Values are checked when they are written;
one that cannot be read any more is left out and logged, and the rest stays in force.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.ids import ORG, well_formed
from claude_wrapper.tenancy.values import clean_models

log = structlog.get_logger(__name__)

SETTING: Final = "policies"
ANY_MODEL: Final = "*"
MAX_FALLBACKS: Final = 4
MAX_CACHE_SECONDS: Final = 30 * 86_400
MAX_PARTNERS: Final = 8
"""Organisations that one shares with: each may be looked into at a miss."""
_VERSION: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+-]{0,63}\Z")


class CacheAnswers(enum.StrEnum):
    """Which answers of a model may be kept and given again."""

    OFF = "off"
    """None, whatever a request asks for."""
    ASKED = "asked"
    """Those of requests that ask for it."""
    DETERMINISTIC = "deterministic"
    """Also those of requests that say that they want the same answer each time (temperature 0, no tools), and the
    CLI's summaries of a conversation."""


@dataclass(frozen=True, slots=True)
class Policies:
    """One organisation's. What it never set has these values."""

    fallback_models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The models to ask instead, in order, by the model that was asked for; `*`: for every other one."""
    fallback_credentials: bool = False
    """Whether a refused credential (401, 403, 429) is replaced by the next one of the same reach."""
    cache_answers: CacheAnswers = CacheAnswers.ASKED
    cache_seconds: int = 3600
    """How long an answer is kept."""
    cache_share_with: tuple[str, ...] = ()
    """Organisations (ids) whose kept answers will do, in the order of asking, and who may have this one's: as far as they
    name this one too."""
    cli_version: str | None = None
    """The only version of the CLI that this organisation's new conversations get; None: the server's choice."""

    def models_after(self, model: str) -> tuple[str, ...]:
        """What may be asked instead of `model`."""
        if not self.fallback_models:
            return ()
        return self.fallback_models.get(model, self.fallback_models.get(ANY_MODEL, ()))

    def to_json(self) -> dict[str, Any]:
        """As the Admin API shows them, and as they are kept."""
        return {
            "fallback_models": {model: list(others) for model, others in self.fallback_models.items()},
            "fallback_credentials": self.fallback_credentials,
            "cache_answers": self.cache_answers.value,
            "cache_seconds": self.cache_seconds,
            "cache_share_with": list(self.cache_share_with),
            "cli_version": self.cli_version,
        }


DEFAULT: Final = Policies()


def parse(values: Mapping[str, Any]) -> Policies:
    """Raises InvalidRequest naming the field. A value None is the default."""
    unknown = sorted(values.keys() - DEFAULT.to_json().keys())
    if unknown:
        raise InvalidRequest("there is no such policy", field=unknown[0][:64])
    given = {name: value for name, value in values.items() if value is not None}
    return Policies(
        fallback_models=_fallbacks(given.get("fallback_models", {})),
        fallback_credentials=_flag(given.get("fallback_credentials", False)),
        cache_answers=_answers(given.get("cache_answers", CacheAnswers.ASKED)),
        cache_seconds=_seconds(given.get("cache_seconds", DEFAULT.cache_seconds)),
        cache_share_with=_partners(given.get("cache_share_with", ())),
        cli_version=_version(given.get("cli_version")),
    )


def _fallbacks(value: Any) -> dict[str, tuple[str, ...]]:
    name = "fallback_models"
    if not isinstance(value, Mapping):
        raise InvalidRequest("must be an object of lists of models", field=name)
    clean_models([str(model) for model in value], field=name)
    found: dict[str, tuple[str, ...]] = {}
    for model, others in value.items():
        at = f"{name}.{model}"
        if model != ANY_MODEL and model.endswith(ANY_MODEL):
            raise InvalidRequest("is a model's name, or `*` alone", field=at)
        if not isinstance(others, Sequence) or isinstance(others, str) or not all(isinstance(o, str) for o in others):
            raise InvalidRequest("must be a list of models", field=at)
        if not 1 <= len(others) <= MAX_FALLBACKS or len(set(others)) != len(others):
            raise InvalidRequest(f"must have 1 to {MAX_FALLBACKS} different models", field=at)
        clean_models(others, field=at)
        if model in others or any(other.endswith(ANY_MODEL) for other in others):
            raise InvalidRequest("a fall-back is the name of another model", field=at)
        found[model] = tuple(others)
    return found


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest("must be true or false", field="fallback_credentials")
    return value


def _answers(value: Any) -> CacheAnswers:
    try:
        return CacheAnswers(value)
    except ValueError:
        raise InvalidRequest(f"must be one of {', '.join(CacheAnswers)}", field="cache_answers") from None


def _seconds(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_CACHE_SECONDS:
        raise InvalidRequest(f"must be 1 to {MAX_CACHE_SECONDS} seconds", field="cache_seconds")
    return value


def _partners(value: Any) -> tuple[str, ...]:
    # Whether they exist is not checked: an administrator could otherwise find out who else is here.
    name = "cache_share_with"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidRequest("must be a list of organisations' ids", field=name)
    if len(value) > MAX_PARTNERS or len(set(map(str, value))) != len(value):
        raise InvalidRequest(f"must have at most {MAX_PARTNERS} different organisations", field=name)
    for one in value:
        if not isinstance(one, str) or not well_formed(one, ORG):
            raise InvalidRequest(f"is an organisation's id, such as {ORG}_…", field=name)
    return tuple(value)


def _version(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not _VERSION.match(value)):
        raise InvalidRequest("must be a version such as 2.1.327", field="cli_version")
    return value


def read(settings: Mapping[str, Any] | None, org: str) -> Policies:
    """What is kept; a value that cannot be read (an older server's, or written by hand) is left out, and logged."""
    kept = (settings or {}).get(SETTING) or {}
    try:
        return parse(kept)
    except InvalidRequest as error:
        log.warning("policies.unreadable", org=org, field=error.field)
        good = {name: value for name, value in kept.items() if _reads(name, value)} if isinstance(kept, dict) else {}
        return parse(good)


def _reads(name: str, value: Any) -> bool:
    try:
        parse({name: value})
    except InvalidRequest:
        return False
    return True
