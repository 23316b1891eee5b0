"""Conversations through `/v1/messages`: stateless ones and named ones."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec

from claude_wrapper.testing.soak.asking import ANSWER_SECONDS, Asker, Reply, refused
from claude_wrapper.testing.soak.outcomes import Outcome
from claude_wrapper.testing.soak.plan import ConversationPlan, TurnPlan
from claude_wrapper.testing.soak.record import Record
from claude_wrapper.testing.soak.served import Served
from claude_wrapper.wire.sse import SSEDecoder

MODEL: Final = "claude-sonnet-5-5"
TURN_SECONDS: Final = 45
TOOL: Final = {"name": "look", "description": "Looks.", "input_schema": {"type": "object"}}
_HANG_UP_AFTER: Final = 10
_EVENTS_TOLD: Final = 20


@dataclass(eq=False)
class MessagesConversation:
    """One of them."""

    asker: Asker
    plan: ConversationPlan
    record: Record
    until: float
    """Seconds since the start after which no turn begins."""

    async def hold(self) -> None:
        """All its turns."""
        history: list[dict[str, Any]] = []
        for turn in self.plan.turns:
            if self.record.now >= self.until:
                return
            await self.asker.up.wait()
            message: dict[str, Any] = {"role": "user", "content": turn.prompt}
            outcome, content = await self._ask(self._body(turn, [*history, message]), turn)
            if turn.kind == "tools" and content and content[-1].get("type") == "tool_use":
                self.record.outcomes.append(outcome)
                answered = {"role": "assistant", "content": content}
                result = {"type": "tool_result", "tool_use_id": content[-1]["id"], "content": turn.nonce}
                history = [*history, message, answered]
                message = {"role": "user", "content": [result]}
                outcome, content = await self._ask(self._body(turn, [*history, message]), turn)
                if outcome.how != "answered":
                    self.record.outcomes.append(outcome)
                    return  # a history that ends with a call cannot be continued with a question
            self.record.outcomes.append(outcome)
            if outcome.how == "answered":
                history = [*history, message, {"role": "assistant", "content": content}]
            await asyncio.sleep(turn.pause)

    def _body(self, turn: TurnPlan, messages: list[dict[str, Any]]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": MODEL, "max_tokens": 1024, "stream": turn.streamed}
        if turn.kind == "tools":
            body["tools"] = [TOOL]
        if self.plan.name is not None:
            return body | {"session_id": self.plan.name, "messages": messages[-1:]}
        return body | {"messages": messages}

    async def _ask(self, body: dict[str, Any], turn: TurnPlan) -> tuple[Outcome, list[dict[str, Any]]]:
        """Ask one replica; when it was not reached or turns the request away, another one, as the SDKs do."""
        fleet, began = self.asker.fleet, time.monotonic()
        first = fleet.choose()
        answer = await self._once(first, body, turn)
        another = fleet.another(first) if answer.reply.again else None
        if another is not None:
            fleet.repeats += 1
            answer = await self._once(another, body, turn)
        reply = answer.reply
        outcome = Outcome(
            self.plan.number,
            turn.kind,
            self.plan.calm,
            turn.nonce,
            began,
            time.monotonic() - began,
            reply.how,
            reply.status,
            answer.text,
            reply.detail,
            answer.process,
            reply.request,
            reply.replica,
            1 if another is None else 2,
        )
        return outcome, answer.content

    async def _once(self, replica: Served, body: dict[str, Any], turn: TurnPlan) -> _Answer:
        began, asker, at = time.monotonic(), self.asker, replica.number
        headers = {"x-api-key": asker.key, "cw-turn-seconds": str(TURN_SECONDS)}
        status, process, request = 0, "", ""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                async with asker.http.post(f"{replica.url}/v1/messages", json=body, headers=headers) as response:
                    status, process = response.status, response.headers.get("cw-process", "")
                    request = response.headers.get("request-id", "")
                    if status != 200:
                        return _Answer(await refused(response, replica), "", process)
                    if body["stream"]:
                        how, text, detail = await _read_stream(response, hang_up=turn.kind == "hang up")
                        if how == "lost":
                            asker.fleet.lost(replica, began, f"{turn.nonce}: the stream ended before its message")
                        content = [{"type": "text", "text": text}]
                        return _Answer(Reply(how, status, None, detail, request, at), text, process, content)
                    answer = await response.json()
                    text = msgspec.json.encode(answer["content"]).decode()
                    how = "answered" if answer["stop_reason"] else "unclear"
                    return _Answer(Reply(how, status, None, "", request, at), text, process, answer["content"])
        except TimeoutError:
            reply = Reply("unclear", status, None, f"no answer within {ANSWER_SECONDS:g} s", request, at)
        except aiohttp.ContentTypeError:
            reply = Reply("unclear", status, None, "an answer that is no JSON", request, at)
        except (aiohttp.ClientError, ConnectionError) as error:
            name = type(error).__name__
            asker.fleet.lost(replica, began, f"{turn.nonce}: {name}")
            # A stream that has begun cannot be asked for again; what was not answered at all can.
            reply = Reply("lost", status, None, name, request, at, again=status == 0 or not body["stream"])
        except (ValueError, KeyError, TypeError) as error:
            reply = Reply("unclear", status, None, f"{type(error).__name__}: {error}", request, at)
        return _Answer(reply, "", process)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one replica said."""

    reply: Reply
    text: str
    process: str
    content: list[dict[str, Any]] = field(default_factory=list)


async def _read_stream(response: aiohttp.ClientResponse, *, hang_up: bool) -> tuple[str, str, str]:
    decoder, parts, how, detail = SSEDecoder(), list[str](), "lost", ""
    kinds: list[str] = []
    async for chunk in response.content.iter_any():
        for event in decoder.feed(chunk):
            kinds.append(str(event.event))
            if event.event == "content_block_delta":
                parts.append(msgspec.json.decode(event.data)["delta"].get("text", ""))
            elif event.event == "message_stop":
                how = "answered"
            elif event.event == "error":
                how, detail = "broken", str(msgspec.json.decode(event.data)["error"].get("code"))
        if hang_up and len(parts) > _HANG_UP_AFTER:
            response.close()
            return "hung up", "".join(parts), ""
    return how, "".join(parts), detail or f"the events of the answer: {' '.join(kinds[:_EVENTS_TOLD])}"
