"""A CLI in memory: one user line after the other, in as many pieces as the test likes."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import Any

from claude_wrapper.agent.transport import Ending, ExitReport


class ScriptedTransport:
    """Answers each user line with frames that carry its uuid; obeys interrupts; prints a stray run where told to.

    `frames` of a line come from its content: `{"frames": 3, "stray": true}` as a text.
    """

    def __init__(self, chunk: int = 1 << 20) -> None:
        self.pid = self.main_pid = 1
        self.returncode: int | None = None
        self.stderr_tail = ""
        self.lines: list[dict[str, Any]] = []
        self.stopped = 0
        self._chunk = chunk
        self._out = bytearray()
        self._more = asyncio.Event()
        self._exit = asyncio.Event()
        self._queue: deque[tuple[str, dict[str, Any]]] = deque()
        self._queued = asyncio.Event()
        self._interrupted = False
        self._worker = asyncio.create_task(self._work())

    async def read(self) -> bytes:
        while not self._out and not self._exit.is_set():
            self._more.clear()
            await self._more.wait()
        data = bytes(self._out[: self._chunk])
        del self._out[: self._chunk]
        return data

    async def write(self, line: bytes) -> None:
        frame = json.loads(line)
        self.lines.append(frame)
        if frame["type"] == "user":
            self._say(type="command_lifecycle", command_uuid=frame["uuid"], state="queued")
            self._queue.append((frame["uuid"], json.loads(frame["message"]["content"])))
            self._queued.set()
        elif frame["type"] == "control_request":
            if frame["request"]["subtype"] == "interrupt":
                self._interrupted = True
            self._say(
                type="control_response",
                response={"subtype": "success", "request_id": frame["request_id"], "response": {"rewound": True}},
            )
        await asyncio.sleep(0)

    async def exited(self) -> int | None:
        await self._exit.wait()
        return self.returncode

    async def stop(self, *, grace: float, term_grace: float) -> ExitReport:
        self.stopped += 1
        self.die(0)
        self._worker.cancel()
        await asyncio.wait({self._worker})
        return ExitReport(self.returncode, Ending.END_OF_INPUT, 0.0, "")

    def hurry(self) -> None:
        self.die(-9)

    def abort(self) -> None:
        self.die(-9)

    def freeze(self) -> None:
        return

    def thaw(self) -> None:
        return

    def die(self, code: int) -> None:
        if self.returncode is None:
            self.returncode = code
        self._exit.set()
        self._more.set()

    def _say(self, **frame: Any) -> None:
        self._out += json.dumps(frame).encode() + b"\n"
        self._more.set()

    async def _work(self) -> None:
        while True:
            while not self._queue:
                self._queued.clear()
                await self._queued.wait()
            uuid, script = self._queue.popleft()
            if script.get("stray"):  # a run of the CLI's own, between two of ours
                self._say(type="stream_event", event={"uuid": "stray"})
                await asyncio.sleep(0)
                self._say(type="result", result="stray", user_message_uuids=["stray"])
            self._interrupted = False
            self._say(type="command_lifecycle", command_uuid=uuid, state="started")
            for index in range(script.get("frames", 0)):
                if self._interrupted:
                    break
                self._say(type="stream_event", event={"uuid": uuid, "index": index})
                await asyncio.sleep(0)
            if script.get("stray"):
                self._say(type="result", result="stray", user_message_uuids=["stray"])
            self._say(type="result", result=uuid, interrupted=self._interrupted, user_message_uuids=[uuid])
            self._say(type="command_lifecycle", command_uuid=uuid, state="completed")
