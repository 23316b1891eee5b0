"""How a turn's end is judged, and how a process is brought to where its caller believes it to be."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from claude_wrapper.broker.calls import STREAM_CUT, UpstreamCall
from claude_wrapper.errors import UpstreamError, WrapperError
from claude_wrapper.sessions.process import SlotProcess
from claude_wrapper.sessions.spec import Message
from claude_wrapper.wire.merge import MessageMerger

log = structlog.get_logger(__name__)


async def undo(process: SlotProcess, line: str, session: str) -> bool:
    """Take a failed or abandoned turn out of the process's context. False when that is not possible."""
    if not process.alive:
        return False
    try:
        await process.agent.rewind(line)
    except WrapperError as error:
        log.info("turn.not_rewound", session=session, cause=str(error))
        return False
    return True


async def retell(process: SlotProcess, said: Sequence[Message], model: str, session: str) -> bool:
    """Put a turn back as its caller saw it: the CLI had gone on where the message ended."""
    try:
        await process.agent.inject([{"role": one.role, "content": one.content} for one in said], model=model)
    except WrapperError as failed:
        log.info("turn.not_retold", session=session, cause=failed.message)
        return False
    return True


def upstream_error(calls: Sequence[UpstreamCall]) -> UpstreamError | None:
    """The last call that failed, as the broker saw it."""
    for call in reversed(calls):
        if call.error_type == STREAM_CUT:
            return UpstreamError(call.error_message, status=502, upstream_request_id=call.upstream_request_id)
        if call.status >= 400:
            return UpstreamError(
                call.error_message,
                status=call.status,
                error_type=call.error_type or "api_error",
                upstream_request_id=call.upstream_request_id,
                retry_after=call.retry_after,
            )
    return None


def failure(merger: MessageMerger, calls: Sequence[UpstreamCall]) -> WrapperError | None:
    """What really went wrong: the broker saw the true status, the CLI only reports its own reading of it."""
    failed = merger.failure
    if failed is None:
        return None
    return upstream_error(calls) or UpstreamError(failed.message, status=failed.status, error_type=failed.type)
