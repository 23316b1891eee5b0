"""Structured logs: one event with fields per line, JSON for machines and colours for a terminal.

`configure` is called once, by the composition root. From then on structlog's loggers and the standard library's go the
same way: level, sampling, context (`telemetry.context`), redaction, encoding, one `write` per line. Lines carry
identifiers and measurements; content of conversations is never logged, nor is the message of a foreign exception, which
may quote content (`exceptions.summary`).

Events are named `noun.verb_in_past`: `request.completed`, `turn.failed`, `pool.spawned`.
"""

from __future__ import annotations

import logging
import sys
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final, Protocol

import msgspec
import structlog

from claude_wrapper.clock import Clock, SystemClock
from claude_wrapper.telemetry import context
from claude_wrapper.telemetry.exceptions import summary
from claude_wrapper.telemetry.redact import Redactor

LEVELS: Final[Mapping[str, int]] = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_NUMBER_OF: Final[Mapping[str, int]] = {**LEVELS, "warn": 30, "exception": 40, "fatal": 50}
_NAME_OF: Final[Mapping[str, str]] = {"warn": "warning", "exception": "error", "fatal": "critical"}
MAX_LINE: Final = 32_768
"""Characters of a line; beyond it long fields are cut to `MAX_FIELD` each, and the line says `cut`."""
MAX_FIELD: Final = 1_024
MAX_LIBRARY_LINE: Final = 500
_SAMPLED_BY: Final = ("request", "turn", "job", "session")

Counted = Callable[[str], None]


class Stream(Protocol):
    """Where lines go: standard error, a file, a `StringIO`."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> object: ...
    def isatty(self) -> bool: ...


class Logs:
    """The way of a line from the call to the stream. Returned by `configure`, so that the level can change at run time."""

    def __init__(
        self,
        level: str,
        stream: Stream,
        *,
        console: bool,
        sample: Mapping[str, float],
        redactor: Redactor,
        clock: Clock,
        fields: Mapping[str, str],
        exception_messages: bool,
        on_line: Counted | None,
        on_drop: Callable[[], None] | None,
    ) -> None:
        self.redactor = redactor
        self._stream = stream
        self._console = structlog.dev.ConsoleRenderer(colors=stream.isatty(), sort_keys=False) if console else None
        self._sample = dict(sample)
        self._clock = clock
        self._fields = dict(fields)
        self._exception_messages = exception_messages
        self._on_line = on_line
        self._on_drop = on_drop
        self._encoder = msgspec.json.Encoder()
        self._bridge = _Bridge(self)
        self.dropped = 0
        self.set_level(level)

    def set_level(self, level: str) -> None:
        """The least severe level that is written: a key of `LEVELS`. Raises KeyError for any other name."""
        self._threshold = LEVELS[level]
        # Libraries' debug lines quote what they handle (statements with their parameters): never written.
        logging.getLogger().setLevel(max(logging.INFO, self._threshold))

    def set_sample(self, sample: Mapping[str, float]) -> None:
        """The share of lines to keep, by event name; see `configure`."""
        self._sample = dict(sample)

    def close(self) -> None:
        """Stop taking the standard library's records. Idempotent."""
        logging.getLogger().removeHandler(self._bridge)

    def enabled(self, level: int) -> bool:
        """Whether lines of this numeric level are written."""
        return level >= self._threshold

    def __call__(self, _logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """The one structlog processor: write the line, or drop it."""
        level = _NUMBER_OF.get(method, 20)
        if level >= self._threshold:
            self.write(_NAME_OF.get(method, method), level, event)
        raise structlog.DropEvent

    def write(self, level: str, number: int, event: Mapping[str, Any]) -> None:
        """Write one line, unless sampling drops it. A stream that fails loses the line, never the caller."""
        bound = context.current()
        share = self._sample.get(str(event.get("event"))) if self._sample and number < LEVELS["warning"] else None
        if share is not None and not _kept(share, bound, event):
            return
        line = self._line(level, event, bound, share)
        try:
            self._stream.write(line)
            self._stream.flush()
        except (OSError, ValueError):  # a full disk, a closed pipe, a closed file
            self.dropped += 1
            if self._on_drop:
                self._on_drop()
            return
        if self._on_line:
            self._on_line(level)

    def _line(self, level: str, event: Mapping[str, Any], bound: Mapping[str, str], share: float | None) -> str:
        fields: dict[str, Any] = {
            "time": self._clock.now().isoformat(timespec="milliseconds"),
            "level": level,
            "event": event.get("event"),
            **self._fields,
            **bound,
        }
        if share is not None:
            fields["sample_share"] = share
        exception = _exception_of(event)
        for name, value in event.items():
            if name not in ("event", "exc_info", "stack_info"):
                fields[name] = self.redactor.named(name, value, by_shape=False)
        if exception is not None:
            fields["exception"] = summary(exception, messages=self._exception_messages)
        if self._console is None:
            return self.redactor.text(self._encode(fields), limit=sys.maxsize) + "\n"
        return self.redactor.text(str(self._console(None, level, _for_console(fields)))) + "\n"

    def _encode(self, fields: dict[str, Any]) -> str:
        line = self._json(fields)
        if len(line) > MAX_LINE:
            # Cut field by field: a line that is cut as a whole would no longer be JSON.
            line = self._json({name: self._cut(value) for name, value in fields.items()} | {"cut": True})
        return line

    def _cut(self, value: Any) -> Any:
        text = value if isinstance(value, str) else self._json(value)
        return value if len(text) <= MAX_FIELD else self.redactor.text(text, limit=MAX_FIELD)

    def _json(self, value: Any) -> str:
        try:
            return self._encoder.encode(value).decode()
        except (UnicodeEncodeError, TypeError, ValueError):  # a lone surrogate, a huge number: JSON cannot carry it
            return self._encoder.encode(_encodable(value)).decode()


class _Bridge(logging.Handler):
    """Records of the standard library's loggers (uvicorn, aiohttp, SQLAlchemy) become lines like ours."""

    def __init__(self, logs: Logs) -> None:
        super().__init__()
        self._logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        if not self._logs.enabled(record.levelno):
            return
        fields: dict[str, Any] = {"event": "library.logged", "module": record.name, "message": _first_line(record)}
        if record.exc_info and record.exc_info[1] is not None:
            fields["exc_info"] = record.exc_info[1]
        level = "debug" if record.levelno < 20 else record.levelname.lower()
        self._logs.write(level if level in LEVELS else "info", record.levelno, fields)


def configure(
    level: str = "info",
    fmt: str = "auto",
    stream: Stream | None = None,
    *,
    sample: Mapping[str, float] | None = None,
    redactor: Redactor | None = None,
    clock: Clock | None = None,
    fields: Mapping[str, str] | None = None,
    exception_messages: bool = False,
    on_line: Counted | None = None,
    on_drop: Callable[[], None] | None = None,
) -> Logs:
    """Send all logs to `stream` (default: standard error).

    `fmt` is `json`, `console` or `auto` (console when the stream is a terminal). `sample` maps an event name to the
    share of its lines to keep, 0 to 1; warnings and errors are always kept, and all lines of one request go the same
    way. `fields` are in every line (version, replica). `exception_messages` shows the messages of foreign exceptions,
    which may quote content. `on_line` is told the level of each written line, `on_drop` of each that could not be.
    """
    out: Stream = sys.stderr if stream is None else stream
    logs = Logs(
        level,
        out,
        console=fmt == "console" or (fmt == "auto" and out.isatty()),
        sample=sample or {},
        redactor=redactor or Redactor(),
        clock=clock or SystemClock(),
        fields=fields or {},
        exception_messages=exception_messages,
        on_line=on_line,
        on_drop=on_drop,
    )
    structlog.configure(
        processors=[logs],
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        context_class=dict,
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=False,  # the level changes at run time, and tests configure more than once
    )
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one, _Bridge)]:
        root.removeHandler(handler)
    root.addHandler(logs._bridge)  # noqa: SLF001 - the bridge is this module's own
    return logs


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry `module: name`; may be made at import time, before `configure`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(module=name)
    return logger


def _first_line(record: logging.LogRecord) -> str:
    """What a library says, without what it appends: asyncio and SQLAlchemy put whole objects into further lines."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError):  # arguments that do not fit the format: the library's fault, not the caller's
        message = str(record.msg)
    return message.split("\n", 1)[0][:MAX_LIBRARY_LINE]


def _kept(share: float, bound: Mapping[str, str], event: Mapping[str, Any]) -> bool:
    for name in _SAMPLED_BY:
        identifier = bound.get(name) or event.get(name)
        if identifier:
            return zlib.crc32(str(identifier).encode()) < share * 2**32
    return share > 0  # a line that belongs to nothing cannot be sampled by what it belongs to


def _exception_of(event: Mapping[str, Any]) -> BaseException | None:
    given = event.get("exc_info")
    if isinstance(given, BaseException):
        return given
    if isinstance(given, tuple):
        return given[1] if isinstance(given[1], BaseException) else None
    return sys.exc_info()[1] if given else None


def _for_console(fields: dict[str, Any]) -> dict[str, Any]:
    crash = fields.pop("exception", None)
    shown = {("timestamp" if name == "time" else name): value for name, value in fields.items()}
    if crash:
        shown["error"] = " <- ".join(f"{one['type']}: {one.get('message', '')}".rstrip(": ") for one in crash["chain"])
        shown["at"] = crash["frames"][-1] if crash["frames"] else ""
    return shown


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_encodable(str(name)): _encodable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)
