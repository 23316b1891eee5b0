"""Conversations through `/v1/messages`: stateless ones and named ones."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec

from claude_wrapper.testing.soak.asking import ANSWER_SECONDS, Asker, refusal
from claude_wrapper.testing.soak.outcomes import Outcome
from claude_wrapper.testing.soak.plan import ConversationPlan, TurnPlan
from claude_wrapper.testing.soak.record import Record
from claude_wrapper.wire.sse import SSEDecoder

MODEL: Final = "claude-sonnet-5-5"
TURN_SECONDS: Final = 45
TOOL: Final = {"name": "look", "description": "Looks.", "input_schema": {"type": "object"}}
_HANG_UP_AFTER: Final = 10


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
        began = time.monotonic()
        how, status, text, detail, process, request = "unclear", 0, "", "", "", ""
        content: list[dict[str, Any]] = []
        asker = self.asker
        headers = {"x-api-key": asker.key, "cw-turn-seconds": str(TURN_SECONDS)}
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                async with asker.http.post(f"{asker.base}/v1/messages", json=body, headers=headers) as response:
                    status, process = response.status, response.headers.get("cw-process", "")
                    request = response.headers.get("request-id", "")
                    if status != 200:
                        reply = refusal(status, await response.json(), request)
                        how, detail = reply.how, reply.detail
                    elif body["stream"]:
                        how, text, detail = await _read_stream(response, hang_up=turn.kind == "hang up")
                        content = [{"type": "text", "text": text}]
                    else:
                        answer = await response.json()
                        content = answer["content"]
                        text = msgspec.json.encode(content).decode()
                        how = "answered" if answer["stop_reason"] else "unclear"
        except TimeoutError:
            detail = f"no answer within {ANSWER_SECONDS:g} s"
        except (aiohttp.ClientError, ConnectionError) as error:
            how, detail = "lost", type(error).__name__
        except (ValueError, KeyError, TypeError) as error:
            detail = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - began
        number, calm = self.plan.number, self.plan.calm
        outcome = Outcome(
            number, turn.kind, calm, turn.nonce, began, seconds, how, status, text, detail, process, request
        )
        return outcome, content


async def _read_stream(response: aiohttp.ClientResponse, *, hang_up: bool) -> tuple[str, str, str]:
    decoder, parts, how, detail = SSEDecoder(), list[str](), "lost", ""
    async for chunk in response.content.iter_any():
        for event in decoder.feed(chunk):
            if event.event == "content_block_delta":
                parts.append(msgspec.json.decode(event.data)["delta"].get("text", ""))
            elif event.event == "message_stop":
                how = "answered"
            elif event.event == "error":
                how, detail = "broken", str(msgspec.json.decode(event.data)["error"].get("code"))
        if hang_up and len(parts) > _HANG_UP_AFTER:
            response.close()
            return "hung up", "".join(parts), ""
    return how, "".join(parts), detail
