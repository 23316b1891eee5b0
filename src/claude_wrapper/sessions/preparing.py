"""A process is made to hold a conversation: its past, and the model, tools and permissions of the turn.

Nothing is said twice: what the process was told already is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions.bridge import CLIENT_SERVER, Bridge
from claude_wrapper.sessions.concluding import upstream_error
from claude_wrapper.sessions.permissions import Permissions
from claude_wrapper.sessions.process import SlotProcess
from claude_wrapper.sessions.spec import Approve, Content, ConversationSpec, Message, TurnInput
from claude_wrapper.wire.control import ControlRefused

Controls = Callable[[str, dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]


async def initialize(process: SlotProcess, spec: ConversationSpec, content: Content | None) -> None:
    """The process's first words, unless it heard them as a spare: the caller's, and what lies in its workspace."""
    process.fingerprint = spec.fingerprint
    if process.initialized:
        return
    found = content.prompt if content is not None and process.workdir is not None else ""
    await process.agent.initialize(
        system_prompt=[block["text"] for block in spec.system if block.get("type") == "text"]
        if spec.system is not None
        else None,
        append_system_prompt="\n\n".join(part for part in (spec.append_system_prompt, found) if part) or None,
        json_schema=dict(spec.json_schema) if spec.json_schema else None,
    )
    process.initialized = True


async def give_past(process: SlotProcess, turn_input: TurnInput, seen: Iterable[tuple[str, int]] = ()) -> None:
    """Put the conversation's past into a process that does not hold it; `seen`: files that it has read (`Retelling`)."""
    past = past_of(turn_input)
    if past:
        process.half_told = True
        await process.agent.inject(_with_tool_prefix(past, turn_input.spec.client_tools), model=turn_input.model)
        for path, mtime_ms in seen:
            await process.agent.seed_read_state(path, mtime_ms)


def past_of(turn_input: TurnInput) -> Sequence[Message]:
    """What a process that does not hold the conversation is told."""
    return turn_input.history if turn_input.past is None else turn_input.past


async def set_up(process: SlotProcess, bridge: Bridge, turn_input: TurnInput) -> None:
    """This turn's model, permissions and tools. Raises InvalidRequest and UpstreamError for a model that is none."""
    spec = turn_input.spec
    if process.model != turn_input.model:
        await _set_model(process, turn_input.model)
    if process.permission_mode != spec.permission_mode:
        await process.agent.set_permission_mode(spec.permission_mode)
        process.permission_mode = spec.permission_mode
    if turn_input.max_thinking_tokens is not None:
        await process.agent.set_max_thinking_tokens(turn_input.max_thinking_tokens)
    if spec.asked_tools != process.asked_tools:
        await process.agent.apply_flag_settings({"permissions": {"ask": sorted(spec.asked_tools)}})
        process.asked_tools = spec.asked_tools
    servers, anew = await bridge.serve(spec.mcp_servers, spec.remote_servers, with_client_tools=bool(spec.client_tools))
    if anew:
        # The CLI keeps a connection whose description is the same.
        await process.agent.mcp_set_servers({name: one for name, one in servers.items() if name not in anew})
        process.mcp_servers = {}
    if servers != process.mcp_servers:
        answer = await process.agent.mcp_set_servers(servers)
        bridge.note_failures(answer.get("errors"))
        process.mcp_servers = servers


def announced(news: str, content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The caller's message, after what is new in the workspace."""
    said = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{"type": "text", "text": news}, *said]


def controls(permissions: Permissions, bridge: Bridge, approve: Approve | None) -> Controls:
    """Answers what the process asks while it works."""

    async def on_control(subtype: str, request: dict[str, Any]) -> dict[str, Any]:
        if subtype == "can_use_tool":
            decision = permissions.decide(request)
            return await approve(request) if approve is not None and decision["behavior"] == "allow" else decision
        if subtype == "mcp_message":
            return {"mcp_response": await bridge.handle(request["server_name"], request["message"])}
        return {}

    return on_control


async def _set_model(process: SlotProcess, model: str) -> None:
    """The CLI asks the upstream about a model that it does not know: its answer is the caller's."""
    try:
        await process.agent.set_model(model)
    except ControlRefused as refused:
        calls = await process.endpoint.end()
        raise upstream_error(calls) or InvalidRequest(refused.message, field="model") from refused
    process.model = model


def _with_tool_prefix(history: Sequence[Message], client_tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The caller's tools are known to the CLI as `mcp__client__NAME`, in its history too."""
    names = {str(tool["name"]) for tool in client_tools}
    prefixed: list[dict[str, Any]] = []
    for message in history:
        content = message.content
        if isinstance(content, list):
            content = [
                {**block, "name": f"mcp__{CLIENT_SERVER}__{block['name']}"}
                if block.get("type") == "tool_use" and block.get("name") in names
                else block
                for block in content
            ]
        prefixed.append({"role": message.role, "content": content})
    return prefixed
