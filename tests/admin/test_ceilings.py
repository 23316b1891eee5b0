"""What an organisation may grant itself under the operator's defaults: pure decisions."""

from __future__ import annotations

import pytest

from claude_wrapper.api.admin.http import decode
from claude_wrapper.api.admin.limits import ChangedRateLimits, merged
from claude_wrapper.limits import Limits


@pytest.mark.parametrize(
    ("given", "looser"),
    [
        ("", None),
        ("requests=100/hour", None),
        ("requests=50/hour", None),
        ("requests=100/hour burst 5", None),
        ("requests=101/hour", "requests"),
        ("requests=10/second", "requests"),
        ("requests=100/minute", "requests"),
        ("requests=unlimited", "requests"),
        ("concurrent_turns=4", None),
        ("concurrent_turns=5", "concurrent_turns"),
        ("concurrent_turns=unlimited", "concurrent_turns"),
        ("output_tokens=1000000", None),
    ],
)
def test_limits_stay_within_a_ceiling(given: str, looser: str | None) -> None:
    ceiling = Limits.parse("requests=100/hour, concurrent_turns=4")
    assert Limits.parse(given).looser_than(ceiling) == looser


def test_single_rates_are_set_and_taken_away_and_the_others_stay() -> None:
    body = b'{"limits":[{"type":"requests_per_minute","value":5},{"type":"output_tokens_per_minute","value":null}]}'
    before = Limits.parse({"requests": ["100/hour", "9/minute"], "output_tokens": 7, "sessions": 3})
    after = merged(before, decode(body, ChangedRateLimits).limits)
    assert after.to_json() == {"requests": ["100/hour", "5/minute"], "sessions": 3}
