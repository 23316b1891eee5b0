"""The grader: a model call of the server's own that judges what a session's agent made.

It is made with the credential and model of the session's turns, in a context of its own, and is limited, metered and
recorded as the session's calls are. It sees the last message of the agent and the text files among the session's
outputs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from claude_wrapper.broker.calls import Binding, CacheUse, Credential, TurnContext, UpstreamCall
from claude_wrapper.broker.owncalls import OwnAnswer, require_own_calls
from claude_wrapper.errors import InvalidRequest, NotFound, PermissionDenied, WrapperError
from claude_wrapper.ids import TURN
from claude_wrapper.sessions import outcomes, records, verdicts
from claude_wrapper.sessions.agentspec import Setup
from claude_wrapper.sessions.askers import acting
from claude_wrapper.sessions.content.acting import SCOPES
from claude_wrapper.sessions.journal import Books
from claude_wrapper.sessions.outcomes import Outcome, Result
from claude_wrapper.sessions.records import Session
from claude_wrapper.sessions.resources import files
from claude_wrapper.sessions.resources.files import File
from claude_wrapper.sessions.resources.means import ResourceMeans
from claude_wrapper.sessions.transcript import blocks_of
from claude_wrapper.sessions.verdicts import Made, Verdict
from claude_wrapper.storage.pagination import PageRequest
from claude_wrapper.tenancy.principal import Principal
from claude_wrapper.wire.managed import error_event, upstream_error
from claude_wrapper.wire.managed_input import MAX_RUBRIC

log = structlog.get_logger(__name__)

ASKS: Final = 2
"""How often the grader is asked for one verdict: an answer that holds none is asked for once more."""
MAX_OUTPUTS: Final = 100
_NO_VERDICT: Final = f"The grader was asked {ASKS} times and gave no verdict that could be read."


class Host(Protocol):
    """What the grader asks of the sessions that it judges."""

    async def credential(self, principal: Principal) -> Credential:
        """What the session's model requests are made with. Raises CredentialMissing."""
        ...

    async def setup(self, session: Session, credential: Credential) -> Setup:
        """The agent's set-up. Raises PermissionDenied."""
        ...


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of an evaluation."""

    verdict: Verdict
    calls: Sequence[UpstreamCall] = ()
    error: Mapping[str, Any] | None = None
    """Of a `session.error` event: the grader could not be asked. The verdict is `failed` then."""


class Grader:
    """One for all sessions of a server."""

    def __init__(
        self,
        books: Books,
        means: ResourceMeans,
        ask: Callable[[Binding, TurnContext, Mapping[str, Any]], Awaitable[OwnAnswer]],
        host: Host,
    ) -> None:
        """`ask` makes the call (`Broker.ask`)."""
        self._books = books
        self._means = means
        self._host = host
        self._ask = ask

    async def accept(
        self, principal: Principal, events: Sequence[Mapping[str, Any]], *, field: str
    ) -> list[dict[str, Any]]:
        """Client events, each definition of an outcome with its id and the text of its rubric.

        Raises InvalidRequest for a rubric that is no text, NotFound for a file that is not there, CredentialMissing,
        and PermissionDenied for a credential that a grader cannot be asked with. `field` is the list's name.
        """
        accepted = [dict(one) for one in events]
        for at, one in enumerate(accepted):
            if one["type"] != outcomes.DEFINED:
                continue
            try:
                require_own_calls(await self._host.credential(principal))
            except PermissionDenied as denied:
                raise PermissionDenied(f"{field}[{at}]: outcomes are {denied.message}") from denied
            one["outcome_id"] = self._books.ids.new("outc")
            one["max_iterations"] = one.get("max_iterations") or outcomes.DEFAULT_ITERATIONS
            if one["rubric"]["type"] == "file":
                content = await self._rubric(principal, str(one["rubric"]["file_id"]), f"{field}[{at}].rubric.file_id")
                one["rubric"] = {"type": "text", "content": content}
        return accepted

    async def grade(self, session: Session, asker: Principal, outcome: Outcome) -> Judgement:
        """Ask for a verdict; `asker` is whose turns these are. Fails with a verdict, not with an error."""
        calls: list[UpstreamCall] = []
        try:
            credential = await self._host.credential(asker)
            model = (await self._host.setup(session, credential)).model
            body = await self._question(session, outcome, model)
            owner = session.owner
            binding = Binding(
                owner.org, owner.workspace, owner.key_id, owner.user, session.id, credential, asker.allowed_models
            )
            turn = TurnContext(self._books.ids.new(TURN), model, cache=CacheUse.BYPASS)
            for _ in range(ASKS):
                answer = await self._ask(binding, turn, body)
                calls.append(answer.call)
                if answer.call.error_type is not None:
                    why = answer.call.error_message or answer.call.error_type
                    return _failed(why, upstream_error(answer.call.status, why), calls)
                if (verdict := verdicts.read(answer.body)) is not None:
                    return Judgement(verdict, calls)
        except WrapperError as error:
            return _failed(error.message, error_event("unknown_error", error.message), calls)
        except Exception:  # an evaluation that raises would be begun, and paid for, again and again
            log.exception("outcome.not_evaluated", session=session.id, outcome=outcome["outcome_id"])
            why = "an error of the server; its log has the details"
            return _failed(why, error_event("unknown_error", f"The grader could not be asked: {why}"), calls)
        return Judgement(Verdict(Result.FAILED.value, _NO_VERDICT), calls)

    async def _question(self, session: Session, outcome: Outcome, model: str) -> dict[str, Any]:
        principal = acting(session.owner)
        [event] = await self._books.log.read(principal, session.id, after=int(outcome["seq"]) - 1, limit=1)
        async with self._books.db.read() as tx:
            messages = await records.load_messages(tx, principal, session.id)
        last = next((one for one in reversed(messages) if one.role == "assistant"), None)
        said = blocks_of(last.content) if last is not None else []
        answer = "\n\n".join(str(block["text"]) for block in said if block.get("type") == "text")
        return verdicts.question(event.json(), answer, await self._made(session), model)

    async def _made(self, session: Session) -> list[Made]:
        """What the agent left in the session's outputs, the newest first."""
        principal = replace(acting(session.owner), scopes=SCOPES)

        async def read(tx: AsyncConnection) -> Sequence[File]:
            page = PageRequest(MAX_OUTPUTS)
            return (await files.list_files(tx, principal, self._books.clock, page, scope_id=session.id)).data

        found = await self._means.db.query(read)
        left, made = verdicts.MAX_FILES, []
        for one in found:
            text = await self._text(one, verdicts.MAX_FILE) if left > 0 else ""
            left -= min(len(text or ""), verdicts.MAX_FILE)
            made.append(Made(one.filename, one.size_bytes, text))
        return made

    async def _rubric(self, principal: Principal, file_id: str, field: str) -> str:
        async def read(tx: AsyncConnection) -> File:
            return await files.get_file(tx, principal, self._books.clock, file_id)

        try:
            text = await self._text(await self._means.db.query(read), MAX_RUBRIC + 1)
        except NotFound as missing:
            raise NotFound(f"{field}: {missing.message}", details=missing.details) from missing
        if text is None or not text.strip():
            raise InvalidRequest("must be a file of text (UTF-8) that is not empty", field=field)
        if len(text) > MAX_RUBRIC:
            raise InvalidRequest(f"a rubric has at most {MAX_RUBRIC} characters", field=field)
        return text

    async def _text(self, file: File, most: int) -> str | None:
        """The beginning of a file, a little more than `most` characters if it is longer; None: it is no text."""
        read = bytearray()
        async for piece in await files.open_file(self._means, file):
            read += piece
            if len(read) > 4 * most:  # a character has at most four bytes
                break
        if b"\x00" in read:
            return None
        whole = len(read) == file.size_bytes
        for cut in (0,) if whole else range(4):  # the last character may not be whole
            try:
                return read[: len(read) - cut].decode()
            except UnicodeDecodeError:
                continue
        return None


def _failed(why: str, error: Mapping[str, Any], calls: Sequence[UpstreamCall]) -> Judgement:
    return Judgement(Verdict(Result.FAILED.value, f"The grader could not be asked: {why}"), calls, error)
