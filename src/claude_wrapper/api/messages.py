"""`POST /v1/messages` and `/v1/messages/pooled`: an ordinary Messages API in front of warm agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from claude_wrapper.api import errors, sse
from claude_wrapper.api.bodies import read_body
from claude_wrapper.api.caching import cache_use
from claude_wrapper.api.credentials import HEADER as CREDENTIAL_HEADER
from claude_wrapper.api.deadlines import turn_seconds
from claude_wrapper.api.state import Deps, deps_of
from claude_wrapper.api.translate import Translated, owner_of, pooled_turn, turn_for
from claude_wrapper.broker.calls import CredentialKind
from claude_wrapper.errors import AuthenticationFailed, InvalidRequest, WrapperError
from claude_wrapper.limits import Admitted, Facts
from claude_wrapper.sessions.conversation import Conversation
from claude_wrapper.sessions.leg import Leg
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.wire import sse as wire_sse
from claude_wrapper.wire.messages import MessagesRequest, parse_messages_request

T = TypeVar("T")


async def create_message(request: Request) -> Response:
    """The Anthropic Messages API, JSON or server-sent events."""
    deps = deps_of(request)
    body = await read_body(request, deps.settings.max_body_bytes)
    return await deps.forwarder.answer(request, body, lambda: _create_message(request, deps, body))


async def _create_message(request: Request, deps: Deps, body: bytes) -> Response:
    parsed = parse_messages_request(body, max_tokens_required=False)
    translated = await _translate(request, deps, parsed)
    if parsed.max_tokens is None and translated.turn.credential.kind is CredentialKind.API_KEY:
        raise InvalidRequest("is required", field="max_tokens")  # with an OAuth token it cannot be given
    leg = await _submit(request, deps, parsed, translated)
    if not parsed.stream:
        message = await _unless_gone(request, leg, leg.message())
        return Response(msgspec.json.encode(message), media_type="application/json", headers=_headers(leg))
    frames = _merged(leg, errors.request_id_of(request))
    # An error before the first byte is an HTTP status, not an event.
    first = await _unless_gone(request, leg, anext(frames, b""))
    return sse.EventStream(_after(first, frames), headers=_headers(leg))


async def create_message_pooled(request: Request) -> Response:
    """The same engine, streaming the CLI's own events; the stream ends right after `result`, the process lives on."""
    deps = deps_of(request)
    body = await read_body(request, deps.settings.max_body_bytes)
    return await deps.forwarder.answer(request, body, lambda: _create_pooled(request, deps, body))


async def _create_pooled(request: Request, deps: Deps, body: bytes) -> Response:
    parsed = parse_messages_request(with_roles(body), max_tokens_required=False)
    translated = pooled_turn(await _translate(request, deps, parsed))
    leg = await _submit(request, deps, parsed, translated)
    frames = _raw(leg, errors.request_id_of(request))
    first = await _unless_gone(request, leg, anext(frames, b""))
    return sse.EventStream(_after(first, frames), headers=_headers(leg))


async def _translate(request: Request, deps: Deps, parsed: MessagesRequest) -> Translated:
    principal = await _principal(request, deps, parsed)
    named = request.headers.get(CREDENTIAL_HEADER)
    credential = await deps.credentials.choose(principal, parsed.oauth_credentials, named=named)
    api_version = request.headers.get("anthropic-version", "")
    thread = _thread(parsed, principal, deps)
    policy = await deps.security(principal.org)
    translated = turn_for(parsed, principal, credential, deps, policy, api_version=api_version)
    seconds = turn_seconds(request.headers, translated.turn.turn_seconds, streamed=bool(parsed.stream))
    use = cache_use(request.headers)
    translated = replace(translated, turn=replace(translated.turn, turn_seconds=seconds, cache=use))
    if thread is None:
        return translated
    return replace(translated, thread=thread, turn=replace(translated.turn, history=tuple(thread.messages)))


def _thread(parsed: MessagesRequest, principal: Principal, deps: Deps) -> Conversation | None:
    """The thread that the request continues, with what it was created with put back into the request."""
    thread = parsed.extra.get("thread")
    if thread is None:
        return None
    if not isinstance(thread, dict) or thread.get("type") not in {"create", "continue"}:
        raise InvalidRequest("must be create or continue", field="thread.type")
    if parsed.session_id is not None:
        raise InvalidRequest("cannot be given together with session_id", field="thread")
    if thread["type"] == "create":
        return None
    for name in ("system", "tools"):
        if getattr(parsed, name) is not None:
            raise InvalidRequest("is taken from the thread and must not be repeated", field=name)
    conversation = deps.conversations.thread(owner_of(principal), str(thread.get("previous_message_id")))
    parsed.system = conversation.thread_fields.get("system")
    parsed.tools = conversation.thread_fields.get("tools")
    return conversation


async def _principal(request: Request, deps: Deps, parsed: MessagesRequest) -> Principal:
    """An API key, or (only with ALLOW_OAUTH) the owner of the tokens in the body."""
    try:
        principal = await deps.authenticate(request)
    except AuthenticationFailed:
        if parsed.oauth_credentials is None or request.headers.get("authorization") or request.headers.get("x-api-key"):
            raise
        return deps.credentials.owner_of(parsed.oauth_credentials)
    principal.require("write:messages")
    return principal


async def _submit(request: Request, deps: Deps, parsed: MessagesRequest, translated: Translated) -> Leg:
    deps.refuse_when_draining()
    deps.refuse_while_shut(translated.turn.credential)
    if parsed.session_id is not None and translated.thread is None:
        await deps.sessions.doors.admit(translated.principal, translated.owner, parsed.session_id)
    admitted = deps.tenants.admission.admit(translated.principal, Facts(session=parsed.session_id))
    await admitted.__aenter__()
    request.scope["answer_headers"] = admitted.headers  # on every answer from here on, errors included
    try:
        leg = _begin(deps, parsed, translated)
    except BaseException:
        await admitted.__aexit__(None, None, None)
        raise
    deps.spawn(_hold(admitted, leg))
    return leg


async def _hold(admitted: Admitted, leg: Leg) -> None:
    """The request keeps its place among the concurrent turns until the conversation is finished with it."""
    try:
        await leg.done.wait()
    finally:
        await admitted.__aexit__(None, None, None)


def _begin(deps: Deps, parsed: MessagesRequest, translated: Translated) -> Leg:
    if translated.thread is not None:
        return deps.conversations.continue_thread(translated.thread, translated.turn)
    if parsed.extra.get("thread") is not None:
        fields = {"system": parsed.system, "tools": parsed.tools}
        return deps.conversations.create_thread(translated.owner, translated.turn, fields)[1]
    return deps.conversations.submit(translated.owner, translated.turn, name=parsed.session_id)[1]


async def _unless_gone(request: Request, leg: Leg, answer: Awaitable[T]) -> T:
    """The answer; or ClientDisconnect as soon as the client has gone, with the leg hung up."""
    answering = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(sse.disconnected(request.receive))
    try:
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    except BaseException:
        leg.hang_up()
        raise
    finally:
        gone.cancel()
        if not answering.done():
            answering.cancel()
            await asyncio.gather(answering, gone, return_exceptions=True)


async def _merged(leg: Leg, request_id: str) -> AsyncIterator[bytes]:
    """Messages events. An error after the first byte is an `error` event; before it, it is raised."""
    begun = False
    try:
        async for item in leg.items():
            events = [*item.events, *(event for more in leg.ready() for event in more.events)]
            if events:
                begun = True
                yield b"".join(events)
    except WrapperError as error:
        if not begun:
            raise
        yield wire_sse.encode("error", errors.body(error, request_id))
    finally:
        leg.hang_up()


async def _raw(leg: Leg, request_id: str) -> AsyncIterator[bytes]:
    """The CLI's own frames as events named after their type."""
    begun = False
    try:
        async for item in leg.items():
            begun = True
            yield b"".join(wire_sse.encode(one.frame.type, one.frame.raw) for one in (item, *leg.ready()))
    except WrapperError as error:
        if not begun:
            raise
        yield wire_sse.encode("error", errors.body(error, request_id))
    finally:
        leg.hang_up()


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        if first:
            yield first
        async for frame in rest:
            yield frame
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


def with_roles(body: bytes) -> bytes:
    """The original system's clients leave `role` out; what they send is the user's."""
    try:
        content = msgspec.json.decode(body)
        messages = content["messages"]
        bare = [message for message in messages if isinstance(message, dict) and "role" not in message]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
        return body  # the parser says what is wrong with it
    if not bare:
        return body
    for message in bare:
        message["role"] = "user"
    return msgspec.json.encode(content)


def _headers(leg: Leg) -> dict[str, str]:
    """Once the answer has begun."""
    started = leg.started.result()
    return {
        **leg.notes,
        "cw-session-id": started.session,
        "cw-turn-id": started.turn,
        "cw-process": started.kind,
        "cw-process-pid": str(started.pid),
    }
