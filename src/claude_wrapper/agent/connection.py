"""What can be said to one Claude process: `Agent` is a `Link` with the CLI's control calls and its conversation.

Everything here is late binding: the process runs already, without a tenant, when model, system prompt, permissions,
MCP servers and a conversation's past are given to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from claude_wrapper.agent.history import exchanges
from claude_wrapper.agent.lifecycle import Event
from claude_wrapper.agent.link import Link
from claude_wrapper.agent.settings import AgentSettings
from claude_wrapper.agent.subprocess import ProcessTransport
from claude_wrapper.agent.turns import Turn
from claude_wrapper.clock import Clock
from claude_wrapper.ids import Ids
from claude_wrapper.sandbox.port import Launch, Sandbox, SlotDirs
from claude_wrapper.wire.control import ControlRefused
from claude_wrapper.wire.streamjson import assistant_line, user_line


class Agent(Link):
    """ONE CLI process. Turns one at a time, in the order in which they were entered."""

    @classmethod
    async def start(
        cls, launch: Launch, *, sandbox: Sandbox, dirs: SlotDirs, clock: Clock, ids: Ids, settings: AgentSettings
    ) -> Self:
        """Spawn the process. Raises SpawnFailed. Must run on the event loop's own thread."""
        transport = await ProcessTransport.spawn(launch, sandbox=sandbox, dirs=dirs, clock=clock, settings=settings)
        return cls(transport, clock=clock, ids=ids, settings=settings)

    # Control calls ---------------------------------------------------------------------------------------------------

    async def call(self, subtype: str, *, timeout: float | None = None, **fields: Any) -> dict[str, Any]:
        """Any control request. Raises AgentTimeout, ControlRefused, AgentCrashed."""
        self._check_usable()
        return await self._controls.call(subtype, fields, timeout=timeout or self._settings.control_seconds)

    async def initialize(
        self,
        *,
        system_prompt: list[str] | None = None,
        append_system_prompt: str | None = None,
        hooks: dict[str, Any] | None = None,
        json_schema: dict[str, Any] | None = None,
        sdk_mcp_servers: Sequence[str] | None = None,
        agents: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Bind what the conversation begins with; before any turn. Returns the CLI's account of itself.

        The first turn fixes the system prompt: a later `initialize` is acknowledged and its prompt ignored.
        """
        fields: dict[str, Any] = {"hooks": hooks}
        optional = {
            "systemPrompt": system_prompt,
            "appendSystemPrompt": append_system_prompt,
            "jsonSchema": json_schema,
            "sdkMcpServers": None if sdk_mcp_servers is None else list(sdk_mcp_servers),
            "agents": agents,
        }
        fields.update({name: value for name, value in optional.items() if value is not None})
        response = await self.call("initialize", timeout=timeout, **fields)
        self._take(Event.READY)
        return response

    async def set_model(self, model: str) -> None:
        """For the turns from now on."""
        await self.call("set_model", model=model)

    async def set_permission_mode(self, mode: str) -> None:
        """`default`, `acceptEdits`, `plan`, `dontAsk`, `bypassPermissions`."""
        await self.call("set_permission_mode", mode=mode)

    async def set_max_thinking_tokens(self, tokens: int | None) -> None:
        """None takes the limit away."""
        await self.call("set_max_thinking_tokens", max_thinking_tokens=tokens)

    async def mcp_set_servers(self, servers: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the MCP servers. Returns which were added, removed and in error."""
        return await self.call("mcp_set_servers", servers=dict(servers))

    async def mcp_status(self) -> dict[str, Any]:
        """State of each MCP server."""
        return await self.call("mcp_status")

    async def apply_flag_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings such as `{"permissions": {"deny": [...]}}`, enforced at once."""
        return await self.call("apply_flag_settings", settings=dict(settings))

    async def seed_read_state(self, path: str, mtime_ms: int) -> None:
        """The conversation that it was told has seen this file as it is now, if it was not changed after `mtime_ms`."""
        await self.call("seed_read_state", path=path, mtime=mtime_ms)

    # The conversation ------------------------------------------------------------------------------------------------

    def turn(self, content: str | list[Any], *, uuid: str | None = None, as_written: bool = True) -> Turn:
        """One user message. `as_written=False` lets the CLI read it as typed: slash commands, `@file`, reminders."""
        uuid = uuid or self._ids.uuid()
        return Turn(self, self._record(uuid, user_line(content, uuid=uuid, as_written=as_written)))

    async def prime(self, uuid: str) -> None:
        """A throw-away turn, taken back: pays for the CLI's lazy start before somebody waits.

        The answer comes from whoever is behind the base URL (the broker's canned one). Fixes the system prompt.
        """
        async with self._exclusive():
            await self._exchange(user_line("hi", uuid=uuid), uuid)
            await self._rewind(uuid)

    async def rewind(self, uuid: str | None = None) -> None:
        """Take the conversation back to before the user line `uuid`, which was the caller's own.

        Without `uuid`: back to the start, for a new conversation. Nothing of the earlier one is sent upstream after
        that (measured by comparing request bodies: after several, interrupted, failed and injected turns, and after
        the tools in `TRACELESS_TOOLS`). Not taken back: model, permission mode, MCP servers, settings (the binder
        sets them) and files. About 2 ms.

        Raises ControlRefused when the CLI will not, or when a tool ran whose traces stay (`residue`); the process is
        then not fit for another conversation.
        """
        if uuid is None and self.residue:
            left = ", ".join(sorted(self.residue))
            raise ControlRefused(f"the process cannot be made as new: traces of these tools stay in it: {left}")
        async with self._exclusive():
            target = uuid or self._first_uuid
            if target is not None:
                await self._rewind(target)

    async def clear(self) -> None:
        """`/clear`: a new conversation and session id. Leaves three notes in it; `rewind` leaves nothing."""
        async with self._exclusive():
            uuid = self._ids.uuid()
            await self._exchange(user_line("/clear", uuid=uuid, as_written=False), uuid)
            self._first_uuid = self._last_uuid = None

    async def inject(self, messages: Sequence[Mapping[str, Any]], *, model: str) -> None:
        """Put a past into the conversation, in order, without asking the model.

        `messages` are those of the Messages API, from a user's to an assistant's. About 5 ms a pair. Raises
        InvalidRequest before anything is sent. `model` must be the conversation's: the CLI drops thinking blocks
        that another model wrote.
        """
        past = exchanges(messages)
        lines = []
        for pair in past:
            uuid = self._ids.uuid()
            lines.append((uuid, user_line(pair.user, uuid=uuid, should_query=False)))
            lines.append(("", assistant_line(pair.assistant, model=model, message_id=f"msg_{uuid.replace('-', '')}")))
        async with self._exclusive():
            for uuid, line in lines:
                if uuid:
                    await self._exchange(line, uuid)
                else:
                    await self._write(line)

    async def _rewind(self, target: str) -> None:
        fields: dict[str, Any] = {"target_message_uuid": target}
        if self._last_uuid is not None and self._last_uuid != target:
            fields["last_seen_user_message_uuid"] = self._last_uuid  # else the CLI refuses: "stale target"
        response = await self.call("rewind_conversation", **fields)
        self.said = None  # its line is still in the transcript, and does not count any more
        if response.get("rewound") is not True:
            raise ControlRefused(f"the Claude process did not rewind: {response.get('error') or response}")
        if target == self._first_uuid:
            self._first_uuid = self._last_uuid = None
        else:
            self._last_uuid = None
