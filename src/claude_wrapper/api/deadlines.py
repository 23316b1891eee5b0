"""How long the caller will wait: a turn need not run longer than that.

* `cw-turn-seconds: N` is our own header and bounds the turn, streamed or not.
* The official SDKs send `x-stainless-read-timeout` and `x-stainless-timeout`: the longest silence that they bear. For an
  answer that is not streamed, that is the time for the whole answer. A stream is never silent for long (pings), so there
  it says nothing about the turn's length and is not looked at. What is no sane number (`NOT_GIVEN`) is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from claude_wrapper.errors import InvalidRequest

TURN_SECONDS: Final = "cw-turn-seconds"
_SDK: Final = ("x-stainless-read-timeout", "x-stainless-timeout")
_LEAST: Final = 1.0


def turn_seconds(headers: Mapping[str, str], limit: float, *, streamed: bool) -> float:
    """The turn's time: what the server allows, or less if the caller waits less. Raises InvalidRequest."""
    seconds = limit
    own = headers.get(TURN_SECONDS)
    if own is not None:
        asked = _number(own)
        if asked is None:
            raise InvalidRequest("expected a number of seconds from 1", field=TURN_SECONDS)
        seconds = min(seconds, asked)
    if not streamed:
        waits = next((found for name in _SDK if (found := _number(headers.get(name, ""))) is not None), None)
        seconds = min(seconds, waits) if waits is not None else seconds
    return seconds


def _number(text: str) -> float | None:
    """A sane number of seconds; None for anything else (`NOT_GIVEN`, `None`, `Timeout(…)`, `nan`)."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if _LEAST <= number < float("inf") else None
