"""One attempt at an upstream: ask, look at what came back before anything goes to the process."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from claude_wrapper.broker import retry
from claude_wrapper.broker.inject import Headers
from claude_wrapper.broker.meter import Meter
from claude_wrapper.broker.retry import Failure
from claude_wrapper.broker.settings import BrokerSettings
from claude_wrapper.broker.upstream import Answer, Ask, Upstream, UpstreamFailure
from claude_wrapper.clock import Clock

_ERROR_EVENT = b"event: error"
_STATUS_OF_ERROR = {
    "overloaded_error": 529,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "api_error": 500,
    "authentication_error": 401,
    "permission_error": 403,
    "billing_error": 402,
    "not_found_error": 404,
    "invalid_request_error": 400,
}


@dataclass(frozen=True, slots=True)
class Opened:
    """An answer that goes to the process; its first piece has been read."""

    answer: Answer
    first: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Rejected:
    """An attempt that failed before any byte went to the process."""

    failure: Failure
    type: str
    message: str
    body: bytes = field(repr=False)
    """Anthropic-shaped; the upstream's own bytes where it sent such."""
    headers: Headers = field(default_factory=list, repr=False)
    request_id: str | None = None
    dropped: bool = False
    """An idle connection had gone: worth one more attempt at once."""


async def attempt(upstream: Upstream, ask: Ask, settings: BrokerSettings, clock: Clock) -> Opened | Rejected:
    """Ask once. Never raises for what the upstream does; the connection of a rejected answer is let go."""
    try:
        answer = await upstream.ask(ask)
    except UpstreamFailure as failure:
        return _unanswered(failure)
    outcome: Opened | Rejected | None = None
    try:
        outcome = await _look(answer, settings, clock)
    except UpstreamFailure as failure:
        outcome = _unanswered(failure)
    finally:
        if not isinstance(outcome, Opened):
            answer.close()
    return outcome


async def _look(answer: Answer, settings: BrokerSettings, clock: Clock) -> Opened | Rejected:
    if 300 <= answer.status < 400:
        return _ours(502, "The upstream redirects; the broker does not follow.")
    if answer.status >= 400:
        return _rejected(answer, await answer.read_all(settings.max_error_bytes), clock)
    if answer.encoded:
        return _ours(502, "The upstream compresses its answer although it was asked not to: it cannot be metered.")
    first = await answer.read()
    if answer.is_stream and first.startswith(_ERROR_EVENT):
        return _error_event(answer, first, clock) or Opened(answer, first)
    return Opened(answer, first)


def shaped(kind: str, message: str) -> bytes:
    """An error body in the shape of the Messages API."""
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})


def _unanswered(failure: UpstreamFailure) -> Rejected:
    kind = "timeout_error" if failure.status == retry.TIMED_OUT else "api_error"
    body = shaped(kind, failure.message)
    return Rejected(Failure(failure.status), kind, failure.message, body, dropped=failure.dropped)


def _ours(status: int, message: str) -> Rejected:
    return Rejected(Failure(status, should_retry=False), "api_error", message, shaped("api_error", message))


def _rejected(answer: Answer, body: bytes, clock: Clock) -> Rejected:
    meter = Meter(streamed=False, max_json_bytes=len(body))
    if not answer.encoded:
        meter.feed(body)
        meter.end()
    if meter.error is not None:
        kind, message = meter.error
        sent = body
    else:
        kind, message = "api_error", f"The upstream answered {answer.status}."
        sent = shaped(kind, message)
    return Rejected(
        _failure(answer, answer.status, clock), kind, message, sent, answer.header_pairs(), request_id(answer)
    )


def _error_event(answer: Answer, first: bytes, clock: Clock) -> Rejected | None:
    """A stream that begins with an error is an error answer: nothing of it has reached the process yet."""
    meter = Meter(streamed=True, max_json_bytes=0)
    meter.feed(first)
    if meter.error is None:
        return None
    kind, message = meter.error
    failure = _failure(answer, _STATUS_OF_ERROR.get(kind, 500), clock)
    return Rejected(failure, kind, message, shaped(kind, message), [], request_id(answer))


def _failure(answer: Answer, status: int, clock: Clock) -> Failure:
    headers = answer.headers
    return Failure(status, retry.retry_after(headers, clock.now()), retry.should_retry(headers))


def request_id(answer: Answer) -> str | None:
    """The upstream's own id of the request."""
    return answer.headers.get("request-id") or answer.headers.get("x-request-id")
