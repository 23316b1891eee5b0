"""Conversations through `/v1/sessions`: an agent, its event stream, its tools, and a file."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field, replace
from typing import Any, Final

import aiohttp
import msgspec

from claude_wrapper.testing.soak import plan
from claude_wrapper.testing.soak.asking import ANSWER_SECONDS, Asker, Reply
from claude_wrapper.testing.soak.following import Follower
from claude_wrapper.testing.soak.messages import MODEL
from claude_wrapper.testing.soak.outcomes import ANSWER, Outcome
from claude_wrapper.testing.soak.plan import ConversationPlan, TurnPlan
from claude_wrapper.testing.soak.record import Record

_LOOK_SECONDS: Final = 3.0
"""So often a client that waits looks at its session: what a lost server left behind is taken up then."""
_CATCH_UP_SECONDS: Final = 60.0
_LOOK_TOOL: Final = {
    "type": "custom",
    "name": "look",
    "description": "Looks.",
    "input_schema": {"type": "object", "properties": {"what": {"type": "string"}}},
}
_SHELL_TOOLS: Final = {
    "type": "agent_toolset_20260401",
    "default_config": {"enabled": False},
    "configs": [{"name": "bash", "enabled": True, "permission_policy": {"type": "always_allow"}}],
}


@dataclass(frozen=True, slots=True)
class Agents:
    """What a tenant's sessions are made of: ids."""

    plain: str
    shell: str | None
    """None: this server gives agents no shell."""
    environment: str


async def make_agents(asker: Asker, *, shell: bool) -> Agents:
    """Raises RuntimeError when the server refuses."""

    async def make(path: str, body: dict[str, Any]) -> str:
        reply = await asker.insist("POST", path, json=body)
        if not reply.ok:
            raise RuntimeError(f"{path}: {reply}")
        return str(reply.body["id"])

    return Agents(
        await make("/v1/agents", {"name": "plain", "model": MODEL, "tools": [_LOOK_TOOL]}),
        await make("/v1/agents", {"name": "shell", "model": MODEL, "tools": [_SHELL_TOOLS]}) if shell else None,
        await make("/v1/environments", {"name": "soak", "config": {"type": "cloud"}}),
    )


@dataclass(slots=True)
class _Heard:
    """What the event stream says of one turn."""

    text: list[str] = field(default_factory=list)
    error: str = ""
    asked: list[str] = field(default_factory=list)
    """Calls that wait for the client."""
    running: bool = False
    over: bool = False


@dataclass(eq=False)
class ManagedConversation:
    """One of them."""

    asker: Asker
    agents: Agents
    plan: ConversationPlan
    record: Record
    until: float
    """Seconds since the start after which no turn begins."""

    async def hold(self) -> None:
        """All its turns; then what was streamed is compared with what is stored."""
        shell = self.plan.shell and self.agents.shell is not None
        body = {
            "agent": self.agents.shell if shell else self.agents.plain,
            "environment_id": self.agents.environment,
        }
        began = time.monotonic()
        made = await self.asker.ask("POST", "/v1/sessions", json=body)
        if not made.ok:
            self._note("create", "", began, made)
            return
        session = str(made.body["id"])
        file = await self._upload()
        follower = Follower(self.asker, session, self.record, self.plan.stream_cuts)
        finished = False
        try:
            for turn in self.plan.turns:
                if self.record.now >= self.until or not await self._turn(session, follower, turn):
                    break
                await asyncio.sleep(turn.pause)
            archived = await self.asker.insist("POST", f"/v1/sessions/{session}/archive", json={})
            finished = archived.ok
        finally:
            caught_up = await self._caught_up(session, follower) if finished else True
            await follower.close()
            self.record.followed.append(follower.followed(to_the_end=finished and caught_up, caught_up=caught_up))
            self.record.said.update(nonce for nonce in map(_answers, follower.events) if nonce)
            for one in follower.unclear:
                self._note("stream", "", began, Reply("unclear", detail=one, request=session))
        if file is not None:
            await self._read_back(*file)

    # One turn ---------------------------------------------------------------------------------------------------------

    async def _turn(self, session: str, follower: Follower, turn: TurnPlan) -> bool:
        """False when nothing more can be said in this session."""
        await self.asker.up.wait()
        began, mark = time.monotonic(), len(follower.events)
        prompt = turn.prompt
        message = {"type": "user.message", "content": [{"type": "text", "text": prompt}]}
        if not (reply := await self._say(session, message, turn.nonce)).ok:
            self._note(turn.kind, turn.nonce, began, reply)
            return True
        heard = await self._listen(session, follower, turn, mark)
        text = " ".join(heard.text)
        if heard.error:
            how, detail = "broken", heard.error
        elif not heard.over:
            how, detail = "unclear", await self._why(session, follower.events[mark:])
        elif turn.kind == "hang up":
            how, detail = "hung up", ""
        else:
            kinds = " ".join(str(event["type"]) for event in follower.events[mark:])
            how, detail = "answered", "" if turn.nonce in text else f"the events of the turn: {kinds}"
        self._note(turn.kind, turn.nonce, began, replace(reply, how=how, detail=detail, request=session), text)
        return heard.over

    async def _say(self, session: str, message: dict[str, Any], nonce: str) -> Reply:
        """Send a message; once more through another replica when the first did not take it."""
        path, body = f"/v1/sessions/{session}/events", {"events": [message]}
        reply = await self.asker.ask("POST", path, json=body, repeat=False)
        if reply.ok or await self._taken(session, nonce, reply):
            return replace(reply, how="answered")
        if not reply.again or len(self.asker.fleet.replicas) == 1:
            return reply
        self.asker.fleet.repeats += 1
        reply = replace(await self.asker.ask("POST", path, json=body, repeat=False), attempts=2)
        taken = reply.ok or await self._taken(session, nonce, reply)
        return replace(reply, how="answered") if taken else reply

    async def _taken(self, session: str, nonce: str, reply: Reply) -> bool:
        """A message whose answer was lost, or that failed late, may be in the log all the same: look there."""
        if reply.how == "refused" and reply.status < 500:
            return False
        found = await self.asker.insist("GET", f"/v1/sessions/{session}/events?order=desc&limit=50")
        return found.ok and nonce in msgspec.json.encode(found.body["data"]).decode()

    async def _listen(self, session: str, follower: Follower, turn: TurnPlan, mark: int) -> _Heard:
        """Follow the turn to its end, answering what it asks."""
        answered: set[str] = set()
        interrupted = False
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            heard = _heard(follower.events[mark:], turn.nonce)
            if heard.over:
                return heard
            if turn.kind == "hang up" and heard.running and not interrupted:
                interrupted = True
                await self._send(session, {"type": "user.interrupt"})
            for call in heard.asked:
                if call not in answered:
                    content = [{"type": "text", "text": turn.nonce}]
                    event = {"type": "user.custom_tool_result", "custom_tool_use_id": call, "content": content}
                    if await self._send(session, event):
                        answered.add(call)
            await follower.changed(_LOOK_SECONDS)
            if time.monotonic() > deadline - ANSWER_SECONDS + _LOOK_SECONDS:
                await self.asker.up.wait()
                await self.asker.ask("GET", f"/v1/sessions/{session}")
        return _heard(follower.events[mark:], turn.nonce)

    async def _why(self, session: str, heard: list[dict[str, Any]]) -> str:
        """What is known of a session that came to no end."""
        shown = await self.asker.ask("GET", f"/v1/sessions/{session}")
        status = shown.body.get("status") if shown.ok else shown.detail
        kinds = " ".join(str(event["type"]) for event in heard[-6:])
        return f"no end within {ANSWER_SECONDS:g} s; the session is {status}; last events: {kinds or 'none'}"

    async def _send(self, session: str, event: dict[str, Any]) -> bool:
        """Whether it has been taken; 409 says that it was taken before."""
        await self.asker.up.wait()
        reply = await self.asker.ask("POST", f"/v1/sessions/{session}/events", json={"events": [event]})
        return reply.ok or reply.status == 409

    async def _caught_up(self, session: str, follower: Follower) -> bool:
        """The newest event of the log has come over the stream."""
        deadline = time.monotonic() + _CATCH_UP_SECONDS
        while time.monotonic() < deadline:
            newest = await self.asker.insist("GET", f"/v1/sessions/{session}/events?order=desc&limit=1")
            if newest.ok and newest.body["data"]:
                wanted = str(newest.body["data"][0]["id"])
                if any(seen == wanted for _, seen in reversed(follower.seen)):
                    return True
            await follower.changed(1.0)
        return False

    # Files ------------------------------------------------------------------------------------------------------------

    async def _upload(self) -> tuple[str, bytes] | None:
        if not self.plan.file_bytes:
            return None
        content = random.Random(self.plan.number).randbytes(self.plan.file_bytes)  # noqa: S311 - no secret
        form = aiohttp.FormData()
        form.add_field("file", content, filename="soak.bin", content_type="application/octet-stream")
        began = time.monotonic()
        reply = await self.asker.ask("POST", "/v1/files", data=form)
        self._note("file", f"n{self.plan.number:05d}x99x000000", began, reply, f"n{self.plan.number:05d}x99x000000")
        if not reply.ok:
            return None
        self.record.files += 1
        return str(reply.body["id"]), content

    async def _read_back(self, file: str, content: bytes) -> None:
        found = await self.asker.insist("GET", f"/v1/files/{file}/content", raw=True)
        if not found.ok or found.body != content:
            self.record.files_lost.append(f"{file}: {found}")
        gone = await self.asker.insist("DELETE", f"/v1/files/{file}")
        if not gone.ok:
            self.record.files_lost.append(f"{file} was not deleted: {gone}")

    # Notes ------------------------------------------------------------------------------------------------------------

    def _note(self, kind: str, nonce: str, began: float, reply: Reply, text: str = "") -> None:
        self.record.outcomes.append(
            Outcome(
                self.plan.number,
                kind,
                self.plan.calm,
                nonce,
                began,
                time.monotonic() - began,
                reply.how,
                reply.status,
                text,
                reply.detail,
                plan.SESSIONS,
                reply.request,
                reply.replica,
                reply.attempts,
            )
        )


def _answers(event: dict[str, Any]) -> str:
    """The nonce of the turn that this event answers; empty: it answers none."""
    if event["type"] != "agent.message":
        return ""
    found = ANSWER.match("".join(str(block.get("text", "")) for block in event["content"]))
    return found[1] if found else ""


def _heard(events: list[dict[str, Any]], nonce: str) -> _Heard:
    """Read the events since a message was sent: those from the message itself on are its turn."""
    heard, begun = _Heard(), False
    for event in events:
        kind = event["type"]
        if kind == "user.message":
            begun = begun or nonce in str(event["content"])
            continue
        if not begun:
            continue
        match kind:
            case "agent.message":
                heard.text += [str(block.get("text", "")) for block in event["content"]]
            case "session.status_running":
                heard.running = True
            case "session.error":
                error = event["error"]
                heard.error = str(error.get("type"))
            case "session.status_idle" | "session.status_terminated":
                reason = event.get("stop_reason") or {}
                if reason.get("type") == "requires_action":
                    heard.asked = [str(one) for one in reason["event_ids"]]
                else:
                    heard.over = True
                    return heard
    return heard
