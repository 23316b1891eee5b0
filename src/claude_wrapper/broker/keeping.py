"""What may be answered from the cache, under which key, and for how long. Pure decisions, and the form of a kept answer.

A key is made of what decides the answer: provider, upstream, path and query, the headers that change behaviour, and the
body without what does not (who asks, cache marks, the CLI's billing line), with its keys in order.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from claude_wrapper.broker.bodies import asks_for_summary
from claude_wrapper.broker.calls import CacheTerms, CacheUse, Credential, CredentialKind
from claude_wrapper.broker.inject import Headers
from claude_wrapper.broker.policy import Kind, Route
from claude_wrapper.storage.cache import cache_key
from claude_wrapper.vault.sealedcache import SealedCache

_FORM: Final = "2"
"""Part of every key: change it when the form of keys or kept answers changes."""
_BEHAVIOUR: Final = ("anthropic-version", "anthropic-beta")
_SHARED: Final = frozenset(
    {"max_tokens", "messages", "model", "stop_sequences", "stream", "system", "temperature", "top_k", "top_p"}
    | {"context_management", "output_config", "output_format", "thinking", "tool_choice", "tools"}
)
"""The fields of a request that says all that its answer is made from. Others (`container`, `mcp_servers`, and what is not
known here) may name what lies at the account of whoever asks."""
_BILLING: Final = "x-anthropic-billing-header:"
_MESSAGE_ID: Final = re.compile(rb'"id":\s*"(msg_[^"]{1,100})"')


class Ways(enum.StrEnum):
    """What the organisation allows (`tenancy.policies.CacheAnswers`)."""

    OFF = "off"
    ASKED = "asked"
    DETERMINISTIC = "deterministic"


@dataclass(frozen=True, slots=True)
class Keeping:
    """One request's place in a cache."""

    cache: SealedCache
    key: str
    seconds: float
    refresh: bool = False
    share: bool = False
    """Whether another organisation's answer will do, and this one's may become another's."""


@dataclass(frozen=True, slots=True)
class Caching:
    """The caches of the broker, and how long counts and lists are kept (seconds; 0: they are asked each time)."""

    answers: SealedCache
    counts: SealedCache
    models: SealedCache
    count_seconds: float
    models_seconds: float

    def of(
        self,
        route: Route,
        credential: Credential,
        headers: Headers,
        body: bytes | None,
        *,
        use: CacheUse | None,
        main: bool,
    ) -> Keeping | None:
        """Where this request's answer may be kept; None: it is asked, whatever was answered before."""
        if use is CacheUse.BYPASS:
            return None
        refresh = use is CacheUse.REFRESH
        if route.kind is Kind.MESSAGES:
            terms = credential.cache
            if terms is None or not answer_may_be_kept(terms, body or b"", use=use, main=main):
                return None
            key = key_of(credential, route, headers, body)
            share = terms.share and may_be_shared(credential, body or b"")
            return None if key is None else Keeping(self.answers, key, terms.seconds, refresh, share)
        if route.kind is Kind.COUNT_TOKENS and self.count_seconds > 0:
            key = key_of(credential, route, headers, body)
            return None if key is None else Keeping(self.counts, key, self.count_seconds, refresh)
        if route.kind is Kind.MODELS and self.models_seconds > 0:
            # Which models there are depends on whose account asks.
            key = key_of(credential, route, headers, None, account=credential.id)
            return None if key is None else Keeping(self.models, key, self.models_seconds, refresh)
        return None


def answer_may_be_kept(terms: CacheTerms, body: bytes, *, use: CacheUse | None, main: bool) -> bool:
    """Whether an answer may be given again: by the request's own word, or because it is the same each time.

    A turn's word holds for its own requests, not for what the CLI asks beside them. Without one, only requests at
    temperature 0 without tools, and summaries of a conversation: steps of an agent's work never.
    """
    if terms.answers == Ways.OFF:
        return False
    if use is not None and main:
        return True
    if terms.answers != Ways.DETERMINISTIC:
        return False
    fields = _fields(body)
    if fields is None:
        return False
    if not main and asks_for_summary(fields.get("messages")):
        return True
    return not fields.get("tools") and fields.get("temperature") == 0


def may_be_shared(credential: Credential, body: bytes) -> bool:
    """Whether an answer may go to another organisation that asks the same: the question must be all that it depends on.

    Not with a file or a tool that lies at the asker's account upstream: naming it is not having it. And never what a
    subscription answered: it is for its owner.
    """
    fields = _fields(body)
    if fields is None or credential.kind is not CredentialKind.API_KEY:
        return False
    tools, canonical = fields.get("tools") or [], canonical_body(fields)
    return (
        canonical.keys() <= _SHARED
        and isinstance(tools, list)
        and all(isinstance(tool, dict) and tool.get("type", "custom") == "custom" for tool in tools)
        and b'"file_id"' not in msgspec.json.encode(canonical)  # text cannot imitate it: its quotes are escaped
    )


def key_of(
    credential: Credential, route: Route, headers: Headers, body: bytes | None, *, account: str = ""
) -> str | None:
    """The key; None for a body that is no JSON object."""
    canonical = b""
    if body is not None:
        fields = _fields(body)
        if fields is None:
            return None
        canonical = msgspec.json.encode(canonical_body(fields), order="sorted")
    behaviour = sorted((name.lower(), value) for name, value in headers if name.lower() in _BEHAVIOUR)
    upstream = credential.base_url.rstrip("/")
    parts = (
        _FORM,
        credential.provider,
        upstream,
        account,
        route.path,
        route.query,
        msgspec.json.encode(behaviour),
        canonical,
    )
    return cache_key(*parts)


def canonical_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body without what does not change the answer. Nothing inside a tool's input or schema is touched."""
    kept = {name: value for name, value in fields.items() if name != "metadata"}
    if not kept.get("tools"):
        kept.pop("tools", None)
    elif isinstance(kept["tools"], list):
        kept["tools"] = [_unmarked(tool) for tool in kept["tools"]]
    if isinstance(system := kept.get("system"), list):
        kept["system"] = [_unmarked(block) for block in system if not _is_billing(block)]
    if isinstance(messages := kept.get("messages"), list):
        kept["messages"] = [_message(message) for message in messages]
    kept.pop("cache_control", None)
    return kept


def _fields(body: bytes) -> dict[str, Any] | None:
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _message(message: Any) -> Any:
    if not isinstance(message, dict) or not isinstance(content := message.get("content"), list):
        return message
    blocks = [_unmarked(block) for block in content]
    for block in blocks:
        if isinstance(block, dict) and block.get("type") == "tool_result" and isinstance(block.get("content"), list):
            block["content"] = [_unmarked(one) for one in block["content"]]
    return {**message, "content": blocks}


def _unmarked(block: Any) -> Any:
    return (
        {name: value for name, value in block.items() if name != "cache_control"} if isinstance(block, dict) else block
    )


def _is_billing(block: Any) -> bool:
    return isinstance(block, dict) and str(block.get("text", "")).startswith(_BILLING)


# The form of a kept answer --------------------------------------------------------------------------------------------


class Kept(msgspec.Struct, array_like=True, frozen=True):
    """A whole answer of status 200."""

    content_type: str
    body: bytes = b""

    def as_message(self, message_id: str) -> bytes:
        """The body under a message id of its own: a client may tell messages apart by it."""
        found = _MESSAGE_ID.search(self.body, 0, 4096)
        if found is None:
            return self.body
        return self.body[: found.start(1)] + message_id.encode() + self.body[found.end(1) :]


_KEPT: Final = msgspec.msgpack.Decoder(Kept)


def pack(kept: Kept) -> bytes:
    """As it lies in the cache."""
    return msgspec.msgpack.encode(kept)


def unpack(value: bytes) -> Kept | None:
    """None for what an older server kept in another form."""
    try:
        return _KEPT.decode(value)
    except msgspec.MsgspecError:
        return None


@dataclass(slots=True)
class Tape:
    """The bytes of an answer as it passes, as long as they are few enough to be kept."""

    most: int
    pieces: list[bytes] | None = field(default_factory=list)
    size: int = 0

    def feed(self, chunk: bytes) -> None:
        """The next bytes."""
        self.size += len(chunk)
        if self.size > self.most:
            self.pieces = None
        if self.pieces is not None:
            self.pieces.append(chunk)
