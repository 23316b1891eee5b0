"""Control calls in both directions, beside the conversation.

Ours: each has an id, a time limit and one waiter. The CLI's: each is answered in a task of its own, so that a
permission question that waits for a person does not stop the reader; their number is bounded, and the CLI may withdraw
one.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from claude_wrapper.errors import AgentTimeout, WrapperError
from claude_wrapper.wire.control import Calls, ControlRefused, parse_ask, parse_cancel, parse_reply
from claude_wrapper.wire.streamjson import Frame, control_error_line, control_request_line, control_success_line

OnControl = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""(subtype, request) → response. An exception refuses the request; a WrapperError's message is told to the CLI."""

Write = Callable[[bytes], Awaitable[None]]


async def deny(subtype: str, request: dict[str, Any]) -> dict[str, Any]:
    """What happens when nobody decides: tools are denied, everything else is refused."""
    if subtype == "can_use_tool":
        return {"behavior": "deny", "message": f"The tool {request.get('tool_name')} is not permitted here."}
    raise ControlRefused(f"nothing here answers {subtype}")


class Controls:
    """The open calls of one process, both ways."""

    def __init__(self, write: Write, *, asks: int, calls: int, name: str) -> None:
        """`write` sends a line; `asks` and `calls` bound what may be open; `name` is for the tasks."""
        self.on_control: OnControl = deny
        self._write = write
        self._asks_limit = asks
        self._name = name
        self._calls = Calls(calls)
        self._waiters: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._asks: dict[str, asyncio.Task[None]] = {}
        self._refusals: set[asyncio.Task[None]] = set()
        self._sent = 0

    async def call(self, subtype: str, fields: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        """Ask the process and return its response.

        Raises AgentTimeout after `timeout` seconds, ControlRefused when it says no, and what `fail` was given.
        """
        request_id = self._open(subtype)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiters[request_id] = answer
        try:
            async with asyncio.timeout(timeout):
                await self._write(control_request_line(request_id, {"subtype": subtype, **fields}))
                return await answer
        except TimeoutError:
            raise AgentTimeout(f"the Claude process did not answer {subtype} within {timeout:g} s") from None
        finally:
            self._calls.settle(request_id)
            self._waiters.pop(request_id, None)
            if answer.done() and not answer.cancelled():
                answer.exception()  # a failure that came while the write failed is the same failure

    async def notify(self, subtype: str, fields: dict[str, Any]) -> None:
        """Ask the process and do not wait for the response, which is dropped when it comes."""
        self._sent += 1
        await self._write(control_request_line(f"cw-{self._sent}", {"subtype": subtype, **fields}))

    def replied(self, frame: Frame) -> None:
        """A `control_response` came. An answer to nobody is dropped. Raises MalformedFrame."""
        reply = parse_reply(frame)
        subtype = self._calls.settle(reply.request_id)
        answer = self._waiters.get(reply.request_id)
        if subtype is None or answer is None or answer.done():
            return
        if reply.error is None:
            answer.set_result(reply.response)
        else:
            answer.set_exception(ControlRefused(f"the Claude process refused {subtype}: {reply.error[:500]}"))

    def asked(self, frame: Frame) -> None:
        """A `control_request` came: answer it in a task. Raises MalformedFrame."""
        ask = parse_ask(frame)
        if ask.request_id in self._asks:
            return  # the same id again while it is open: the first one counts
        if len(self._asks) >= self._asks_limit:
            if len(self._refusals) < self._asks_limit:  # past that, silence: the process floods us
                refusal = asyncio.create_task(self._refuse(ask.request_id), name=f"{self._name}-refuse")
                self._refusals.add(refusal)
                refusal.add_done_callback(self._refusals.discard)
            return
        task = asyncio.create_task(self._answer(ask.request_id, ask.subtype, ask.request), name=f"{self._name}-ask")
        self._asks[ask.request_id] = task
        task.add_done_callback(functools.partial(self._answered, ask.request_id))

    def withdrawn(self, frame: Frame) -> None:
        """A `control_cancel_request` came. Raises MalformedFrame."""
        task = self._asks.get(parse_cancel(frame))
        if task is not None:
            task.cancel()

    def fail(self, error: WrapperError) -> None:
        """The process is lost: every waiter gets `error`, every task of ours ends."""
        self._calls.drain()
        for answer in self._waiters.values():
            if not answer.done():
                answer.set_exception(error)
        for task in (*self._asks.values(), *self._refusals):
            task.cancel()

    async def settled(self) -> None:
        """Return when the tasks that `fail` cancelled have ended."""
        tasks = [*self._asks.values(), *self._refusals]
        if tasks:
            await asyncio.wait(tasks)

    def _open(self, subtype: str) -> str:
        self._sent += 1
        request_id = f"cw-{self._sent}"
        self._calls.open(request_id, subtype)
        return request_id

    async def _answer(self, request_id: str, subtype: str, request: dict[str, Any]) -> None:
        try:
            line = control_success_line(request_id, await self.on_control(subtype, request))
        except WrapperError as error:
            line = control_error_line(request_id, error.message)
        except Exception as error:  # noqa: BLE001 (the CLI must get an answer, or its turn hangs)
            line = control_error_line(request_id, f"the server could not answer: {type(error).__name__}")
        await self._send(line)

    def _answered(self, request_id: str, _task: asyncio.Task[None]) -> None:
        self._asks.pop(request_id, None)

    async def _refuse(self, request_id: str) -> None:
        await self._send(control_error_line(request_id, f"more than {self._asks_limit} requests are open already"))

    async def _send(self, line: bytes) -> None:
        try:
            await self._write(line)
        except WrapperError:
            return  # the process is gone, and its end is reported by the connection
