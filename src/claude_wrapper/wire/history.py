"""The key of a conversation: one hash for all the ways in which a client may re-send the same history.

A stateless client sends its whole history with each request. The key of all messages but the new ones finds the
process that already holds them, so two lists get the same key exactly when the model would see the same conversation:

* string content equals one text block; adjacent text blocks are one text; empty text is nothing;
* consecutive messages of one role are one message, a message without content is none;
* `thinking` and `redacted_thinking` blocks, `cache_control`, null fields and the order of keys do not matter;
* integral floats equal integers (a JavaScript client cannot tell them apart).

The hash is a chain over runs of one role. It can be extended by new messages without reading the old ones again, and
carried on from a stored key as long as the next message has another role (`HistoryHash.resume`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

import msgspec

Content = str | Sequence[Mapping[str, Any]]


class HasContent(Protocol):
    """A message: its role, and a string or content blocks as they came from JSON."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str | list[dict[str, Any]]: ...


_IGNORED_BLOCKS = frozenset({"thinking", "redacted_thinking"})
_DIGEST_SIZE = 20  # 160 bits: no accidental meeting of two conversations, short enough for an index
_ENCODER = msgspec.json.Encoder(order="sorted")


class HistoryHash:
    """The key of a growing conversation. Adding a turn costs time in proportion to that turn alone."""

    __slots__ = ("_chain", "_in_text", "_role", "_run")
    # A finished run of one role is folded into the chain; the open one is a list of its pieces.

    def __init__(self, salt: str | bytes = b"") -> None:
        """`salt` holds what separates conversations beside their messages: principal, system prompt, tools."""
        self._chain = _digest(b"salt", salt.encode() if isinstance(salt, str) else salt)
        self._run: list[bytes] = []
        self._role = ""
        self._in_text = False

    @classmethod
    def resume(cls, key: str) -> Self:
        """Carry on from a stored key. The next message must have another role than the last one hashed."""
        return cls._restore(bytes.fromhex(key), [], "", in_text=False)

    def copy(self) -> Self:
        """An independent hash in the same state."""
        return self._restore(self._chain, self._run.copy(), self._role, in_text=self._in_text)

    @classmethod
    def _restore(cls, chain: bytes, run: list[bytes], role: str, *, in_text: bool) -> Self:
        self = cls.__new__(cls)
        self._chain, self._run, self._role, self._in_text = chain, run, role, in_text
        return self

    def extend(self, messages: Iterable[HasContent]) -> Self:
        """Add messages in order."""
        for message in messages:
            self.add(message.role, message.content)
        return self

    def add(self, role: str, content: Content) -> Self:
        """Add one message."""
        if isinstance(content, str):
            self._text(role, content)
            return self
        for block in content:
            kind = block.get("type")
            if kind in _IGNORED_BLOCKS:
                continue
            if kind == "text" and isinstance(text := block.get("text"), str):
                self._text(role, text)
            else:
                self._enter(role)
                self._run += (b"\0B", _escape(_ENCODER.encode(_canonical_block(block))))
                self._in_text = False
        return self

    def key(self) -> str:
        """The key of all messages so far, 40 hex characters."""
        return (_digest(self._chain, *self._run) if self._run else self._chain).hex()

    def _text(self, role: str, text: str) -> None:
        if not text:
            return
        self._enter(role)
        if not self._in_text:
            self._run.append(b"\0T")
            self._in_text = True
        self._run.append(_escape(text.encode("utf-8", "surrogatepass")))

    def _enter(self, role: str) -> None:
        if self._run:
            if self._role == role:
                return
            self._chain = _digest(self._chain, *self._run)
        self._role, self._in_text = role, False
        self._run = [b"\0R", _escape(role.encode())]


def history_key(messages: Iterable[HasContent], salt: str | bytes = b"") -> str:
    """The key of a whole message list; see the module's first lines for what counts as equal."""
    return HistoryHash(salt).extend(messages).key()


def new_messages_start(messages: Sequence[HasContent]) -> int:
    """The index of the first message after the last `assistant` one: everything before it is history."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "assistant":
            return index + 1
    return 0


def _digest(chain: bytes, *pieces: bytes) -> bytes:
    return hashlib.blake2b(b"".join((chain, *pieces)), digest_size=_DIGEST_SIZE).digest()


def _escape(data: bytes) -> bytes:
    # 0x00 followed by a letter is a mark, 0x00 0x00 a literal NUL: no text can imitate a border.
    return data.replace(b"\0", b"\0\0") if b"\0" in data else data


def _canonical_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """A block without its marks and null fields; nested content in the same way, tool input verbatim."""
    canonical: dict[str, Any] = {}
    for name, value in block.items():
        if value is None or name == "cache_control":
            continue
        if name == "content":
            canonical[name] = _canonical_content(value)
        elif name == "input":
            canonical[name] = _canonical_value(value)
        elif isinstance(value, dict):
            canonical[name] = {key: inner for key, inner in value.items() if inner is not None}
        else:
            canonical[name] = value
    return canonical


def _canonical_content(content: Any) -> Any:
    """The content of a tool result or document: like a message's, a string is one text block."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        return _canonical_value(content)
    blocks: list[Any] = []
    for block in content:
        if not isinstance(block, dict):
            blocks.append(block)
            continue
        if block.get("type") != "text" or not isinstance(text := block.get("text"), str):
            blocks.append(_canonical_block(block))
        elif blocks and isinstance(blocks[-1], str):
            blocks[-1] += text
        elif text:
            blocks.append(text)
    return blocks


def _canonical_value(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _canonical_value(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_canonical_value(inner) for inner in value]
    return value
