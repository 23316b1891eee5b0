"""The CLIs of one server: where they are, which versions they say they are, and the spares that wait of each."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from claude_wrapper.agent.launch import CHAT, LaunchProfile, locate_cli
from claude_wrapper.app.keeping import version_of
from claude_wrapper.clock import Clock
from claude_wrapper.config import Settings
from claude_wrapper.pool.pool import Pool
from claude_wrapper.sessions.canary import CANARY, Rules, State
from claude_wrapper.sessions.spec import Owner
from claude_wrapper.sessions.versions import Versions, VersionWatch
from claude_wrapper.storage.state import SharedState
from claude_wrapper.telemetry.metrics import Metrics
from claude_wrapper.tenancy.policybook import PolicyBook
from claude_wrapper.tenancy.principal import ActorKind, Principal
from claude_wrapper.tenancy.scopes import Role

_VERSION: Final = re.compile(r"\d+(?:\.\d+)+[0-9A-Za-z.+-]*")
UNKNOWN: Final = "unknown"


@dataclass(frozen=True, slots=True)
class Clis:
    """The binaries."""

    main: Path
    canary: Path | None

    @classmethod
    def of(cls, settings: Settings) -> Clis:
        """Raises ConfigurationError for one that is not there."""
        main = locate_cli(str(settings.cli) if settings.cli else None)
        return cls(main, locate_cli(str(settings.canary_cli)) if settings.canary_cli else None)


def number_of(said: str) -> str:
    """The version's number in what `claude --version` said; `unknown` if there is none."""
    found = _VERSION.search(said)
    return found[0] if found else UNKNOWN


class CountedVersions(VersionWatch):
    """Turns by version, and what became of the canary, as metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def turn(self, version: str, *, failed: bool) -> None:
        self._metrics.cli_turns.inc(version=version, outcome="error" if failed else "ok")

    def state(self, state: State) -> None:
        self._metrics.cli_canary.replace("state", {state.value: 1.0})


async def versions_of(
    settings: Settings, clock: Clock, *, policies: PolicyBook, state: SharedState, metrics: Metrics
) -> tuple[Clis, Versions]:
    """The binaries and the versions, with the canary running if there is one. Raises ConfigurationError."""
    clis = Clis.of(settings)
    watch = CountedVersions(metrics)
    canary = None if clis.canary is None else number_of(await asyncio.to_thread(version_of(clis.canary)))
    if canary is not None:
        watch.state(State.RUNNING)

    async def main() -> str:
        return number_of(await asyncio.to_thread(version_of(clis.main)))

    async def pinned(owner: Owner) -> str | None:
        kind = ActorKind.API_KEY if owner.key_id else ActorKind.USER
        asks = Principal(owner.org, owner.workspace, kind, owner.key_id, owner.user, Role.VIEWER, frozenset())
        return (await policies.of(asks)).cli_version

    rules = Rules(
        share=settings.canary_share,
        min_turns=settings.canary_min_turns,
        window_seconds=settings.canary_window_seconds,
        worse_errors=settings.canary_worse_errors,
        slower=settings.canary_slower,
    )
    return clis, Versions(main, canary, rules, clock, pinned=pinned, values=state, watch=watch)


def move_spares(pool: Pool[Any], versions: Versions) -> None:
    """Keep the spares of the version that new conversations get; one of the canary while it is tried."""
    base: Mapping[LaunchProfile, int] = pool.settings.spares

    def move(state: State) -> None:
        if state is State.PROMOTED:
            spares = {replace(profile, cli=CANARY): count for profile, count in base.items()}
        elif state is State.RUNNING and versions.rules.share > 0 and sum(base.values()) < pool.settings.max_processes:
            spares = {**base, replace(CHAT, cli=CANARY): 1}
        else:
            spares = dict(base)
        pool.keep_spares(spares)

    if versions.canary is not None:
        move(State.RUNNING)
        versions.on_change = move
