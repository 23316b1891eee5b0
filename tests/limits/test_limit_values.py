"""How limits are written and read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.limits import Limits, Rate, Resource, Scope, Subjects
from claude_wrapper.limits.values import COUNTS, RATES


def test_a_hundred_requests_an_hour_is_one_line() -> None:
    assert Limits.parse("requests=100/hour").rates(Resource.REQUESTS) == (Rate(100, 3600.0),)


def test_json_in_text_and_in_a_mapping_read_alike() -> None:
    value = {"requests": ["50", "1000/day burst 200"], "input_tokens": 400000, "concurrent_turns": 4}
    limits = Limits.parse(value)
    assert limits == Limits.parse(
        '{"requests": ["50", "1000/day burst 200"], "input_tokens": 400000, "concurrent_turns": 4}'
    )
    assert limits.rates(Resource.REQUESTS) == (Rate(50, 60.0), Rate(1000, 86400.0, 200))
    assert limits.count(Resource.CONCURRENT_TURNS) == 4
    assert limits.count(Resource.SESSIONS) is None


def test_the_admin_apis_names_are_understood() -> None:
    assert Limits.parse({"requests_per_hour": 100, "input_tokens_per_minute_cache_aware": 5}) == Limits.parse(
        {"requests": "100/hour", "input_tokens": 5}
    )


@given(
    st.dictionaries(
        st.sampled_from(RATES),
        st.lists(
            st.builds(Rate, st.integers(1, 10**9), st.sampled_from([1.0, 60.0, 3600.0, 86400.0])),
            min_size=1,
            max_size=4,
        ).map(tuple)
        | st.none(),
    ),
    st.dictionaries(st.sampled_from(COUNTS), st.integers(0, 10**6) | st.none()),
)
def test_what_is_written_is_read_back(rates: Any, counts: Any) -> None:
    limits = Limits({**rates, **counts})
    assert Limits.parse(limits.to_json()) == limits


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"requets": 5}, "limits.requets"),
        ({"requests": 0}, "limits.requests"),
        ({"requests": -1}, "limits.requests"),
        ({"requests": 1.5}, "limits.requests"),
        ({"requests": True}, "limits.requests"),
        ({"requests": "5/fortnight"}, "limits.requests"),
        ({"requests": []}, "limits.requests"),
        ({"requests": ["1"] * 5}, "limits.requests"),
        ({"requests": 10**13}, "limits.requests"),
        ({"sessions": "5/minute"}, "limits.sessions"),
        ({"sessions": -1}, "limits.sessions"),
        ({"sessions_per_minute": 5}, "limits.sessions_per_minute"),
        ("requests", "limits"),
        ("{not json", "limits"),
        (["requests"], "limits"),
    ],
)
def test_nonsense_is_refused_with_the_name_of_the_field(value: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Limits.parse(value)
    assert caught.value.field == field


def test_own_limits_win_over_a_default_and_unlimited_lifts_it() -> None:
    default = Limits.parse("requests=100/hour,sessions=5")
    own = Limits.parse({"requests": "unlimited", "processes": 2})
    effective = own.over(default)
    assert effective.rates(Resource.REQUESTS) == ()
    assert effective.count(Resource.SESSIONS) == 5
    assert effective.count(Resource.PROCESSES) == 2


def test_subjects_are_asked_narrowest_first_and_absent_ones_are_left_out() -> None:
    subjects = Subjects(org="org_1", workspace=None, key="apikey_1", user="user_1", session="sesn_1")
    assert list(subjects) == [
        (Scope.SESSION, "sesn_1"),
        (Scope.KEY, "apikey_1"),
        (Scope.USER, "user_1"),
        (Scope.ORGANIZATION, "org_1"),
    ]
    assert list(Subjects(org="")) == []
