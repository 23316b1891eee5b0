"""A scripted Messages API on loopback: what the real one is to the CLI and to the SDKs, driven by the prompt.

    async with ScriptedUpstream() as upstream:
        ...  # point a client at upstream.url; look at upstream.requests

It answers `POST /v1/messages` (JSON and SSE), `POST /v1/messages/count_tokens`, `GET /v1/models` and
`GET /v1/models/{id}` with the headers, bodies and refusals of the Anthropic API (wire-api parts 0 and 1), and it is
strict where the API is: tool calls and tool results must pair up, the version header must be there, models must exist.
The prompt decides what is answered: see the table in `claude_wrapper.testing.script`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
from aiohttp import web

from claude_wrapper.clock import SystemClock
from claude_wrapper.testing import answers, script
from claude_wrapper.testing.answers import Answer
from claude_wrapper.testing.catalogue import MODELS
from claude_wrapper.wire import sse
from claude_wrapper.wire.errorbody import type_of_status
from claude_wrapper.wire.models import ModelInfo, find_model, list_to_wire, model_to_wire
from claude_wrapper.wire.usage import Usage

MAX_BODY_BYTES = 32 * 2**20  # as the real API (wire-api 0.10)
_WRITE_BYTES = 64 * 1024  # deltas without a delay are written in pieces of about this size
_SHUTDOWN_SECONDS = 0.2  # handlers that still hang after `close` was asked for are cancelled then

_NOTHING = Usage()

Sleep = Callable[[float], Awaitable[None]]


@dataclass(eq=False, slots=True)
class RecordedRequest:
    """One request as it arrived, and what became of it. Times are `time.monotonic` seconds."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str] = field(repr=False)
    """Names in lower case."""
    body: dict[str, Any] = field(repr=False)
    """`{}` when there was no JSON object."""
    request_id: str
    started: float
    finished: float | None = None
    status: int | None = None
    usage: Usage = _NOTHING
    cancelled: bool = False
    """Whether the client hung up before the answer was complete."""
    dropped: bool = False
    """Whether the script dropped the connection."""
    whole: bool = False
    """Whether the answer was sent to its end."""
    done: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """Set when the request is over, however it ended."""

    @property
    def text(self) -> str:
        """The driving text of a Messages request."""
        messages = self.body.get("messages")
        return script.received(messages).text if isinstance(messages, list) else ""

    async def wait_done(self) -> Self:
        """Return when the request is over. Bound it with `asyncio.timeout`."""
        await self.done.wait()
        return self


class _Refused(Exception):
    def __init__(self, status: int, message: str, *, kind: str | None = None, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after
        self.kind = kind or type_of_status(status)


class ScriptedUpstream:
    """The server. Start it with `async with` or `start` / `close`; `url` is its base URL."""

    def __init__(
        self,
        *,
        api_keys: Collection[str] | None = None,
        models: Sequence[ModelInfo] = MODELS,
        sleep: Sleep | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        keep: int = 10_000,
    ) -> None:
        """`api_keys`: other keys get 401 (None: any or no key is accepted). `keep`: how many requests are recorded."""
        self.requests: deque[RecordedRequest] = deque(maxlen=keep)
        self.count = 0
        """Requests to `/v1/messages` so far, refused ones included."""
        self.active = 0
        """Requests to `/v1/messages` that are being answered now."""
        self.usage_totals = Usage()
        """Sum over all answers that were sent to their end."""
        self.api_keys = api_keys
        self.models = tuple(models)
        self.slow_reads = 0.0
        """Seconds before a token count is answered."""
        self.fail_models: dict[str, int] = {}
        """Models whose Messages requests are refused with this status until it is taken out again."""
        self._sleep: Sleep = sleep or SystemClock().sleep
        self._clock = SystemClock()
        self._host, self._port = host, port
        self._runner: web.AppRunner | None = None
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()
        self._failed_once: set[str] = set()
        self._arrived: Counter[str] = Counter()
        self._serial = 0

    # Life --------------------------------------------------------------------------------------------------------

    async def start(self) -> Self:
        """Listen. Raises OSError when the port is taken."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/v1/messages", self._messages)
        app.router.add_post("/v1/messages/count_tokens", self._count_tokens)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/v1/models/{model}", self._get_model)
        app.router.add_route("*", "/{path:.*}", self._unknown)
        # Without handler_cancellation a handler would not learn that its client has gone.
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS, keepalive_timeout=75
        )
        await runner.setup()
        site = web.TCPSite(runner, self._host, self._port, backlog=1024)
        await site.start()
        self._runner = runner
        self._port = runner.addresses[0][1]
        return self

    async def close(self) -> None:
        """Stop listening and end what hangs."""
        self._closing.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        return f"http://{self._host}:{self._port}"

    # What tests look at ----------------------------------------------------------------------------------------------

    @property
    def calls(self) -> list[RecordedRequest]:
        """The recorded requests to `/v1/messages`, in the order of their arrival."""
        return [request for request in self.requests if request.path == "/v1/messages"]

    async def wait_for(self, count: int) -> list[RecordedRequest]:
        """Return the calls once `count` requests to `/v1/messages` have arrived. Bound it with `asyncio.timeout`."""
        await self.wait_until(lambda: self.count >= count)
        return self.calls

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once the condition holds; it is asked after each arrival and each end of a request."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def forget(self) -> None:
        """Start counting and recording anew."""
        self.requests.clear()
        self._failed_once.clear()
        self._arrived.clear()
        self.count, self.usage_totals = 0, Usage()

    # Messages --------------------------------------------------------------------------------------------------------

    async def _messages(self, http: web.Request) -> web.StreamResponse:
        self.count += 1
        self.active += 1
        record = self._record(http)
        try:
            raw = await self._read(http, record)
            self._check_messages(record.body)
            return await self._answer(http, record, raw)
        except _Refused as refused:
            return self._refusal(record, refused)
        except asyncio.CancelledError:
            record.cancelled = not record.dropped
            raise
        finally:
            self.active -= 1
            self._finish(record)

    async def _answer(self, http: web.Request, record: RecordedRequest, raw: bytes) -> web.StreamResponse:
        if (status := self.fail_models.get(record.body["model"])) is not None:
            raise _Refused(status, f"Scripted error {status} of the model.")
        step, heard = answers.due_step(record.body, self._failed_before, self._arrivals)
        if step.first:
            await self._sleep(step.first)
        if step.error is not None:
            status, kind = step.error
            retry_after = step.retry_after or ("1" if status in {429, 529} else None)
            raise _Refused(status, f"Scripted error {status}.", kind=kind, retry_after=retry_after)
        if step.hang_after == -1:
            await self._hang(http, record)
        made = answers.answer(record.body, raw, step, heard, lambda: f"toolu_{self._next():024d}")
        record.usage = made.usage
        model = record.body["model"]
        message_id = f"msg_{self._next():024d}"
        if not record.body.get("stream"):
            self.usage_totals += made.usage
            record.whole = True
            return self._json(record, answers.message(made, message_id, model))
        return await self._stream(http, record, made, answers.frames(made, message_id, model))

    async def _stream(
        self, http: web.Request, record: RecordedRequest, made: Answer, pieces: list[bytes]
    ) -> web.StreamResponse:
        record.status = 200
        headers = {**self._headers(record), "content-type": "text/event-stream; charset=utf-8"}
        response = web.StreamResponse(headers=headers | {"cache-control": "no-cache"})
        await response.prepare(http)
        step = made.step
        try:
            fault = min(
                (at for at in (step.cut_after, step.hang_after, _at(step.error_after)) if at is not None), default=None
            )
            await self._write(response, pieces if fault is None else pieces[: min(fault, len(pieces) - 1)], step.delay)
            if fault is not None:
                await self._fault(http, record, response, step)
                return response
            self.usage_totals += made.usage
            record.whole = True
            await response.write_eof()
        except ConnectionError:  # aiohttp tells of a lost client by whichever comes first: this or cancellation
            record.cancelled = not record.dropped
        return response

    async def _write(self, response: web.StreamResponse, pieces: list[bytes], delay: float) -> None:
        if delay:
            for number, piece in enumerate(pieces):
                if number:
                    await self._sleep(delay)
                await response.write(piece)
            return
        whole = b"".join(pieces)
        for start in range(0, len(whole), _WRITE_BYTES):
            await response.write(whole[start : start + _WRITE_BYTES])

    async def _fault(
        self, http: web.Request, record: RecordedRequest, response: web.StreamResponse, step: script.Step
    ) -> None:
        if step.error_after is not None:
            kind = step.error_after[1]
            await response.write(sse.encode("error", _error(kind, f"Scripted {kind}.", record)))
            await response.write_eof()
            return
        if step.cut_after is not None:
            self._drop(http, record)
        await self._hang(http, record)

    async def _hang(self, http: web.Request, record: RecordedRequest) -> None:
        """Until the client goes (which cancels the handler) or the server closes."""
        await self._closing.wait()
        self._drop(http, record)

    @staticmethod
    def _drop(http: web.Request, record: RecordedRequest) -> None:
        record.dropped = True
        if http.transport is not None:
            http.transport.abort()

    def _failed_before(self, key: str) -> bool:
        if key in self._failed_once:
            return True
        self._failed_once.add(key)
        return False

    def _arrivals(self, text: str, first_step: bool) -> int:
        self._arrived[text] += first_step
        return self._arrived[text]

    # The other endpoints -------------------------------------------------------------------------------------------------

    async def _count_tokens(self, http: web.Request) -> web.Response:
        record = self._record(http)
        try:
            if self.slow_reads:
                await self._sleep(self.slow_reads)
            raw = await self._read(http, record)
            self._check_messages(record.body, needs_max_tokens=False)
            step, _ = answers.due_step(record.body, self._failed_before)
            if step.hang_after == -1:
                await self._hang(http, record)
            return self._json(record, {"input_tokens": answers.prompt_usage(record.body, raw).prompt_tokens})
        except _Refused as refused:
            return self._refusal(record, refused)
        finally:
            self._finish(record)

    async def _list_models(self, http: web.Request) -> web.Response:
        record = self._record(http)
        try:
            self._check_headers(http)
            limit = http.query.get("limit", "20")
            if not (limit.isdigit() and 1 <= int(limit) <= 1000):
                raise _Refused(400, "limit: must be between 1 and 1000")
            cursors = {name: http.query.get(name) for name in ("after_id", "before_id")}
            return self._json(record, list_to_wire(self.models, limit=int(limit), **cursors))
        except _Refused as refused:
            return self._refusal(record, refused)
        finally:
            self._finish(record)

    async def _get_model(self, http: web.Request) -> web.Response:
        record = self._record(http)
        try:
            self._check_headers(http)
            return self._json(record, model_to_wire(self._model(http.match_info["model"])))
        except _Refused as refused:
            return self._refusal(record, refused)
        finally:
            self._finish(record)

    async def _unknown(self, http: web.Request) -> web.Response:
        record = self._record(http)
        response = self._refusal(record, _Refused(404, "Not found"))
        self._finish(record)
        return response

    # Checks ------------------------------------------------------------------------------------------------------------------

    async def _read(self, http: web.Request, record: RecordedRequest) -> bytes:
        self._check_headers(http)
        try:
            raw = await http.read()
        except web.HTTPRequestEntityTooLarge:
            raise _Refused(413, f"Request exceeds the maximum size of {MAX_BODY_BYTES} bytes") from None
        try:
            body = msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _Refused(400, f"The request body is not valid JSON: {error}") from None
        if not isinstance(body, dict):
            raise _Refused(400, "The request body must be a JSON object")
        record.body = body
        return raw

    def _check_headers(self, http: web.Request) -> None:
        if self.api_keys is not None:
            bearer = http.headers.get("authorization", "").removeprefix("Bearer ")
            if not {http.headers.get("x-api-key"), bearer} & set(self.api_keys):
                raise _Refused(401, "invalid x-api-key")
        if "anthropic-version" not in http.headers:
            raise _Refused(400, "anthropic-version: header is required")

    def _check_messages(self, body: Mapping[str, Any], *, needs_max_tokens: bool = True) -> None:
        if not isinstance(body.get("model"), str):
            raise _Refused(400, "model: Field required")
        self._model(body["model"])
        limit = body.get("max_tokens")
        if needs_max_tokens and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
            raise _Refused(400, "max_tokens: Field required")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _Refused(400, "messages: at least one message is required")
        check_turns(messages)

    def _model(self, name: str) -> ModelInfo:
        found = find_model(self.models, name)
        if found is None:
            raise _Refused(404, f"model: {name}")
        return found

    # Answers -----------------------------------------------------------------------------------------------------------------

    def _record(self, http: web.Request) -> RecordedRequest:
        record = RecordedRequest(
            http.method,
            http.path,
            dict(http.query),
            {name.lower(): value for name, value in http.headers.items()},
            {},
            f"req_{self._next():024d}",
            self._clock.monotonic(),
        )
        self.requests.append(record)
        self._changed.set()
        return record

    def _finish(self, record: RecordedRequest) -> None:
        record.finished = self._clock.monotonic()
        record.done.set()
        self._changed.set()

    def _json(self, record: RecordedRequest, body: Any) -> web.Response:
        record.status = 200
        return web.Response(
            body=msgspec.json.encode(body), content_type="application/json", headers=self._headers(record)
        )

    def _refusal(self, record: RecordedRequest, refused: _Refused) -> web.Response:
        record.status = refused.status
        headers = self._headers(record)
        if refused.retry_after is not None:
            headers["retry-after"] = refused.retry_after
        body = _error(refused.kind, refused.message, record)
        return web.Response(status=refused.status, body=body, content_type="application/json", headers=headers)

    @staticmethod
    def _headers(record: RecordedRequest) -> dict[str, str]:
        return {"request-id": record.request_id, **_ACCOUNT_HEADERS}

    def _next(self) -> int:
        self._serial += 1
        return self._serial


_ACCOUNT_HEADERS = {
    "anthropic-organization-id": "00000000-0000-4000-8000-000000000000",
    **{
        f"anthropic-ratelimit-{what}-{name}": value
        for what in ("requests", "tokens", "input-tokens", "output-tokens")
        for name, value in (("limit", "1000000"), ("remaining", "999999"), ("reset", "2030-01-01T00:00:00Z"))
    },
}


def _error(kind: str, message: str, record: RecordedRequest) -> bytes:
    error = {"type": kind, "message": message}
    return msgspec.json.encode({"type": "error", "error": error, "request_id": record.request_id})


def _at(error_after: tuple[int, str] | None) -> int | None:
    return None if error_after is None else error_after[0]


def check_turns(messages: Sequence[Any]) -> None:
    """What the API demands of a conversation: known roles, text that is not empty, tool calls and results in pairs."""
    open_calls: set[str] = set()
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in {"user", "assistant", "system"}:
            raise _Refused(400, f"messages.{index}.role: must be one of user, assistant, system")
        if role == "system":
            continue
        content = script.blocks(message.get("content"))
        if not content and index < len(messages) - 1:
            raise _Refused(400, f"messages.{index}: all messages must have non-empty content")
        if any(block.get("type") == "text" and not block.get("text") for block in content):
            raise _Refused(400, f"messages.{index}: text content blocks must be non-empty")
        if role == "assistant":
            open_calls |= {str(block.get("id")) for block in content if block.get("type") == "tool_use"}
            continue
        results = {str(block.get("tool_use_id")) for block in content if block.get("type") == "tool_result"}
        if results - open_calls:
            raise _Refused(400, f"messages.{index}: unexpected `tool_use_id` found in `tool_result` blocks")
        if open_calls - results:
            raise _Refused(400, f"messages.{index}: `tool_use` ids were found without `tool_result` blocks")
        open_calls = set()
    first = next((message["role"] for message in messages if message["role"] != "system"), None)
    if first != "user":
        raise _Refused(400, "messages: first message must use the user role")
