"""A second CLI that is tried during the load: a good one first, then one that breaks in some of its turns."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from claude_wrapper.agent.launch import locate_cli
from claude_wrapper.sessions.canary import Rules, Sample, objection
from claude_wrapper.testing.soak.asking import Asker
from claude_wrapper.testing.soak.fleet import Fleet
from claude_wrapper.testing.soak.outcomes import CanaryLook
from claude_wrapper.testing.soak.served import Served

RULES: Final = {
    "canary_share": "0.3",
    "canary_min_turns": "12",
    "canary_window_seconds": "30",
    # The same program, on a machine that is busy: what is slow here is not the version's fault.
    "canary_slower": "10",
}
_LOOK_SECONDS: Final = 1.0
_FLIP_SECONDS: Final = 0.4
_MARGIN: Final = 0.1
"""A version that is worse by this much more than is allowed cannot be so for turns that went out of the window alone."""
_TURNS_BAD: Final = 0.45
"""The share of the load after which the new version breaks."""
_BREAKS: Final = """#!/bin/sh
# A new version of the CLI that answers what it is asked at its start, and dies when somebody speaks to it.
case " $* " in *" --version "*) echo '{version}'; exit 0 ;; esac
while IFS= read -r line; do
  case $line in
    *'"type":"user"'*) kill -9 $$ ;;
    *'"control_request"'*)
      id=${{line#*'"request_id":"'}} id=${{id%%\\"*}}
      printf '{{"type":"control_response","response":{{"subtype":"success","request_id":"%s","response":{{}}}}}}\\n' "$id" ;;
  esac
done
"""


def said_version(cli: Path) -> str:
    """What it says when it is asked for its version."""
    return subprocess.run([str(cli), "--version"], capture_output=True, check=True, text=True).stdout.strip()


@dataclass(eq=False)
class Canary:
    """The second CLI and what became of it."""

    directory: Path
    looks: list[CanaryLook] = field(default_factory=list)
    broken_at: float | None = None
    """When it began to break; None: it did not."""
    tried_again: bool = False
    """It had been taken back before it broke, for faults that had hit it by chance, and the operator tried it again."""

    @property
    def path(self) -> Path:
        """What the server is given as CANARY_CLI."""
        return self.directory / "claude"

    def prepare(self) -> None:
        """Put the good one there: the same file as the main one, under another name."""
        self.directory.mkdir(mode=0o755)
        real, kept = locate_cli(), self.directory / "good"
        with contextlib.suppress(OSError):
            os.link(real.resolve(), kept)
        if not kept.exists():
            shutil.copy2(real, kept)
        bad = self.directory / "bad"
        bad.write_text(_BREAKS.format(version=said_version(real)), encoding="utf-8")
        bad.chmod(0o755)
        self._become(kept)

    def _become(self, file: Path) -> None:
        """Processes that run keep what they were started from."""
        beside = self.directory / "next"
        os.link(file, beside)
        beside.replace(self.path)

    async def breaks(self, operator: Asker, seconds: float) -> None:
        """From a certain moment on, every other process of it is a bad one, until it was taken back everywhere."""
        began = time.monotonic()
        await asyncio.sleep(seconds * _TURNS_BAD)
        if any(one.state != "running" for one in self._latest(operator.fleet)):
            self.tried_again = True
            await operator.insist("POST", "/v1/cli", json={"state": "running"})
        self.broken_at = time.monotonic()
        while time.monotonic() < began + seconds and not self.taken_back(operator.fleet):
            for name in ("bad", "good"):
                self._become(self.directory / name)
                await asyncio.sleep(_FLIP_SECONDS)

    def taken_back(self, fleet: Fleet) -> bool:
        """Whether every replica has said so since it broke."""
        latest = self._latest(fleet)
        since = self.broken_at
        return (
            since is not None
            and len(latest) == len(fleet.replicas)
            and all(one.state == "rolled_back" and one.at > since for one in latest)
        )

    def _latest(self, fleet: Fleet) -> list[CanaryLook]:
        found = {one.replica: one for one in self.looks}
        return [found[one.number] for one in fleet.replicas if one.number in found]

    async def watch(self, operator: Asker) -> None:
        """Look at it for ever, on each replica."""
        await asyncio.gather(*(self._watch(operator, one) for one in operator.fleet.replicas))

    async def _watch(self, operator: Asker, replica: Served) -> None:
        while True:
            reply = await operator.ask("GET", "/v1/cli", at=replica)
            if reply.ok:
                self.looks.append(_look(replica.number, reply.body))
            await asyncio.sleep(_LOOK_SECONDS)


def _look(replica: int, said: dict[str, Any]) -> CanaryLook:
    main, canary, rules = said["main"], said["canary"], said["rules"]
    against = objection(
        Sample(main["turns"], main["failures"], None),
        Sample(canary["turns"], canary["failures"], None),
        Rules(min_turns=rules["min_turns"], worse_errors=rules["worse_errors"] + _MARGIN),
    )
    state, reason = str(canary["state"]), str(canary["reason"] or "")
    return CanaryLook(
        time.monotonic(), replica, state, reason, canary["turns"], canary["failures"], against is not None
    )
