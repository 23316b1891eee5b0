"""Messages requests that the server itself makes for a session: no process is involved, everything else is the same.

They pass the gate, the retries, the breaker and the stand-ins of the session's credential, and are recorded as the
session's calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from claude_wrapper.broker import bodies
from claude_wrapper.broker.asking import Order
from claude_wrapper.broker.calls import Binding, Credential, CredentialKind, TurnContext, UpstreamCall
from claude_wrapper.broker.exchange import Exchange
from claude_wrapper.broker.means import Means
from claude_wrapper.broker.policy import Kind, Route
from claude_wrapper.broker.refusals import Refused
from claude_wrapper.errors import PermissionDenied

_ROUTE: Final = Route(Kind.MESSAGES, "/v1/messages")
_HEADERS: Final = [
    ("content-type", "application/json"),
    ("accept", "application/json"),
    ("anthropic-version", "2023-06-01"),
]


@dataclass(frozen=True, slots=True)
class OwnAnswer:
    """What came of a call."""

    call: UpstreamCall
    """`error_type` is None when it was answered."""
    body: bytes = field(repr=False)
    """The Message, or the error as the Messages API has it."""


def require_own_calls(credential: Credential) -> None:
    """Raises PermissionDenied for an OAuth credential: nothing but what the CLI wrote is sent with it."""
    if credential.kind is CredentialKind.OAUTH:
        raise PermissionDenied(
            "not possible with an OAuth credential, which is used for requests of the CLI alone; store an API key"
        )


async def ask(means: Means, binding: Binding, turn: TurnContext, body: Mapping[str, Any]) -> OwnAnswer:
    """One request without `stream`. Raises PermissionDenied for an OAuth credential.

    Whatever else goes wrong is told in the answer's `call`. Cancelling it cuts the call, which is recorded all the same.
    """
    require_own_calls(binding.credential)
    asked = bodies.read(msgspec.json.encode(body))
    order = Order(
        binding,
        turn,
        _ROUTE,
        "POST",
        asked.model,
        bodies.estimate(asked, means.settings.estimate_output_tokens),
        main=True,
        headers=list(_HEADERS),
        body=asked.raw,
    )
    answer = _Gathered()
    exchange = Exchange(means, order, ended=lambda _exchange, _call: None, booked=lambda _exchange: None)
    try:
        await exchange.run(answer)
    except Refused as refused:
        answer.body = bytearray(refused.refusal.body())
    if exchange.call is None:
        raise AssertionError("a call that has run has come to something")
    return OwnAnswer(exchange.call, bytes(answer.body))


class _Gathered:
    """Takes an answer instead of a process."""

    congested = False

    def __init__(self) -> None:
        self.body = bytearray()

    def start(self, status: int, headers: Iterable[tuple[str, str]], *, length: int | None = None) -> None:
        """The status is in the call."""

    def feed(self, data: bytes) -> None:
        self.body += data

    async def drain(self) -> None:
        """It is never congested."""

    def finish(self) -> None:
        """The body is complete."""

    def whole(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        self.body += body

    def cut(self) -> None:
        """The call says so."""
