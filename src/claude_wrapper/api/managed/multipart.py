"""Multipart bodies, part by part as they arrive: never whole in memory, never on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from claude_wrapper.errors import InvalidRequest, RequestTooLarge

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_HEAD: Final = 16 * 1024
MAX_TEXT: Final = 64 * 1024
OVERHEAD: Final = 2**20
"""Bytes that boundaries, heads and small fields may take beside the content."""


@dataclass(frozen=True, slots=True)
class Part:
    """The head of one part."""

    name: str
    """Without a trailing `[]`."""
    filename: str | None
    content_type: str | None


class Multipart:
    """One body. Iterate over `parts`; read each part's `content` before the next, or it is passed over."""

    def __init__(self, request: Request, *, limit: int, max_parts: int) -> None:
        """`limit` in bytes for the whole body. Raises InvalidRequest if the request is not multipart."""
        kind, options = parse_options_header(request.headers.get("content-type"))
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 256:
            raise InvalidRequest("must be multipart/form-data with a boundary", field="content-type")
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise RequestTooLarge(f"the request body is larger than {limit} bytes")
        self._request = request
        self._limit = limit
        self._max_parts = max_parts
        self._collector = _Collector()
        self._parser = MultipartParser(boundary, self._collector.callbacks())
        self._events = self._read()
        self._open = False

    async def parts(self) -> AsyncIterator[Part]:
        """The heads, in order. Raises InvalidRequest for a body that is damaged or ends in the middle."""
        count = 0
        async for event in self._events:
            if isinstance(event, Part):
                count += 1
                if count > self._max_parts:
                    raise InvalidRequest(f"at most {self._max_parts} parts", field="body")
                self._open = True
                yield event

    async def content(self) -> AsyncIterator[bytes]:
        """The bytes of the present part."""
        while self._open:
            event = await anext(self._events)
            if event is None:
                self._open = False
            elif isinstance(event, bytes):
                yield event

    async def text(self, field: str) -> str:
        """A small field. Raises InvalidRequest."""
        content = bytearray()
        async for piece in self.content():
            content += piece
            if len(content) > MAX_TEXT:
                raise InvalidRequest(f"has at most {MAX_TEXT} bytes", field=field)
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise InvalidRequest("must be UTF-8", field=field) from None

    async def _read(self) -> AsyncIterator[Part | bytes | None]:
        """Heads, pieces, and None at the end of each part."""
        size = 0
        collector = self._collector
        async for chunk in self._request.stream():
            size += len(chunk)
            if size > self._limit:
                raise RequestTooLarge(f"the request body is larger than {self._limit} bytes")
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise InvalidRequest(f"the multipart body cannot be read: {error}", field="body") from None
            while collector.events:
                yield collector.events.popleft()
        if not collector.ended:
            raise InvalidRequest("the multipart body ends in the middle", field="body")


class _Collector:
    """Takes the parser's callbacks and puts events in a row."""

    def __init__(self) -> None:
        self.events: deque[Part | bytes | None] = deque()  # of one chunk: emptied before the next is parsed
        self.ended = False
        self._name = bytearray()
        self._value = bytearray()
        self._head: dict[str, str] = {}
        self._size = 0

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_name,
            "on_header_value": self._on_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._head_end,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._head, self._size = {}, 0

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._name, data[start:end])

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._value, data[start:end])

    def _grow(self, buffer: bytearray, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > MAX_HEAD:
            raise InvalidRequest(f"the head of a part has at most {MAX_HEAD} bytes", field="body")
        buffer += piece

    def _header_end(self) -> None:
        self._head[self._name.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._name.clear()
        self._value.clear()

    def _head_end(self) -> None:
        disposition, options = parse_options_header(self._head.get("content-disposition"))
        name = options.get(b"name")
        if disposition != b"form-data" or name is None:
            raise InvalidRequest("a part has no name", field="body")
        filename = options.get(b"filename")
        self.events.append(
            Part(
                _text(name).removesuffix("[]"),
                None if filename is None else _text(filename),
                self._head.get("content-type"),
            )
        )

    def _data(self, data: bytes, start: int, end: int) -> None:
        if end > start:
            self.events.append(data[start:end])

    def _part_end(self) -> None:
        self.events.append(None)

    def _end(self) -> None:
        self.ended = True


def _text(value: bytes) -> str:
    """Clients send UTF-8; what is none is read as the standard's Latin-1."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
