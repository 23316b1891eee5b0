"""Token counts of one tenant, some of which never come: only the second, hedged request is answered."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from claude_wrapper.testing import answers
from claude_wrapper.testing.soak import plan
from claude_wrapper.testing.soak.asking import Asker
from claude_wrapper.testing.soak.messages import MODEL
from claude_wrapper.testing.soak.outcomes import Outcome
from claude_wrapper.testing.soak.record import Record
from claude_wrapper.testing.soak.served import Served

HEDGE_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 1.0
COUNTER: Final = "upstream_hedges_total"


@dataclass(eq=False)
class Reads:
    """Asks for token counts until the load is over; `hedges` is what the replicas say of their second requests."""

    asker: Asker
    operator: Asker
    record: Record
    seconds: float
    hedges: dict[tuple[int, int], float] = field(default_factory=dict)
    """By replica and its life: what its counter said last."""

    async def ask(self, seed: int) -> None:
        """One after the other."""
        for one in plan.reads(seed):
            if self.record.now >= self.seconds:
                return
            await self.asker.up.wait()
            began = time.monotonic()
            body = {"model": MODEL, "messages": [{"role": "user", "content": one.prompt}]}
            raw = msgspec.json.encode(body)
            headers = {"content-type": "application/json"}
            reply = await self.asker.ask("POST", "/v1/messages/count_tokens", data=raw, headers=headers)
            right = reply.ok and reply.body.get("input_tokens") == answers.prompt_usage(body, raw).prompt_tokens
            self.record.outcomes.append(
                Outcome(
                    plan.conversation_of(one.nonce),
                    one.kind,
                    False,
                    one.nonce,
                    began,
                    time.monotonic() - began,
                    reply.how,
                    reply.status,
                    one.nonce if right else str(reply.body),
                    reply.detail,
                    "no process",
                    reply.request,
                    reply.replica,
                    reply.attempts,
                )
            )
            await asyncio.sleep(one.pause)

    async def watch(self) -> None:
        """Look at the counters for ever: a replica that is killed takes its own along."""
        await asyncio.gather(*(self._watch(one) for one in self.operator.fleet.replicas))

    async def _watch(self, replica: Served) -> None:
        while True:
            await self.look(replica)
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self, replica: Served) -> None:
        """Ask a replica for its counter."""
        place = replica.number, replica.lives
        page = await self.operator.ask("GET", "/metrics", raw=True, at=replica)
        if page.ok:
            # More than before, or it is another life's page already.
            self.hedges[place] = max(self.hedges.get(place, 0.0), _counted(bytes(page.body).decode()))


def _counted(page: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(COUNTER))


def nonce_in(body: dict[str, Any]) -> str:
    """The nonce of the read that a request to the upstream belongs to; empty: none of ours."""
    try:
        text = str(body["messages"][0]["content"])
    except (KeyError, IndexError, TypeError):
        return ""
    return text.partition(" ")[0] if text.startswith("n") else ""
