"""What a turn tells telemetry. Nothing here does anything: the composition root gives a watch that does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from claude_wrapper.sessions.leg import Leg, Started
from claude_wrapper.sessions.spec import Owner, TurnInput
from claude_wrapper.wire.streamjson import Frame

_NONE: Mapping[str, str] = MappingProxyType({})


class TurnWatch:
    """One turn, from its submission to its end. Hooks are quick, do not raise, and run in the turn's own task."""

    interrupted = False
    """Set by the conversation: the turn was ended early."""

    @property
    def trace(self) -> Mapping[str, str]:
        """Trace headers for the turn's upstream calls."""
        return _NONE

    def started(self, started: Started) -> None:
        """A process has taken the turn."""

    def frame(self, frame: Frame, events: Sequence[bytes]) -> None:
        """A frame of the CLI, and what it means as Messages events."""

    def ended(self, leg: Leg) -> None:
        """It is over; `leg` is the last one, `leg.error` what went wrong."""


class Watch:
    """Watches turns. This one does not."""

    def begin(self, owner: Owner, session: str, turn_input: TurnInput) -> TurnWatch:
        """A turn was submitted. Called in its task."""
        del owner, session, turn_input
        return TurnWatch()
