"""Headers: the real credential goes in, nothing of it comes back, nothing of the process's connection goes on."""

from __future__ import annotations

import base64

import pytest

from broker.world import SECRET, credential
from claude_wrapper.broker import CredentialKind, inject

KEY = credential("http://x")
TOKEN = credential("http://x", kind=CredentialKind.OAUTH)


def sent(pairs: inject.Headers) -> dict[str, str]:
    lower = [(name.lower(), value) for name, value in pairs]
    assert len(dict(lower)) == len(lower), "no header twice"
    return dict(lower)


def test_an_api_key_replaces_whatever_the_process_presents() -> None:
    out = sent(
        inject.upstream_headers(
            [("X-Api-Key", "dummy"), ("Authorization", "Bearer dummy"), ("AUTHORIZATION", "Basic x")], KEY
        )
    )
    assert out == {"accept-encoding": "identity", "x-api-key": SECRET}


def test_an_oauth_token_is_a_bearer_and_brings_its_beta() -> None:
    out = sent(inject.upstream_headers([("x-api-key", "dummy"), ("anthropic-beta", "a, b")], TOKEN))
    assert out["authorization"] == f"Bearer {SECRET}"
    assert out["anthropic-beta"] == "a,b,oauth-2025-04-20"
    assert "x-api-key" not in out


def test_the_oauth_beta_is_not_added_twice_and_not_sent_with_an_api_key() -> None:
    betas = [("anthropic-beta", "oauth-2025-04-20"), ("Anthropic-Beta", "x,oauth-2025-04-20")]
    assert sent(inject.upstream_headers(betas, TOKEN))["anthropic-beta"] == "oauth-2025-04-20,x"
    assert sent(inject.upstream_headers(betas, KEY))["anthropic-beta"] == "x"
    assert "anthropic-beta" not in sent(inject.upstream_headers(betas[:1], KEY))


@pytest.mark.parametrize(
    "name",
    [
        "Connection",
        "Transfer-Encoding",
        "TE",
        "Trailer",
        "Upgrade",
        "Keep-Alive",
        "Host",
        "Content-Length",
        "Expect",
        "Cookie",
        "Proxy-Authorization",
        "X-Forwarded-For",
        "Forwarded",
        "Via",
        "X-Real-IP",
        "Accept-Encoding",
    ],
)
def test_what_belongs_to_the_process_s_connection_stays_there(name: str) -> None:
    out = sent(inject.upstream_headers([(name, "evil")], KEY))
    assert "evil" not in out.values()


def test_headers_named_by_connection_stay_too() -> None:
    out = sent(inject.upstream_headers([("Connection", "keep-alive, X-Hop"), ("x-hop", "1"), ("x-app", "cli")], KEY))
    assert "x-hop" not in out
    assert out["x-app"] == "cli"


def test_what_the_cli_says_of_itself_goes_on_unchanged() -> None:
    pairs = [("User-Agent", "claude-cli/2.1.327 (external, sdk-cli)"), ("X-Stainless-OS", "Linux"), ("x-new", "1")]
    assert inject.upstream_headers(pairs, KEY)[:3] == pairs


def test_trace_and_credential_headers_replace_those_of_the_process() -> None:
    own = credential("http://x", headers={"anthropic-workspace": "w"})
    trace = {"traceparent": "00-ours"}
    pairs = [("Traceparent", "00-theirs"), ("Anthropic-Workspace", "other")]
    out = sent(inject.upstream_headers(pairs, own, trace))
    assert (out["traceparent"], out["anthropic-workspace"]) == ("00-ours", "w")


def test_the_process_learns_nothing_of_the_credential_s_owner() -> None:
    pairs = [
        ("request-id", "req_1"),
        ("Set-Cookie", "session=1"),
        ("Anthropic-Organization-Id", "org"),
        ("Connection", "close, x-internal"),
        ("X-Internal", "1"),
        ("Transfer-Encoding", "chunked"),
        ("x-echo", f"you sent {SECRET}"),
        ("x-echo-64", base64.b64encode(SECRET.encode()).decode()),
        ("anthropic-ratelimit-requests-remaining", "5"),
    ]
    names = [name for name, _ in inject.downstream_headers(pairs, (SECRET,))]
    assert names == ["request-id", "anthropic-ratelimit-requests-remaining"]


def test_the_presented_token_is_the_key_before_the_bearer() -> None:
    assert inject.presented_token([("Authorization", "bearer a"), ("X-API-KEY", "b")]) == "b"
    assert inject.presented_token([("authorization", "Bearer a")]) == "a"
    assert inject.presented_token([("authorization", "Basic a")]) is None
    assert not inject.token_matches(None, "a")
    assert not inject.token_matches("ä", "a")


def test_a_credential_does_not_show_its_secret() -> None:
    assert SECRET not in repr(credential("http://x", headers={"h": SECRET}))
