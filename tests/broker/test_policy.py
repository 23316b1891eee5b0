"""Only a few exact requests are let through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_wrapper.broker import policy
from claude_wrapper.broker.policy import Kind
from claude_wrapper.broker.refusals import Refused


@pytest.mark.parametrize(
    ("method", "target", "kind"),
    [
        ("POST", "/v1/messages", Kind.MESSAGES),
        ("POST", "/v1/messages?beta=true", Kind.MESSAGES),
        ("POST", "/v1/messages/count_tokens?beta=true", Kind.COUNT_TOKENS),
        ("GET", "/v1/models?limit=1000", Kind.MODELS),
        ("GET", "/v1/models/claude-sonnet-5-5", Kind.MODELS),
        ("GET", "/v1/models/eu.anthropic.claude-opus@2026:0", Kind.MODELS),
        ("HEAD", "/", Kind.PING),
    ],
)
def test_what_the_cli_asks_for_is_allowed(method: str, target: str, kind: Kind) -> None:
    assert policy.decide(method, target).kind is kind


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/v1/messages", 405),
        ("PUT", "/v1/messages", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/", 404),
        ("POST", "/v1/messages/batches", 403),
        ("POST", "/mcp/docs", 404),
        ("GET", "/v1/files", 403),
        ("POST", "/v1/organizations/api_keys", 403),
        ("GET", "/api/oauth/profile", 403),
        ("POST", "http://api.anthropic.com/v1/messages", 404),
        ("POST", "//v1/messages", 404),
        ("POST", "/v1//messages", 403),
        ("POST", "/v1/messages/", 403),
        ("POST", "/v1/../v1/messages", 403),
        ("POST", "/x/../v1/messages", 404),
        ("POST", "/v1/messages/..", 403),
        ("POST", "/v1%2fmessages", 404),
        ("POST", "/v1/%6dessages", 403),
        ("POST", "/v1/messages;x", 403),
        ("POST", "/v1/messages#x", 403),
        ("POST", "/V1/messages", 404),
        ("POST", "/v1\\messages", 404),
        ("POST", "/v1/messages\x00", 403),
        ("POST", "/v1/messages?a b", 404),
        ("POST", "/v1/messages?a\r\nx: y", 404),
        ("POST", "/v1/messages?" + "a" * 1025, 404),
        ("GET", "/v1/models/../messages", 403),
        ("GET", "/v1/models/a..b", 403),
        ("GET", "/v1/models/a/b", 403),
        ("GET", "/v1/models/" + "a" * 200, 403),
        ("GET", "/mcp/../v1/messages", 404),
        ("GET", "/mcp/", 404),
        ("CONNECT", "example.com:443", 404),
        ("OPTIONS", "*", 404),
        ("POST", "", 404),
    ],
)
def test_everything_else_is_refused(method: str, target: str, status: int) -> None:
    with pytest.raises(Refused) as refused:
        policy.decide(method, target)
    assert refused.value.refusal.status == status


@given(st.text(max_size=60).map(lambda text: "/v1/messages" + text))
def test_no_path_that_can_be_read_in_two_ways_passes(target: str) -> None:
    try:
        route = policy.decide("POST", target)
    except Refused:
        return
    assert route.path in {"/v1/messages", "/v1/messages/count_tokens"}
    assert (route.path + "?" + route.query).rstrip("?") == target.rstrip("?")
    assert not set(route.query) & set("\r\n #\\\0\t")
