"""Connections of conversations to remote MCP servers: credential, tools as configured, results kept where that is asked.

The credential of a session's vaults is looked up here and put in by the broker's client, outside of the sandbox: neither
the process nor an event nor a log sees it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec
import structlog

from claude_wrapper.broker.bridge import McpBridge, McpFailed, Outcome, error_response
from claude_wrapper.broker.mcp import FixedHeaders, McpCredential, McpServer, as_mapping
from claude_wrapper.errors import WrapperError
from claude_wrapper.sessions.mcpservers import MAX_TOOLS, Offered, RemoteSpec, offered
from claude_wrapper.sessions.resources.mcptokens import StoredMcpCredential
from claude_wrapper.sessions.resources.toolauth import plain_url
from claude_wrapper.sessions.resources.vaults import READ as READ_VAULTS
from claude_wrapper.sessions.resources.vaults import WRITE as WRITE_VAULTS
from claude_wrapper.sessions.spec import Owner
from claude_wrapper.storage.cache import Computed, cache_key
from claude_wrapper.storage.cache import Outcome as CacheOutcome
from claude_wrapper.tenancy.principal import ActorKind, Principal
from claude_wrapper.tenancy.scopes import Role
from claude_wrapper.vault.sealedcache import SealedCache

log = structlog.get_logger(__name__)

MAX_PAGES: Final = 16
_REUSED: Final = frozenset({CacheOutcome.HIT, CacheOutcome.JOINED, CacheOutcome.SHARED})
_MAX_WORDS: Final = 4_096
_NAME: Final = 128

OpenBridge = Callable[[McpServer], McpBridge]


class Vaults(Protocol):
    """Where credentials come from (`McpTokens`)."""

    async def credential_for(
        self, principal: Principal, vault_ids: tuple[str, ...], url: str
    ) -> StoredMcpCredential | None:
        """The credential of the first vault that has one for this server."""
        ...


class Seen(Protocol):
    """Who remembers how servers were found."""

    async def connected(self, owner: Owner, spec: RemoteSpec, facts: Mapping[str, Any]) -> None:
        """A server gave its tools: `{protocol, server, tools, dropped}`."""
        ...

    async def failed(self, owner: Owner, spec: RemoteSpec, outcome: Outcome, problem: str) -> None:
        """A server cannot be used."""
        ...


class NobodyLooks:
    """A `Seen` that forgets."""

    async def connected(self, owner: Owner, spec: RemoteSpec, facts: Mapping[str, Any]) -> None:
        return None

    async def failed(self, owner: Owner, spec: RemoteSpec, outcome: Outcome, problem: str) -> None:
        return None


class RemoteServers:
    """Connects conversations to their servers."""

    def __init__(
        self, open_bridge: OpenBridge, vaults: Vaults, seen: Seen | None = None, cache: SealedCache | None = None
    ) -> None:
        """`cache` keeps results of tools whose configuration asks for it; None: they are always asked for."""
        self._open_bridge = open_bridge
        self._vaults = vaults
        self._seen = seen or NobodyLooks()
        self._cache = cache

    async def connect(self, owner: Owner, spec: RemoteSpec) -> Remote:
        """A connection that has not been used yet. Raises McpFailed when it may not be, or the credential cannot be had."""
        if spec.barred:
            raise McpFailed(Outcome.FORBIDDEN, "its host is not one of the environment's allowed_hosts")
        credential: McpCredential | None = FixedHeaders(spec.headers) if spec.headers else None
        identity = repr(sorted(spec.headers.items())) if spec.headers else ""
        if spec.vault_ids:
            try:
                found = await self._vaults.credential_for(acting(owner), spec.vault_ids, spec.url)
            except WrapperError as error:
                raise McpFailed(Outcome.UNREACHABLE, f"its credential cannot be read: {error.message}") from error
            if found is not None:
                credential, identity = found, found.identity
        server = McpServer(name=spec.name, url=spec.url, credential=credential, legacy=spec.legacy)
        kept = None
        if self._cache is not None:
            kept = Kept(self._cache, owner.org, spec, identity, share=credential is None)
        return Remote(self._open_bridge(server), spec, owner, self._seen, kept, has_credential=credential is not None)


class Remote:
    """A conversation's connection to one server, as the CLI sees it: tools only, and only those that are offered."""

    def __init__(
        self,
        bridge: McpBridge,
        spec: RemoteSpec,
        owner: Owner,
        seen: Seen,
        kept: Kept | None = None,
        *,
        has_credential: bool = False,
    ) -> None:
        self.spec = spec
        self.has_credential = has_credential
        self._bridge = bridge
        self._owner = owner
        self._seen = seen
        self._kept = kept
        self._server: dict[str, str] = {}
        self._has_tools = False

    async def exchange(
        self, message: Mapping[str, Any], *, reused: Callable[[], None] = lambda: None
    ) -> dict[str, Any] | None:
        """The answer to a message of the CLI; None for a notification. Raises McpFailed. `reused` is called when the
        answer was given before, to whomever."""
        method = message.get("method")
        if method == "tools/call":
            return await self._call(message, reused)
        if method in {"initialize", "tools/list"}:
            try:
                return await (self._initialize(message) if method == "initialize" else self._list(message))
            except McpFailed as failed:
                await self._seen.failed(self._owner, self.spec, failed.outcome, failed.problem)
                raise
        if "id" in message and method != "ping":
            return error_response(message, f"{method} is not offered here: tools only", -32601)
        return await self._bridge.exchange(message)

    async def close(self) -> None:
        """End the server's session."""
        await self._bridge.close()

    async def _initialize(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        answer = await self._bridge.exchange(message)
        if answer is None or "result" not in answer:
            raise McpFailed(Outcome.PROTOCOL, _refusal(answer))
        result = as_mapping(answer["result"])
        info = as_mapping(result.get("serverInfo"))
        self._server = {part: _words(info.get(part), _NAME) for part in ("name", "version")}
        self._has_tools = "tools" in as_mapping(result.get("capabilities"))
        shown: dict[str, Any] = {
            "protocolVersion": self._bridge.protocol or as_mapping(message.get("params")).get("protocolVersion"),
            "capabilities": {"tools": {"listChanged": False}},
            "serverInfo": self._server,
        }
        if words := _words(result.get("instructions"), _MAX_WORDS):
            shown["instructions"] = words
        return {"jsonrpc": "2.0", "id": message.get("id", 0), "result": shown}

    async def _list(self, message: Mapping[str, Any]) -> dict[str, Any]:
        found = await self.tools() if self._has_tools else Offered((), {})
        if found.dropped:
            log.warning("mcp.tools_left_out", server=self.spec.name, org=self._owner.org, **found.dropped)
        facts = {
            "protocol": self._bridge.protocol,
            "server": self._server,
            "tools": [tool["name"] for tool in found.tools],
            "dropped": dict(found.dropped),
        }
        await self._seen.connected(self._owner, self.spec, facts)
        return {"jsonrpc": "2.0", "id": message.get("id", 0), "result": {"tools": list(found.tools)}}

    async def tools(self) -> Offered:
        """All pages of the server's list, sifted. Raises McpFailed."""
        raw: list[Any] = []
        cursor: str | None = None
        for page in range(MAX_PAGES):
            ask: dict[str, Any] = {"jsonrpc": "2.0", "id": f"tools-{page}", "method": "tools/list"}
            if cursor is not None:
                ask["params"] = {"cursor": cursor}
            answer = await self._bridge.exchange(ask)
            if answer is None or "result" not in answer:
                raise McpFailed(Outcome.PROTOCOL, _refusal(answer))
            result = as_mapping(answer["result"])
            listed, cursor = result.get("tools"), result.get("nextCursor")
            raw += listed if isinstance(listed, list) else []
            if not isinstance(cursor, str) or len(raw) > 4 * MAX_TOOLS:
                break
        return offered(raw, self.spec.rules)

    async def _call(self, message: Mapping[str, Any], reused: Callable[[], None]) -> dict[str, Any] | None:
        params = as_mapping(message.get("params"))
        tool = str(params.get("name"))
        if not self.spec.rules.allows(tool):
            return error_response(message, f"the tool {tool[:_NAME]} of {self.spec.name} is not enabled", -32602)
        # What the CLI adds for us (`_meta`) is not the server's business.
        asked = {name: value for name, value in params.items() if name != "_meta"}
        seconds = self.spec.rules.kept_seconds.get(tool)
        if self._kept is None or not seconds or "id" not in message:
            return await self._forward({**message, "params": asked})
        found = await self._kept.or_ask(asked, seconds, lambda: self._forward({**message, "params": asked}))
        if found.reused:
            reused()
        return {"jsonrpc": "2.0", "id": message["id"], **found.body}

    async def _forward(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        answer = await self._bridge.exchange(message)
        if answer is not None and not isinstance(answer.get("result", {}), Mapping):
            raise McpFailed(Outcome.PROTOCOL, "gave a result that is no object")
        return answer


@dataclass(frozen=True, slots=True)
class Reusable:
    """A call's answer: `result` or `error`, and whether the server was spared."""

    body: Mapping[str, Any]
    reused: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """Kept results of one server, as its organisation sees it with one credential: what one credential may see is not
    shown under another, and nothing that any credential saw is shared with another organisation."""

    cache: SealedCache
    org: str
    spec: RemoteSpec
    identity: str = field(repr=False)
    share: bool
    """No credential was used: anybody who reaches the server sees the same."""

    async def or_ask(
        self, asked: Mapping[str, Any], seconds: float, ask: Callable[[], Awaitable[Mapping[str, Any] | None]]
    ) -> Reusable:
        """The kept answer to this call, or the server's, which is kept if it is no error. Raises McpFailed."""

        async def compute() -> Computed:
            answer = await ask() or {}
            body = {part: answer[part] for part in ("result", "error") if part in answer}
            good = "result" in body and not body["result"].get("isError")
            return Computed(msgspec.json.encode(body), keep=good)

        key = cache_key(
            "mcp", plain_url(self.spec.url), self.identity, msgspec.json.encode(asked, order="deterministic")
        )
        found = await self.cache.get_or_compute(self.org, key, seconds, compute, share=self.share)
        return Reusable(msgspec.json.decode(found.value), found.outcome in _REUSED)


def acting(owner: Owner) -> Principal:
    """The server, using the vaults of a session that its owner was allowed to use when it was made."""
    kind = ActorKind.API_KEY if owner.key_id else ActorKind.USER
    scopes = frozenset({READ_VAULTS, WRITE_VAULTS})  # a refreshed token is written back
    return Principal(owner.org, owner.workspace, kind, owner.key_id, owner.user, Role.VIEWER, scopes)


def _refusal(answer: Mapping[str, Any] | None) -> str:
    error = as_mapping((answer or {}).get("error"))
    return f"refuses: {_words(error.get('message'), 200) or 'no reason given'}"


def _words(value: Any, most: int) -> str:
    return value[:most].replace("\x00", "") if isinstance(value, str) else ""
